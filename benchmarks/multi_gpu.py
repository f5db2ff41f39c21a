"""One sequence over several cards: training and reading, with each card holding a run of whole segments.

    torchrun --nproc_per_node 4 benchmarks/multi_gpu.py
    torchrun --nproc_per_node 2 benchmarks/multi_gpu.py --device cpu --layers 2 --lengths '[512]' \
        --segment_length 64

A model of SmolLM2-135M's shape with fresh weights, in bf16 (fp32 on the CPU), gates in fp32. Training is
forward with the loss in chunks, and backward, layers recomputed; without an optimiser, and without the sum of
gradients over cards that data parallelism has too. Reading is forward without gradients, to the memory after
the last token. Each length is shared by 1, 2, 4, ... cards: `scaling` is the speed beside as many single
ones, 0.9 being ten percent lost. A row that does not fit says so. Times are medians, after a step that is not
counted, of the slowest card; `in exchange` is the share of the time in which the last card, which waits for
all others, is in a collective (kernels of NCCL, by torch's profiler).

Nothing is timed before, in fp32, loss, gates' gradients and the last state over all cards equal those of one
card that holds everything, and again with weights sharded by FSDP2 over all cards and sequences shared in
pairs. The first process prints a table, then one line of JSON.
"""

import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import jsonargparse
import torch
import torch.distributed as dist
from common import SMOLLM2, environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.layers import MemoryGate
from infini_attention.models import retrofit
from infini_attention.models.cache import InfiniCache
from infini_attention.models.loss import shifted
from infini_attention.ops.context_parallel import segment_split

RULES = ("linear", "delta")
LOSS_CHUNK = 2048
TOLERANCE = 1e-3  # of what is compared, relative, in fp32

Row = dict[str, Any]


