"""What does local attention beyond the segment cost: a window that slides, or attention sinks?

    python benchmarks/local_attention.py
    python benchmarks/local_attention.py --device cuda --length 131072 --segment_length 2048 --head_dim 128

One layer's attention, `infini_attention` over random queries, keys and values, at equal segment length N, and
with a window that slides by segments of N / 2, which shows a token from N / 2 to N tokens where a segment
shows it from 1 to N. bf16 on a GPU, fp32 on a CPU. Times are the least of `repeats` interleaved runs. Nothing
is timed before the backend agrees with the reference in fp64. The last line printed is JSON.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from typing import Any

import jsonargparse
import torch
from common import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infini_attention.ops import choose_backend, infini_attention

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # against fp64, in the norm
NAMES = ("query", "local_query", "key", "local_key", "context_key", "value")


def main(
    length: int = 16_384,
    segment_length: int = 512,
    heads: int = 8,
    kv_heads: int = 4,
    head_dim: int = 64,
    sink_tokens: int = 4,
    update_rule: str = "delta",
    repeats: int = 5,
    device: str = "cpu",
    threads: int | None = None,
) -> None:
    """Times forward, and forward with backward, for each local attention.

    Args:
        length: tokens of the input.
        segment_length: N, tokens of a segment.
        heads: query heads.
        kv_heads: key/value heads.
        head_dim: width of a head.
        sink_tokens: of attention sinks.
        update_rule: linear or delta.
        repeats: runs of each, of which the fastest counts.
        device: of torch.
        threads: of torch; by default what torch takes.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    arms = {
        f"segment of {segment_length}": settings("segment", segment_length),
        f"sink of {sink_tokens}": settings("sink", segment_length, sink_tokens=sink_tokens),
        f"sliding by {segment_length}": settings("sliding", segment_length),
        f"sliding by {segment_length // 2}": settings("sliding", segment_length // 2),
    }
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    few = tokens(3 * segment_length + segment_length // 2, device=device, dtype=dtype, **shape)
    for arm in arms.values():
        arm["update_rule"] = update_rule
        check(few, arm)
    inputs = tokens(length, device=device, dtype=dtype, **shape)
    rows = timed(inputs, arms, repeats)
    report = {
        "benchmark": "local_attention",
        "length": length,
        "segment_length": segment_length,
        "update_rule": update_rule,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": choose_backend(device, dtype=dtype, head_dim=head_dim)[0],
        **shape,
        "repeats": repeats,
        "rows": rows,
        **environment(device),
    }
    Console(width=110).print(table(report))
    print(json.dumps(report))


def settings(local_attention: str, segment_length: int, **others: int) -> dict[str, Any]:
    return {"local_attention": local_attention, "segment_length": segment_length, **others}


def tokens(
    length: int, *, heads: int, kv_heads: int, head_dim: int, device: str, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Random tokens as projections make them, (1, length, heads, head_dim) in memory, and a gate."""
    generator = torch.Generator().manual_seed(0)

    def randn(count: int) -> Tensor:
        x = torch.randn(1, length, count, head_dim, generator=generator)
        return x.to(device, dtype).transpose(1, 2).requires_grad_()

    tensors = {name: randn(heads if "query" in name else kv_heads) for name in NAMES}
    return tensors | {"gate": torch.zeros(heads, device=device, requires_grad=True)}


def check(tensors: dict[str, Tensor], arm: dict[str, Any]) -> None:
    """Stop unless output and gradients are those of the reference in fp64."""
    exact = {name: x.detach().double().requires_grad_() for name, x in tensors.items()}
    results = []
    for inputs, backend in ((tensors, "auto"), (exact, "reference")):
        output = attend(inputs, arm, backend=backend)
        names = [name for name in inputs if name != "context_key" or arm["local_attention"] != "segment"]
        gradients = torch.autograd.grad(output.square().sum(), [inputs[name] for name in names])
        results.append([output, *gradients])
    for actual, expected in zip(*results, strict=True):
        error = float((actual.detach().double() - expected.detach()).norm() / expected.detach().norm())
        if not error <= TOLERANCE[tensors["query"].dtype]:
            sys.exit(f"{arm} differs from the reference by {error:.1e}; nothing was timed")


def attend(tensors: dict[str, Tensor], arm: dict[str, Any], backend: str = "auto") -> Tensor:
    given = dict(tensors)
    if arm["local_attention"] == "segment":
        del given["context_key"]
    return infini_attention(**given, **arm, backend=backend)[0]


def timed(tensors: dict[str, Tensor], arms: dict[str, dict[str, Any]], repeats: int) -> list[dict[str, Any]]:
    """Seconds and microseconds a token of each arm and pass, and how many times the first arm's that is."""

    def forward(arm: dict[str, Any]) -> None:
        with torch.no_grad():
            attend(tensors, arm)

    def both(arm: dict[str, Any]) -> None:
        attend(tensors, arm).sum().backward()

    length, rows = tensors["query"].shape[2], []
    for what, step in (("forward", forward), ("forward+backward", both)):
        least = least_times({name: (step, arm) for name, arm in arms.items()}, tensors["gate"], repeats)
        first = next(iter(least.values()))
        for name, seconds in least.items():
            row = {
                "local": name,
                "pass": what,
                "seconds": seconds,
                "microseconds_a_token": seconds / length * 1e6,
            }
            rows.append(row | {"times_the_first": seconds / first})
    return rows


def least_times(
    steps: dict[str, tuple[Callable[[dict[str, Any]], None], dict[str, Any]]], like: Tensor, repeats: int
) -> dict[str, float]:
    """The shortest of `repeats` runs of each after one to warm up, one of each in turn."""
    least = dict.fromkeys(steps, math.inf)
    for number in range(repeats + 1):
        for name, (step, arm) in steps.items():
            start = _now(like)
            step(arm)
            seconds = _now(like) - start
            least[name] = min(least[name], seconds) if number else math.inf
    return least


def _now(like: Tensor) -> float:
    if like.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def table(report: dict[str, Any]) -> Table:
    """Microseconds a token, and how many times the segment's."""
    title = "{heads}/{kv_heads} heads x {head_dim}, {length:,} tokens, {update_rule} rule, {backend}, {dtype}"
    grid = Table(title=title.format(**report), caption=report["device"], box=None)
    for name in ("local attention", "pass", "µs a token", "times the segment's"):
        grid.add_column(name, justify="left" if name in ("local attention", "pass") else "right")
    for row in report["rows"]:
        figures = f"{row['microseconds_a_token']:.3g}", f"{row['times_the_first']:.2f}"
        grid.add_row(row["local"], row["pass"], *figures)
    return grid


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
