"""What a step of training costs at length: models with a memory, and their rivals.

    python benchmarks/train.py
    python benchmarks/train.py --trained true
    python benchmarks/train.py --compiled true --graphed true
    python benchmarks/train.py --device cpu --layers 2 --length 256 --segment_length 64 --seconds 1

A step is forward with the loss in chunks, and backward; eager, without an optimiser, and with no activations
made twice but the loss's logits. Models have SmolLM2-135M's shape and fresh weights in bf16 (our gates in
fp32), on the CPU all in fp32. The input is one row of random tokens. `--trained true` makes it the step that
InfiniTrainer takes: weights in fp32 under autocast, and AdamW. `--compiled true` compiles the decoder layers,
`--graphed true` captures a step as one CUDA graph, which the host launches at once; both leave out the
package.

- infini: `retrofit` of the base model, all segments at once, attention by the backend that it takes by itself
- local: the base model on segments as rows of a batch, without any memory: the floor
- full: the base model on everything
- package: PyPI infini-transformer-pytorch 0.2.1 as its README trains, `wrapper(ids, backward=True)`: segments
  in order with all logits of each, a backward pass after every second one, where its gradient is cut. It is
  as wide and deep and has as many query heads, but as many key/value heads too (it knows no groups; the
  others have 3 for 9), and an output matrix that is not that of its embeddings. Its gates and memory are of
  the weights' precision.

All but the package are timed with SDPA's flash and cuDNN kernels, and ratios are to the quicker. What does
not fit into memory is measured at half the length, and so on. Times are medians after two steps; "busy" is
what the card spent on kernels, the rest was waiting for the host to launch them. Memory is the peak of what
PyTorch had allocated, weights and all.

Nothing is timed before results agree with the reference in fp64: infini's losses of tokens and gradients of
gates; local's losses, with shut gates; full's, of one segment. They may be at most twice as far off as the
reference in the precision that is timed. The last line printed is JSON.
"""

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import jsonargparse
import torch
import torch.nn.functional as F
from common import SMOLLM2, environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.layers import MemoryGate
from infini_attention.models import memory_off, retrofit
from infini_attention.models.loss import chunked_loss, shifted
from infini_attention.ops import infini_attention

DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}  # many CPUs are very slow at bf16
RULES = ("linear", "delta")
RIVALS = ("local", "full", "package")
KERNELS = {"cuda": ("flash", "cuDNN"), "cpu": ("flash",)}
SDPA = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
MOST_STEPS = 10  # that are timed for a row
CHECKED_SEGMENT = 256  # tokens a segment, at most, where results are checked

Row = dict[str, Any]
Step = Callable[[Tensor], None]  # forward and backward over ids, (1, length)
Measure = Callable[..., Row]


class Contender(NamedTuple):
    """A language model, and what makes its last hidden states, (1, length, width), of ids (1, length)."""

    model: Any
    hidden: Callable[[Tensor], Tensor]


def main(
    length: int = 32_768,
    segment_length: int = 2048,
    layers: int = 30,
    loss_chunk: int = 2048,
    device: Literal["cuda", "cpu"] = "cuda",
    seconds: float = 8,
    trained: bool = False,
    compiled: bool = False,
    graphed: bool = False,
) -> None:
    """Times training steps of everything.

    Args:
        length: tokens of a step, whole segments.
        segment_length: tokens a segment.
        layers: of every model.
        loss_chunk: tokens whose logits exist at once.
        device: where.
        seconds: how long the steps of a row are repeated; at least once, at most ten times.
        trained: time the step that InfiniTrainer takes.
        compiled: compile decoder layers.
        graphed: capture a step as a CUDA graph.
    """
    if length % segment_length:
        sys.exit(f"length is {length}; give a multiple of segment_length, {segment_length}")
    torch.manual_seed(0)
    if graphed and device != "cuda":
        sys.exit("graphed is set and device is cpu; graphs are CUDA's: leave it out")
    measure = partial(measured, length=length, segment_length=segment_length, device=device, seconds=seconds)
    ours = partial(measure, graphed=graphed)
    rows = ours_and_the_base(ours, layers, segment_length, loss_chunk, device, trained, compiled)
    if not (compiled or graphed):
        rows += packages(measure, layers, segment_length, device)
    rows = with_ratios(rows)
    report = {
        "benchmark": "train",
        "length": length,
        "segment_length": segment_length,
        "layers": layers,
        "loss_chunk": loss_chunk,
        "dtype": str(DTYPES[device]).removeprefix("torch."),
        "trained": trained,
        "compiled": compiled,
        "graphed": graphed,
        "rows": rows,
        **environment(device),
    }
    Console(width=150).print(table(report))
    print(json.dumps(report))