def main(
    lengths: list[int] | None = None,
    segment_length: int = 2048,
    layers: int = 30,
    steps: int = 3,
    tasks: list[Literal["training", "reading"]] | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Times sequences on one card and on more.

    Args:
        lengths: tokens of a whole sequence; default 128K, 1M and 4M.
        segment_length: tokens a segment.
        layers: of the model.
        steps: that are timed for a row, after one that is not.
        tasks: what is timed; default both.
        device: where.
    """
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, cards = dist.get_rank(), dist.get_world_size()
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    groups = {size: dist.new_group(range(size)) for size in (2**power for power in range(cards.bit_length()))}
    rows = []
    for rule in RULES:
        check(lambda rule=rule: model_of(rule, layers=2, segment_length=segment_length, place=place), place)
        model = model_of(rule, layers=layers, segment_length=segment_length, place=place)
        if device == "cuda":
            model.bfloat16()
        for task in tasks or ["training", "reading"]:
            too_many = math.inf  # tokens a card
            for length in lengths or [131_072, 1_048_576, 4_194_304]:
                for size, group in groups.items():
                    if length / size < too_many:
                        row = measured(model, task, length, size, group, steps, place)
                        too_many = length / size if row["seconds"] is None else too_many
                    else:
                        row = {"rule": rule, "task": task, "cards": size, "length": length, "seconds": None}
                    rows.append(row)
        del model
    report = {"benchmark": "multi_gpu", "cards": cards, "layers": layers, "rows": scaled(rows)}
    report |= {"segment_length": segment_length, **environment(device)}
    if rank == 0:
        Console(width=120).print(table(report))
        print(json.dumps(report))
    dist.destroy_process_group()


def model_of(rule: str, *, layers: int, segment_length: int, place: torch.device) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMOLLM2, num_hidden_layers=layers)).to(place).train()
    return retrofit(base, segment_length=segment_length, update_rule=rule, gate_init=0.0)


def same_ids(length: int, place: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(SMOLLM2["vocab_size"], (1, length), generator=generator).to(place)


def check(make: Callable[[], Any], place: torch.device) -> None:
    """Stops unless cards together find what one finds: by turns, then with weights sharded, too."""
    cards, world = dist.get_world_size(), dist.group.WORLD
    alone, together = make(), make()
    ids = same_ids(2 * cards * alone.config.segment_length, place)
    expected = found_by(alone, ids, None)
    compare("all cards", found_by(together, ids, world), expected)
    if cards % 2 == 0:
        pairs = [dist.new_group([first, first + 1]) for first in range(0, cards, 2)]
        sharded = make()
        for layer in sharded.model.layers:
            fully_shard(layer)
        fully_shard(sharded)
        compare("FSDP2 and pairs", found_by(sharded, ids, pairs[dist.get_rank() // 2]), expected)


def found_by(model: Any, ids: Tensor, group: Any) -> dict[str, Tensor]:
    """The loss, the gradients of all gates, and the last memory, over the cards of `group`."""
    model.zero_grad()
    loss = loss_of(model, ids, group)
    sharded = hasattr(model, "unshard")
    pairs = dist.get_world_size() / 2 if sharded else 1  # that each add the same to a mean over all cards
    (loss * (dist.get_world_size() if sharded else 1)).backward()
    gates = [module.logits.grad for module in model.modules() if isinstance(module, MemoryGate)]
    gradients = torch.stack([grad.full_tensor() / pairs if sharded else grad for grad in gates])
    loss, state = loss.detach(), read(model, ids, group)
    if group is not None:
        dist.all_reduce(loss, group=group)
        if not sharded:
            dist.all_reduce(gradients, group=group)
        last = dist.get_process_group_ranks(group)[-1]
        dist.broadcast(state := state.contiguous(), last, group=group)
    return {"loss": loss, "gradients": gradients, "memory": state}


def compare(who: str, actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, wanted in expected.items():
        error = ((actual[name] - wanted).norm() / wanted.norm()).item()
        if not error < TOLERANCE:
            sys.exit(f"{name} of {who} is off by {error:.2e} of one card's; nothing was timed")


def mine(length: int, segment_length: int, group: Any) -> slice:
    """This card's run of a sequence; all of it without a group."""
    if group is None:
        return slice(0, length)
    ranks = dist.get_world_size(group)
    return segment_split(length, segment_length=segment_length, ranks=ranks)[dist.get_rank(group)]


def loss_of(model: Any, ids: Tensor, group: Any) -> Tensor:
    """This card's part of the mean loss of all tokens."""
    run = mine(ids.shape[1], model.config.segment_length, group)
    return model(
        input_ids=ids[:, run],
        shift_labels=shifted(ids)[:, run],
        num_items_in_batch=ids.shape[1] - 1,
        use_cache=False,
        loss_chunk=LOSS_CHUNK,
        context_group=group,
    ).loss


@torch.no_grad()
def read(model: Any, ids: Tensor, group: Any) -> Tensor:
    """The first layer's memory after this card's last token."""
    run = mine(ids.shape[1], model.config.segment_length, group)
    cache = InfiniCache(model.config)
    model(input_ids=ids[:, run], past_key_values=cache, use_cache=True, logits_to_keep=1, context_group=group)
    return cache.layers[0].state.memory


def measured(
    model: Any, task: str, length: int, size: int, group: Any, steps: int, place: torch.device
) -> Row:
    """A row of `size` cards, the same on all; the others wait. Without seconds where it does not fit."""
    row: Row = {"rule": model.config.update_rule, "task": task, "cards": size, "length": length}
    if dist.get_rank() < size:
        try:
            row |= timed(model, task, length, None if size == 1 else group, steps, place)
        except torch.cuda.OutOfMemoryError:
            row["seconds"] = None
        model.zero_grad()
        if place.type == "cuda":
            torch.cuda.empty_cache()
    dist.broadcast_object_list(shared := [row], 0)
    return shared[0]


def timed(
    model: Any, task: str, length: int, group: Any, steps: int, place: torch.device
) -> dict[str, float | int]:
    ids = same_ids(length, place)
    if task == "training":
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
    else:
        model.eval().gradient_checkpointing_disable()

    def step() -> None:
        if task == "training":
            loss_of(model, ids, group).backward()
            model.zero_grad()
        else:
            read(model, ids, group)

    def duration() -> float:
        wait(place, group)
        begin = time.perf_counter()
        step()
        wait(place, group)
        return time.perf_counter() - begin

    duration()
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    median = torch.tensor(statistics.median(duration() for _ in range(steps)), device=place)
    if group is not None:
        dist.all_reduce(median, op=dist.ReduceOp.MAX, group=group)
    figures: dict[str, float | int] = {"seconds": median.item(), "tokens_per_second": length / median.item()}
    if place.type == "cuda":
        figures["peak_bytes"] = torch.cuda.max_memory_allocated()
        if group is not None:
            figures["exchange_share"] = exchange_share(step, group)
    return figures


def exchange_share(step: Callable[[], None], group: Any) -> float:
    """The share of a step's time in which the group's last card is in a collective."""
    torch.cuda.synchronize()
    dist.barrier(group)
    begin = time.perf_counter()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    events = profiled.key_averages()
    exchanging = sum(event.device_time_total for event in events if "nccl" in event.key.lower()) / 1e6
    share = torch.tensor(exchanging / seconds, device="cuda")
    dist.broadcast(share, dist.get_process_group_ranks(group)[-1], group=group)
    return share.item()


def wait(place: torch.device, group: Any) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()
    if group is not None:
        dist.barrier(group)


def scaled(rows: list[Row]) -> list[Row]:
    """Rows with their speed beside as many single cards, on the same length or the longest that fits."""
    for row in rows:
        alike = [other for other in rows if (other["rule"], other["task"]) == (row["rule"], row["task"])]
        alone = [other for other in alike if other["cards"] == 1 and other["seconds"] is not None]
        held = [other for other in alone if other["length"] <= row["length"]]
        if row["seconds"] is not None and held:
            one = max(held, key=lambda other: other["length"])
            row["beside_length"] = one["length"]
            row["scaling"] = row["tokens_per_second"] / one["tokens_per_second"] / row["cards"]
    return rows


def table(report: Row) -> Table:
    title = f"One sequence over cards: {report['layers']} layers, segments of {report['segment_length']:,}"
    columns = "rule", "task", "tokens", "cards", "ms", "tokens/s", "scaling", "in exchange", "peak GB a card"
    result = Table(*columns, title=title)
    for row in report["rows"]:
        name = row["rule"], row["task"], f"{row['length']:,}", str(row["cards"])
        if row["seconds"] is None:
            result.add_row(*name, "does not fit")
            continue
        result.add_row(
            *name,
            f"{row['seconds'] * 1e3:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['scaling']:.2f}" + ("" if row["beside_length"] == row["length"] else " *")
            if "scaling" in row
            else "",
            f"{row['exchange_share']:.1%}" if "exchange_share" in row else "",
            f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "",
        )
    result.caption = "* beside the longest sequence that one card held"
    return result


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
