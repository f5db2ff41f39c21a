"""How fast is one attention layer on the CPU: ours, the peer's, and full attention?

    python benchmarks/ops_cpu.py
    python benchmarks/ops_cpu.py --segment_length 512 --lengths '[4096, 16384]' --threads 1

One layer of equal size each, the projections included, on the same input:

- parallel, reference: `InfiniAttention` with either backend
- peer: `CausalAttention` of PyPI infini-transformer-pytorch 0.2.1, segment by segment as its
  `InfiniTransformerWrapper` runs it: memories go from segment to segment, and in training the gradient is
  cut, and taken, after every second one. Ours goes through all segments.
- full: causal `scaled_dot_product_attention` over everything, up to `full_up_to` tokens
- local: the same inside segments alone, without a memory: the projections and the softmax attention that any
  implementation has to compute, so what its time is to the peer's bounds every ratio

Times are the least of `repeats` interleaved runs, in seconds. Nothing is timed before parallel and reference
agree on outputs and gradients. The last line printed is the same as JSON.
"""

import json
import math
import sys
import time
from collections.abc import Callable

import jsonargparse
import torch
import torch.nn.functional as F
from common import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infini_attention.layers import InfiniAttention, rotate

PEER = "infini-transformer-pytorch"
DETACH_EVERY = 2  # segments; the default of the peer's wrapper
TOLERANCE = 1e-4  # of the largest value; fp32

Step = Callable[[Tensor], Tensor]  # hidden states (1, length, width) to the same shape