def ours_and_the_base(
    measure: Measure,
    layers: int,
    segment_length: int,
    loss_chunk: int,
    device: str,
    trained: bool,
    compiled: bool,
) -> list[Row]:
    """Rows of models that share one set of weights, once their results are right."""
    config = LlamaConfig(**SMOLLM2, num_hidden_layers=layers, attn_implementation="sdpa")
    base = LlamaForCausalLM(config).to(device, DTYPES[device]).train()
    base.model.layers[0].self_attn.register_forward_pre_hook(refuse_a_mask, with_kwargs=True)
    check(base, min(segment_length, CHECKED_SEGMENT), loss_chunk)
    if trained:
        base.float()
    rows = []
    for name, make in (
        *((f"infini {rule}", partial(infini, base, segment_length, rule)) for rule in RULES),
        ("local", partial(local, base, segment_length)),
        ("full", partial(full, base)),
    ):
        contender = make()
        if compiled:
            torch._dynamo.config.recompile_limit = 64  # settings times kernels; not layers
            for layer in contender.model.model.layers:
                layer.compile()
        step = step_of(contender, loss_chunk, trained)
        rows += [measure(name, kernel, step) for kernel in KERNELS[device]]
    return rows


def packages(measure: Measure, layers: int, segment_length: int, device: str) -> list[Row]:
    if find_spec("infini_transformer_pytorch") is None:
        print("the package is not installed: pip install infini-transformer-pytorch==0.2.1")
        return []
    return [
        measure(f"package {rule}", "einsum", package(layers, segment_length, rule, device)) for rule in RULES
    ]


def infini(base: Any, segment_length: int, rule: str) -> Contender:
    model = retrofit(base, segment_length=segment_length, update_rule=rule, gate_init=0.0)
    return Contender(model, lambda ids: model.model(ids, use_cache=False).last_hidden_state)


def local(base: Any, segment_length: int) -> Contender:
    @without_masks
    def hidden(ids: Tensor) -> Tensor:
        states = base.model(ids.view(-1, segment_length), use_cache=False).last_hidden_state
        return states.flatten(0, 1).unsqueeze(0)

    return Contender(base, hidden)


def full(base: Any) -> Contender:
    @without_masks
    def hidden(ids: Tensor) -> Tensor:
        return base.model(ids, use_cache=False).last_hidden_state

    return Contender(base, hidden)


without_masks = patch("transformers.models.llama.modeling_llama.create_causal_mask", lambda **_: None)
"""The base model makes none for a row without padding, except while a graph is captured."""


def step_of(contender: Contender, chunk: int, trained: bool) -> Step:
    parameters = list(contender.model.parameters())
    capturable = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, capturable=capturable) if trained else None

    def step(ids: Tensor) -> None:
        try:
            with torch.autocast(ids.device.type, torch.bfloat16, enabled=trained):
                loss = loss_of(contender, ids, chunk)
            loss.backward()
            if optimizer is not None:
                optimizer.step()
        finally:  # nothing is left for the next row, if memory runs out too
            contender.model.zero_grad()

    return step


def loss_of(contender: Contender, ids: Tensor, chunk: int) -> Tensor:
    return chunked_loss(contender.model.lm_head, contender.hidden(ids), shifted(ids), chunk=chunk)


