"""Time and peak memory by length: one attention op, and a whole model, against formulas and full attention.

    python benchmarks/efficiency.py --plot out/efficiency.png
    python benchmarks/efficiency.py --device cpu --lengths '[512, 2048]' --layers 2 --segment_length 256

The op has the paper's 8 heads of 128; the model has the shape of SmolLM2-135M, fresh weights and bf16.
Training is forward and backward to a plain sum of the last hidden states, with activations checkpointed;
prefill goes in chunks with the cache; decode is the mean of some single steps after a prefill of that length.
"full" is the same with full causal attention and a key/value cache. Sizes that would not fit the time are
skipped in words. The last line printed is JSON.
"""

import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jsonargparse
import torch
import torch.nn.functional as F
from common import environment
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.families import InfiniLlamaConfig, InfiniLlamaForCausalLM
from infini_attention.ops import infini_attention

HEADS, HEAD_DIM = 8, 128
SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2**24,
}
CHUNK, STEPS = 65_536, 10

PASSES = ("forward", "forward+backward", "prefill", "decode a token", "training")

Row = dict[str, Any]


class Clock:
    """Runs a series of growing sizes until the time that is left would not do for the next."""

    def __init__(self, seconds: float, device: str) -> None:
        self.end, self.device = time.perf_counter() + seconds, device
        self.rows: list[Row] = []

    def series(self, what: str, lengths: list[int], run: Callable[[int], Row], growth: float) -> None:
        """`run(length)` returns seconds by name; time is expected to grow with length ** `growth`."""
        took, previous = 0.0, lengths[0]
        for length in lengths:
            expected = took * (length / previous) ** growth
            if time.perf_counter() + expected > self.end:
                self.rows.append({"what": what, "length": length, "note": "skipped: time budget"})
                return
            begin = time.perf_counter()
            try:
                seconds, extra = self._measured(run, length)
            except torch.OutOfMemoryError:
                self.rows.append({"what": what, "length": length, "note": "out of memory"})
                return
            took, previous = time.perf_counter() - begin, length
            for name, value in seconds.items():
                row = {"what": f"{what}: {name}", "length": length, "seconds": value} | extra
                self.rows.append(row)
                print(row, file=sys.stderr, flush=True)

    def _measured(self, run: Callable[[int], Row], length: int) -> tuple[Row, Row]:
        if self.device == "cpu":
            return run(length), {}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds = run(length)
        return seconds, {"bytes": torch.cuda.max_memory_allocated() - before}


def main(
    lengths: list[int] = [1_000, 10_000, 100_000, 1_000_000, 10_000_000],  # noqa: B006
    layers: int = 30,
    segment_length: int = 2048,
    device: str = "cuda",
    budget_seconds: float = 200,
    plot: str | None = None,
) -> None:
    """Measures, in ascending order of length.

    Args:
        lengths: tokens, ascending.
        layers: of the model.
        segment_length: tokens a segment.
        device: cuda or cpu.
        budget_seconds: of wall clock for all of it.
        plot: a PNG to draw.
    """
    torch.manual_seed(0)
    clock = Clock(budget_seconds, device)
    op_series(clock, lengths, segment_length, device)
    infini, full = models(layers, segment_length, device)
    for name, model, cache in (("infini", infini, InfiniCache), ("full", full, DynamicCache)):
        growth = 1.0 if name == "infini" else 2.0
        decode(model, cache, 2 * segment_length + 1)  # kernels are compiled
        clock.series(f"model {name}", lengths, lambda n: decode(model, cache, n), growth)  # noqa: B023
        clock.series(f"model {name}", lengths[:3], lambda n: train(model, n), growth)  # noqa: B023
    report = {
        "benchmark": "efficiency",
        "segment_length": segment_length,
        "layers": layers,
        "rows": clock.rows,
        "formulas": [formulas(length, layers, segment_length) for length in lengths],
        **environment(),
    }
    Console(width=120).print(table(report))
    if plot is not None:
        draw(report, plot)
    print(json.dumps(report))