def main(
    lengths: list[int] = [4096, 16384, 65536],  # noqa: B006
    segment_length: int = 2048,
    heads: int = 8,
    head_dim: int = 64,
    full_up_to: int = 16384,
    repeats: int = 3,
    threads: int | None = None,
) -> None:
    """Times forward, and forward with backward, for both update rules.

    Args:
        lengths: tokens of the inputs.
        segment_length: tokens of a segment.
        heads: attention heads; the layer is heads * head_dim wide.
        head_dim: width of a head.
        full_up_to: longest input that full attention gets; its time grows with the square.
        repeats: runs of each, of which the fastest counts.
        threads: of torch; by default what torch takes.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    sizes = {"segment_length": segment_length, "heads": heads, "head_dim": head_dim}
    for update_rule in ("linear", "delta"):
        check_equal(update_rule, **sizes)
    rows = [
        {"length": length, "update_rule": update_rule, "pass": what, "seconds": seconds}
        for length in lengths
        for update_rule in ("linear", "delta")
        for what, seconds in time_all(length, update_rule, full_up_to, repeats, **sizes).items()
    ]
    report = {"benchmark": "ops_cpu", **sizes, "repeats": repeats, "rows": rows, **environment("cpu")}
    Console(width=125).print(table(report))
    print(json.dumps(report))


def check_equal(update_rule: str, *, segment_length: int, heads: int, head_dim: int) -> None:
    """Stops unless parallel and reference agree on output and gradients of three and a half segments."""
    results = []
    for backend in ("parallel", "reference"):
        layer = ours(update_rule, backend, segment_length, heads, head_dim)
        hidden = inputs(3 * segment_length + segment_length // 2, heads * head_dim)
        output, _ = layer(hidden)
        output.square().sum().backward()
        results.append([output, hidden.grad, *(parameter.grad for parameter in layer.parameters())])
    for actual, expected in zip(*results, strict=True):
        error = (actual - expected).abs().max() / expected.abs().max()
        if not error <= TOLERANCE:
            sys.exit(f"parallel differs from reference by {error:.1e} ({update_rule}); nothing was timed")


def time_all(
    length: int,
    update_rule: str,
    full_up_to: int,
    repeats: int,
    *,
    segment_length: int,
    heads: int,
    head_dim: int,
) -> dict[str, dict[str, float]]:
    """Seconds of every contender, for both passes."""
    sizes = (segment_length, heads, head_dim)
    parallel, reference = (ours(update_rule, name, *sizes) for name in ("parallel", "reference"))
    hidden = inputs(length, heads * head_dim)
    peer = peer_layer(update_rule, heads, head_dim)
    forward = {
        "parallel": lambda: parallel(hidden),
        "reference": lambda: reference(hidden),
        "peer": lambda: run_peer(peer, hidden, segment_length, train=False),
        "local": lambda: local_attention(parallel, hidden),
        "full": lambda: full_attention(parallel, hidden),
    }
    backward = {
        "parallel": lambda: parallel(hidden)[0].sum().backward(),
        "reference": lambda: reference(hidden)[0].sum().backward(),
        "peer": lambda: run_peer(peer, hidden, segment_length, train=True),
        "local": lambda: local_attention(parallel, hidden).sum().backward(),
        "full": lambda: full_attention(parallel, hidden).sum().backward(),
    }
    if length > full_up_to:
        del forward["full"], backward["full"]
    with torch.no_grad():
        seconds = {"forward": least_times(forward, repeats)}
    return seconds | {"forward+backward": least_times(backward, repeats)}


def least_times(steps: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """The shortest of `repeats` runs of each, one of each in turn, so that a busy moment hits all alike."""
    least = dict.fromkeys(steps, math.inf)
    for _ in range(repeats):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            least[name] = min(least[name], time.perf_counter() - start)
    return least


def inputs(length: int, width: int) -> Tensor:
    return torch.randn(1, length, width, generator=torch.Generator().manual_seed(0)).requires_grad_()


def ours(update_rule: str, backend: str, segment_length: int, heads: int, head_dim: int) -> InfiniAttention:
    torch.manual_seed(0)
    return InfiniAttention(
        heads * head_dim, heads, segment_length=segment_length, update_rule=update_rule, backend=backend
    )


def full_attention(layer: InfiniAttention, hidden: Tensor) -> Tensor:
    """Causal attention over everything, by the projections and rotary positions of `layer`."""
    query, key, value = (
        project(hidden).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        for project in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    positions = torch.arange(hidden.shape[1])[None]
    query, key = (rotate(x, positions, layer.rope_theta) for x in (query, key))
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return layer.o_proj(output.transpose(1, 2).flatten(2))


def local_attention(layer: InfiniAttention, hidden: Tensor) -> Tensor:
    """`full_attention` inside each segment; whole segments only."""
    segments = hidden.unflatten(1, (-1, layer.segment_length)).squeeze(0)
    return full_attention(layer, segments).flatten(0, 1)[None]


def peer_layer(update_rule: str, heads: int, head_dim: int) -> torch.nn.Module:
    try:
        from infini_transformer_pytorch.infini_transformer import CausalAttention
    except ImportError as error:
        sys.exit(f"{error}; for the comparison: pip install {PEER}==0.2.1")
    return CausalAttention(
        heads * head_dim,
        dim_head=head_dim,
        heads=heads,
        head_gate_init_value=0.0,
        use_mem_delta_rule=update_rule == "delta",
    )


def run_peer(layer: torch.nn.Module, hidden: Tensor, segment_length: int, *, train: bool) -> None:
    memories, loss = None, 0.0
    for number, segment in enumerate(hidden.split(segment_length, dim=1), start=1):
        output, _, memories = layer(segment, past_memories=memories, return_new_memories=True)
        loss = loss + output.sum()
        if train and (number % DETACH_EVERY == 0 or number * segment_length >= hidden.shape[1]):
            loss.backward()
            memories, loss = type(memories)(*(memory.detach() for memory in memories)), 0.0


def table(report: dict) -> Table:
    """Seconds, and how many times faster parallel is."""
    title = "One layer: {heads} heads x {head_dim}, segments of {segment_length}; {threads} threads, {device}"
    grid = Table(title=title.format(**report), caption="seconds (times parallel); µs a token is parallel's")
    for name in ("tokens", "rule", "pass", "parallel", "µs a token", "peer", "local", "reference", "full"):
        grid.add_column(name, justify="left" if name in ("rule", "pass") else "right")
    for row in report["rows"]:
        seconds = row["seconds"]
        fastest = seconds["parallel"]
        others = [
            f"{seconds[name]:.3f} ({seconds[name] / fastest:.1f}x)" if name in seconds else "skipped"
            for name in ("peer", "local", "reference", "full")
        ]
        per_token = f"{fastest / row['length'] * 1e6:.1f}"
        grid.add_row(
            f"{row['length']:,}", row["update_rule"], row["pass"], f"{fastest:.3f}", per_token, *others
        )
    return grid


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