def package(layers: int, segment_length: int, rule: str, device: str) -> Step:
    from infini_transformer_pytorch import InfiniTransformer, InfiniTransformerWrapper

    width, heads = SMOLLM2["hidden_size"], SMOLLM2["num_attention_heads"]
    model = InfiniTransformer(
        num_tokens=SMOLLM2["vocab_size"],
        dim=width,
        depth=layers,
        dim_head=width // heads,
        heads=heads,
        ff_mult=4,  # of which it takes two thirds: SmolLM2's 1536
        use_mem_delta_rule=rule == "delta",
    )
    wrapper = InfiniTransformerWrapper(model, segment_length=segment_length).to(device, DTYPES[device])

    def step(ids: Tensor) -> None:
        try:
            wrapper(ids, backward=True)
        finally:
            wrapper.zero_grad()

    return step


def check(base: Any, segment_length: int, chunk: int) -> None:
    """Stops unless the models that are timed compute what they should, on four segments."""
    ids = random_ids(4 * segment_length, base.device)
    for rule in RULES:
        ours = infini(base, segment_length, rule)
        exact = infini(deepcopy(base).double(), segment_length, rule)
        exact.model.double()  # its gates too
        found = results(ours, ids, chunk)
        with reference():
            rounded, truth = results(ours, ids, chunk), results(exact, ids, chunk)
        for name in truth:
            compare(f"infini {rule}, {name}", found[name], rounded[name], truth[name])
    with torch.no_grad(), reference(), memory_off(ours.model), memory_off(exact.model):
        rounded, truth = token_losses(ours, ids), token_losses(exact, ids)
    with torch.no_grad():
        compare("local", token_losses(local(base, segment_length), ids), rounded, truth)
        one = slice(segment_length - 1)
        compare("full", token_losses(full(base), ids[:, :segment_length]), rounded[one], truth[one])


def results(contender: Contender, ids: Tensor, chunk: int) -> dict[str, Tensor]:
    gates = [module.logits for module in contender.model.modules() if isinstance(module, MemoryGate)]
    gradients = torch.autograd.grad(loss_of(contender, ids, chunk), gates)
    with torch.no_grad():
        losses = token_losses(contender, ids)
    return {"losses of tokens": losses, "gradients of gates": torch.stack(gradients)}


def token_losses(contender: Contender, ids: Tensor) -> Tensor:
    """(length - 1,) fp64."""
    logits = contender.model.lm_head(contender.hidden(ids))[0, :-1]
    return F.cross_entropy(logits.double(), ids[0, 1:], reduction="none")


def compare(name: str, found: Tensor, rounded: Tensor, truth: Tensor) -> None:
    """Stops where `found` is more than twice as far from the truth as `rounded`, the reference's."""
    error, allowed = ((x - truth).norm().item() for x in (found, rounded))
    if not error <= 2 * allowed:
        sys.exit(f"{name}: off by {error:.2e}, the reference by {allowed:.2e}; nothing was timed")


def reference() -> AbstractContextManager[Any]:
    """Models compute attention by the paper's loop."""
    slow = partial(infini_attention, backend="reference")
    return patch("infini_attention.models.attention.infini_attention", slow)


def refuse_a_mask(module: Any, positional: Any, arguments: dict[str, Any]) -> None:
    """Stops where SDPA would get a mask, (length x length), and lose its fast kernels."""
    if arguments["attention_mask"] is not None:
        sys.exit(f"the base model made a mask of shape {tuple(arguments['attention_mask'].shape)}")


def random_ids(length: int, device: str | torch.device) -> Tensor:
    return torch.randint(SMOLLM2["vocab_size"], (1, length), device=device)