def op_series(clock: Clock, lengths: list[int], segment_length: int, device: str) -> None:
    """One op: forward, and forward with backward."""

    def tokens(length: int, gradients: bool) -> list[torch.Tensor]:
        sizes = (1, length, HEADS, HEAD_DIM)
        made = [torch.randn(sizes, device=device, dtype=torch.bfloat16).transpose(1, 2) for _ in range(3)]
        return [tensor.requires_grad_(gradients) for tensor in made]

    gate = torch.zeros(HEADS, device=device)

    def infini(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return infini_attention(q, k, v, gate, segment_length=segment_length)[0]

    def full(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    for name, attend, growth in (("infini", infini, 1.0), ("full", full, 2.0)):

        def forward(length: int) -> Row:
            tensors = tokens(length, False)
            return {"forward": timed(lambda: attend(*tensors), device)}  # noqa: B023

        def both(length: int) -> Row:
            tensors = tokens(length, True)
            step = lambda: torch.autograd.grad(attend(*tensors).sum(), tensors)  # noqa: B023, E731
            return {"forward+backward": timed(step, device)}

        with torch.no_grad():
            clock.series(f"op {name}", lengths, forward, growth)
        clock.series(f"op {name}", lengths[:3], both, growth)


def models(layers: int, segment_length: int, device: str) -> tuple[Any, Any]:
    """The same shape with memory in every layer, and with full attention."""
    shape = {**SMOLLM2, "num_hidden_layers": layers}
    infini = InfiniLlamaForCausalLM(InfiniLlamaConfig(**shape, segment_length=segment_length, gate_init=-4.0))
    full = LlamaForCausalLM(LlamaConfig(**shape))
    return tuple(model.to(device, torch.bfloat16).eval() for model in (infini, full))


@torch.no_grad()
def prefill(model: Any, cache_class: Any, length: int) -> tuple[float, Any]:
    """Seconds to read `length` tokens in chunks, and the cache."""
    device = next(model.parameters()).device
    ids = torch.randint(0, 49152, (1, min(length, CHUNK)), device=device)
    cache = cache_class(config=model.config)

    def read() -> None:
        for first in range(0, length, CHUNK):
            piece = ids[:, : min(CHUNK, length - first)]
            hidden = model.model(piece, use_cache=True, **{CACHE_ARGUMENT: cache}).last_hidden_state
            model.lm_head(hidden[:, -1:])

    return timed(read, device.type, repeats=1), cache


@torch.no_grad()
def decode(model: Any, cache_class: Any, length: int) -> Row:
    """Seconds of a prefill of `length`, and of a token after it."""
    prefilled, cache = prefill(model, cache_class, length)
    device = next(model.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)

    def steps() -> None:
        for _ in range(STEPS):
            hidden = model.model(token, use_cache=True, **{CACHE_ARGUMENT: cache}).last_hidden_state
            token.copy_(model.lm_head(hidden[:, -1:]).argmax(-1))

    return {"prefill": prefilled, "decode a token": timed(steps, device.type, repeats=1) / STEPS}


def train(model: Any, length: int) -> Row:
    """Seconds of a forward and backward over `length` tokens, activations checkpointed."""
    device = next(model.parameters()).device
    ids = torch.randint(0, 49152, (1, length), device=device)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    try:
        step = lambda: model.model(ids, use_cache=False).last_hidden_state.sum().backward()  # noqa: E731
        return {"training": timed(step, device.type, repeats=2)}
    finally:
        model.zero_grad()
        model.gradient_checkpointing_disable()
        model.eval()


def timed(call: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """The median of some runs after a first one; a run of over 2 seconds is not repeated."""
    seconds = []
    for _ in range(repeats + (repeats > 1)):
        synchronize(device)
        begin = time.perf_counter()
        call()
        synchronize(device)
        seconds.append(time.perf_counter() - begin)
        if seconds[-1] > 2:
            return seconds[-1]
    kept = sorted(seconds[repeats > 1 :])
    return kept[len(kept) // 2]


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def formulas(length: int, layers: int, segment_length: int) -> Row:
    """Operations of the op's forward, 2d(N + 2d) and 2dL / 2 a token and head; bytes the model carries."""
    d, kv_heads = HEAD_DIM, SMOLLM2["num_key_value_heads"]
    head = SMOLLM2["hidden_size"] // SMOLLM2["num_attention_heads"]
    seen = min(segment_length, length)
    state = layers * kv_heads * (2 * 4 * head * (head + 1) + 2 * 2 * head * (length % segment_length))
    return {
        "length": length,
        "op_flop_infini": 2 * d * (seen + 2 * d) * length * HEADS,
        "op_flop_full": 2 * d * length * length * HEADS,
        "state_bytes": state,
        "cache_bytes": layers * kv_heads * 2 * 2 * head * length,
    }


def table(report: Row) -> Table:
    lengths = sorted({row["length"] for row in report["rows"]})
    result = Table(
        "", *(f"{length:,}" for length in lengths), title="milliseconds (peak MB beyond what was there)"
    )
    for what in dict.fromkeys(row["what"] for row in report["rows"]):
        cells = {row["length"]: cell(row) for row in report["rows"] if row["what"] == what}
        result.add_row(what, *(cells.get(length, "") for length in lengths))
    for name, unit, scale in (
        ("op_flop_infini", "formula: op infini, TFLOP", 1e12),
        ("op_flop_full", "formula: op full, TFLOP", 1e12),
        ("state_bytes", "formula: state of the model, MB", 1e6),
        ("cache_bytes", "formula: key/value cache, MB", 1e6),
    ):
        result.add_row(unit, *(f"{row[name] / scale:,.3g}" for row in report["formulas"]))
    return result


def cell(row: Row) -> str:
    if "note" in row:
        return row["note"]
    memory = f" ({row['bytes'] / 1e6:,.0f})" if "bytes" in row else ""
    return f"{row['seconds'] * 1e3:,.2f}{memory}"


def draw(report: Row, path: str) -> None:
    """Time and memory by length, log-log; infini solid, full attention dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 5))
    colours = dict(zip(PASSES, plt.cm.tab10.colors, strict=False))
    for what in dict.fromkeys(row["what"] for row in report["rows"]):
        rows = [row for row in report["rows"] if row["what"] == what and "seconds" in row]
        style = "--" if " full" in what else "-"
        marks = {"linestyle": style, "marker": "o", "color": colours[what.split(": ")[1]], "label": what}
        left.plot([row["length"] for row in rows], [row["seconds"] for row in rows], **marks)
        sized = [row for row in rows if row.get("bytes")]
        right.plot([row["length"] for row in sized], [row["bytes"] for row in sized], **marks)
    for axis, label in ((left, "seconds"), (right, "peak bytes beyond inputs and weights")):
        if axis.lines and any(len(line.get_xdata()) for line in axis.lines):
            axis.set(xscale="log", yscale="log")
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.suptitle(
        f"One op of 8 heads of 128, and a model of SmolLM2-135M's shape: {report['device']}, bf16"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
