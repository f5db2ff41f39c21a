"""One sequence over several cards: a step of training with each holding a run of whole segments.

    torchrun --nproc_per_node 2 benchmarks/context_parallel.py
    torchrun --nproc_per_node 2 benchmarks/context_parallel.py --device cpu --layers 2 --length 256 \
        --segment_length 64

A step is forward with the loss in chunks, and backward, of a model of SmolLM2-135M's shape with fresh weights
in bf16 (fp32 on the CPU), gates in fp32; without an optimiser, and without the sum of gradients over cards
that data parallelism has too. Rows: one card with `length` tokens; all cards sharing them; all cards sharing
as many times more. Times are medians after two steps, of the slowest card.

Nothing is timed before, in fp32, the loss and the gradients of all gates over the cards equal those of one
card that holds everything. The first process prints a table, then one line of JSON.
"""

import json
import statistics
import sys
import time
from typing import Any, Literal

import jsonargparse
import torch
import torch.distributed as dist
from common import SMOLLM2, environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.layers import MemoryGate
from infini_attention.models import retrofit
from infini_attention.models.loss import shifted
from infini_attention.ops.context_parallel import segment_split

RULES = ("linear", "delta")
STEPS = 5  # that are timed for a row
LOSS_CHUNK = 2048
TOLERANCE = 1e-3  # of gradients, relative, in fp32

Row = dict[str, Any]


def main(
    length: int = 65_536,
    segment_length: int = 2048,
    layers: int = 30,
    device: Literal["cuda", "cpu"] = "cuda",
) -> None:
    """Times a sequence on one card and on all.

    Args:
        length: tokens that one card holds.
        segment_length: tokens a segment.
        layers: of the model.
        device: where.
    """
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, cards = dist.get_rank(), dist.get_world_size()
    place = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        torch.cuda.set_device(place)
    rows = []
    for rule in RULES:
        model = model_of(rule, layers, segment_length, place)
        check(model, place)
        if device == "cuda":
            model.bfloat16()
        rows += [
            measured(model, rule, length, place, shared=False),
            measured(model, rule, length, place, shared=True),
            measured(model, rule, length * cards, place, shared=True),
        ]
        del model
    report = {"benchmark": "context_parallel", "cards": cards, "layers": layers, "rows": rows}
    report |= {"segment_length": segment_length, **environment(device)}
    if rank == 0:
        Console(width=120).print(table(report))
        print(json.dumps(report))
    dist.destroy_process_group()


def model_of(rule: str, layers: int, segment_length: int, place: torch.device) -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SMOLLM2, num_hidden_layers=layers)).to(place).train()
    return retrofit(base, segment_length=segment_length, update_rule=rule, gate_init=0.0)


def check(model: Any, place: torch.device) -> None:
    """Stops unless loss and gradients of gates over all cards are those of one."""
    ids = same_ids(2 * dist.get_world_size() * model.config.segment_length, place)
    gates = [module.logits for module in model.modules() if isinstance(module, MemoryGate)]
    found = []
    for shared in (False, True):
        model.zero_grad()
        loss = loss_of(model, ids, shared)
        loss.backward()
        gradients = torch.stack([gate.grad for gate in gates])
        if shared:
            dist.all_reduce(gradients)
            dist.all_reduce(loss := loss.detach())
        found.append((loss.detach(), gradients))
    model.zero_grad()
    for (one, all_of_them), name in zip(zip(*found, strict=True), ("loss", "gradients"), strict=True):
        error = ((one - all_of_them).norm() / one.norm()).item()
        if not error < TOLERANCE:
            sys.exit(f"{name} of all cards is off by {error:.2e} of one card's; nothing was timed")


def loss_of(model: Any, ids: Tensor, shared: bool) -> Tensor:
    """Mean loss of all tokens; where `shared`, this card's part of it."""
    targets, count = shifted(ids), ids.shape[1] - 1
    settings: dict[str, Any] = {"use_cache": False, "loss_chunk": LOSS_CHUNK, "num_items_in_batch": count}
    if shared:
        ranks = dist.get_world_size()
        run = segment_split(ids.shape[1], segment_length=model.config.segment_length, ranks=ranks)
        mine = run[dist.get_rank()]
        ids, targets = ids[:, mine], targets[:, mine]
        settings["context_group"] = dist.group.WORLD
    return model(input_ids=ids, shift_labels=targets, **settings).loss


def same_ids(length: int, place: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(SMOLLM2["vocab_size"], (1, length), generator=generator).to(place)


def measured(model: Any, rule: str, length: int, place: torch.device, *, shared: bool) -> Row:
    ids = same_ids(length, place)
    seconds = []
    for step in range(2 + STEPS):
        if step == 2 and place.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(place)
        begin = time.perf_counter()
        loss_of(model, ids, shared).backward()
        wait(place)
        seconds.append(time.perf_counter() - begin)
        model.zero_grad()
    median = torch.tensor(statistics.median(seconds[2:]), device=place)
    dist.all_reduce(median, op=dist.ReduceOp.MAX)
    cards = dist.get_world_size() if shared else 1
    row = {"rule": rule, "cards": cards, "length": length, "seconds": median.item()}
    row["tokens_per_second"] = length / median.item()
    if place.type == "cuda":
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    return row


def wait(place: torch.device) -> None:
    if place.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()


def table(report: Row) -> Table:
    title = (
        f"A step of training over cards: {report['layers']} layers, segments of {report['segment_length']:,}"
    )
    columns = "rule", "cards", "tokens", "ms a step", "tokens/s", "x one card", "peak GB a card"
    result = Table(*columns, title=title)
    alone = {row["rule"]: row for row in report["rows"] if row["cards"] == 1}
    for row in report["rows"]:
        result.add_row(
            row["rule"],
            str(row["cards"]),
            f"{row['length']:,}",
            f"{row['seconds'] * 1e3:,.1f}",
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / alone[row['rule']]['tokens_per_second']:.2f}",
            f"{row['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in row else "",
        )
    return result


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