def measured(
    system: str,
    attention: str,
    step: Step,
    *,
    length: int,
    segment_length: int,
    device: str,
    seconds: float,
    graphed: bool = False,
) -> Row:
    """A row; at half the length, and so on down to a segment, while memory does not suffice."""
    row: Row = {"system": system, "attention": attention}
    while length >= segment_length:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        try:
            with sdpa_kernel(SDPA[attention]) if attention in SDPA else nullcontext():
                row |= timed(step, random_ids(length, device), seconds, graphed)
            break
        except torch.OutOfMemoryError:
            print(f"{system}: out of memory at {length:,} tokens", file=sys.stderr)
        length = length // 2 // segment_length * segment_length
    print(row, file=sys.stderr, flush=True)
    return row


def timed(step: Step, ids: Tensor, seconds: float, graphed: bool) -> Row:
    for _ in range(2):  # kernels are compiled, and memory is set aside
        step(ids)
    if ids.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    if graphed:
        step = captured(step, ids)
    runs: list[float] = []
    end = time.perf_counter() + seconds
    while not runs or (len(runs) < MOST_STEPS and time.perf_counter() < end):
        runs.append(seconds_of(step, ids))
    median = statistics.median(runs)
    row = {"length": ids.shape[1], "steps": len(runs), "seconds": median}
    row["tokens_per_second"] = ids.shape[1] / median
    if ids.is_cuda:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
        row["busy_seconds"] = busy_seconds_of(step, ids)
    return row


def busy_seconds_of(step: Step, ids: Tensor) -> float:
    """Time of a step's kernels alone: what a host that is quick enough would make of it."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step(ids)
        torch.cuda.synchronize()
    kernels = (event for event in found.key_averages() if event.device_type == DeviceType.CUDA)
    return sum(kernel.self_device_time_total for kernel in kernels) / 1e6


def captured(step: Step, ids: Tensor) -> Step:
    """The step over these `ids` as one graph; its memory is its own while it exists."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # as capture asks for
        step(ids)
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(ids)
    return lambda _: graph.replay()


def seconds_of(step: Step, ids: Tensor) -> float:
    if not ids.is_cuda:
        begin = time.perf_counter()
        step(ids)
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    step(ids)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def with_ratios(rows: list[Row]) -> list[Row]:
    """`rows`, with their speed and memory in units of each rival's; the package's of the same rule."""
    by_name: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: (row.get("length", 0), row.get("tokens_per_second", 0))):
        by_name[row["system"]] = row  # the quickest is the last
    for row in rows:
        for rival in RIVALS:
            name = f"package {row['system'].split()[-1]}" if rival == "package" else rival
            other = by_name.get(name, row)
            for key in ("tokens_per_second", "peak_bytes"):
                if other["system"] != row["system"] and key in row and key in other:
                    row[f"{key}_over_{rival}"] = row[key] / other[key]
    return rows


def table(report: Row) -> Table:
    ratios = [f"x {rival}" for rival in RIVALS]
    columns = "", "attention", "tokens", "ms busy", "ms a step", "tokens/s", *ratios, "peak GB", *ratios
    title = "A step of training, {length:,} tokens: {layers} layers, segments of {segment_length:,}, {dtype}"
    kinds = "".join(f", {kind}" for kind in ("trained", "compiled", "graphed") if report[kind])
    result = Table(*columns, title=title.format(**report) + kinds)
    for row in report["rows"]:
        if "length" not in row:
            result.add_row(row["system"], row["attention"], "out of memory")
            continue
        busy = f"{row['busy_seconds'] * 1e3:,.1f}" if "busy_seconds" in row else ""
        figures = [f"{row['length']:,}", busy, f"{row['seconds'] * 1e3:,.1f}"]
        for key, unit, digits in (("tokens_per_second", 1, 0), ("peak_bytes", 1e9, 1)):
            figures.append(f"{row[key] / unit:,.{digits}f}" if key in row else "")
            for rival in RIVALS:
                ratio = row.get(f"{key}_over_{rival}")
                figures.append("" if ratio is None else f"{ratio:.2f}")
        result.add_row(row["system"], row["attention"], *figures)
    return result


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
