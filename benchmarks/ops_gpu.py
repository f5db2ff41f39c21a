"""What the memory costs on a GPU, in units of segment-local attention alone.

    python benchmarks/ops_gpu.py
    python benchmarks/ops_gpu.py --part training

Shapes, operations and bytes are printed from the code. The floor of every ratio is segment-local attention
alone, SDPA with the cuDNN backend and the segments as batch: the mean of one measurement before and one after
the rows that are compared with it, in one process. Times are medians of `triton.testing.do_bench`; ours and
the floor, up to 128K tokens, also as the replay of a CUDA graph, which leaves out what the CPU needs to
launch kernels. Nothing is timed before the fused kernels agree with the reference in fp64: outputs in
training and in inference, and gradients. The last line printed is JSON.
"""

import json
import statistics
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, Literal

import jsonargparse
import torch
import torch.nn.functional as F
from common import environment
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

from infini_attention.ops import infini_attention

N = 2048
SHAPES = {"8/8x128": (8, 8, 128), "32/8x128": (32, 8, 128), "9/3x64": (9, 3, 64)}
PAPER = "8/8x128"
LENGTHS = {"32K": 2**15, "128K": 2**17, "1M": 2**20}
TOLERANCE = 2e-2  # of bf16 results against fp64, in the norm
FLOOR = "local alone (floor)"
MEMORY = {FLOOR: 0, "infini linear": 2, "infini delta": 3}  # products of a token with a d x d matrix, forward

Tensors = dict[str, Tensor]
Row = dict[str, Any]


def main(
    part: Literal["all", "inference", "training", "peers"] = "all",
    shapes: list[str] = list(SHAPES),  # noqa: B006
    seconds: float = 0.15,
) -> None:
    """Times forward, and forward with backward.

    Args:
        part: which rows.
        shapes: query and key/value heads and their size, of those listed in the code: `'[9/3x64]'`.
        seconds: how long each is repeated; at least once.
    """
    torch.manual_seed(0)
    check()
    rows: list[Row] = []
    if part in ("all", "inference"):
        rows += inference(shapes, seconds)
    if part in ("all", "training"):
        rows += training(shapes, seconds)
    if part in ("all", "peers"):
        rows += peers(seconds)
    report = {"benchmark": "ops_gpu", "segment_length": N, "dtype": "bfloat16", "rows": rows, **environment()}
    Console(width=150).print(table(rows))
    print(json.dumps(report))


def check() -> None:
    """Stops unless the fused kernels agree with the reference, on outputs and every gradient."""
    for update_rule in ("linear", "delta"):
        tensors = inputs(3 * 256, *SHAPES[PAPER])
        settings = {"segment_length": 256, "update_rule": update_rule}
        for number, (ours, exact) in enumerate(
            zip(
                gradients(tensors, backend="triton", **settings),
                gradients(
                    {k: x.detach().double() for k, x in tensors.items()}, backend="reference", **settings
                ),
                strict=True,
            )
        ):
            error = ((ours.double() - exact).norm() / exact.norm()).item()
            if not error <= TOLERANCE:
                sys.exit(f"{update_rule}: result {number} is off by {error:.1e}; nothing was timed")


def inference(shapes: list[str], seconds: float) -> list[Row]:
    """Forward, without gradients."""
    rows = []
    for shape in shapes:
        for name, length in LENGTHS.items():
            if shape != PAPER and name == "32K":
                continue
            tensors = inputs(length, *SHAPES[shape])
            with torch.no_grad():
                group = [floor_row(shape, name, tensors, seconds, "forward")]
                for update_rule in ("linear", "delta"):
                    call = ours(tensors, update_rule)
                    group.append(measured(f"infini {update_rule}", shape, name, "forward", call, seconds))
                group.append(floor_row(shape, name, tensors, seconds, "forward"))
            rows += with_ratios(group)
    return rows


def training(shapes: list[str], seconds: float) -> list[Row]:
    """Forward with backward, eager and as a graph."""
    rows = []
    for shape in shapes:
        for name in ("32K", "128K"):
            tensors = inputs(LENGTHS[name], *SHAPES[shape])
            group = [floor_row(shape, name, tensors, seconds, "forward+backward")]
            for update_rule in ("linear", "delta"):
                step = backward_of(ours(tensors, update_rule), list(tensors.values()))
                label = f"infini {update_rule}"
                group.append(measured(label, shape, name, "forward+backward", step, seconds))
            group.append(floor_row(shape, name, tensors, seconds, "forward+backward"))
            rows += with_ratios(group)
    return rows


def peers(seconds: float) -> list[Row]:
    """Other ways to attend to as much, with the paper's heads."""
    rows = []
    for name, length in LENGTHS.items():
        tensors = inputs(length, *SHAPES[PAPER])
        with torch.no_grad():
            rows += compared(name, tensors, "forward", seconds)
        if name == "32K":
            rows += compared(name, tensors, "forward+backward", seconds)
    return rows


def compared(name: str, tensors: Tensors, what: str, seconds: float) -> list[Row]:
    """The floor and every contender; one that fails is named with its error and left out."""
    rows = [floor_row(PAPER, name, tensors, seconds, what)]
    for label, call in contenders(name, tensors).items():
        try:
            step = call if what == "forward" else backward_of(call, list(tensors.values()))
            rows.append(measured(label, PAPER, name, what, step, seconds))
        except Exception as error:
            print(f"{label}, {name}, {what}: {type(error).__name__}: {str(error)[:200]}")
    return with_ratios([*rows, floor_row(PAPER, name, tensors, seconds, what)])


def contenders(name: str, tensors: Tensors) -> dict[str, Callable[[], Tensor]]:
    """What to time at this length; what is not installed is left out, in words."""
    q, k, v = tensors["local_query"], tensors["local_key"], tensors["value"]

    def full(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        return call

    calls = {"full causal, cuDNN": full(SDPBackend.CUDNN_ATTENTION)}
    if name != "1M":
        calls["full causal, flash"] = full(SDPBackend.FLASH_ATTENTION)
        calls["parallel, eager"] = ours(tensors, "linear", backend="parallel")
        calls["parallel, compiled"] = compiled(tensors)
        calls["local, flex (Triton)"] = flex_local(tensors)
        calls |= linear_attention(tensors)
    if name == "32K":
        calls["the paper's loop"] = ours(tensors, "linear", backend="reference")
        calls |= peer_layer(tensors)
    return calls


def compiled(tensors: Tensors) -> Callable[[], Tensor]:
    def function(**given: Tensor) -> Tensor:
        return infini_attention(**given, segment_length=N, backend="parallel")[0]

    call = torch.compile(function)
    return lambda: call(**tensors)


def flex_local(tensors: Tensors) -> Callable[[], Tensor]:
    """Segment-local attention by a Triton kernel of the usual kind: the yardstick for fusing into one."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, N, N)
    call = torch.compile(flex_attention)
    return lambda: call(
        *(segments(tensors[name]) for name in ("local_query", "local_key", "value")), block_mask=mask
    )


def linear_attention(tensors: Tensors) -> dict[str, Callable[[], Tensor]]:
    if find_spec("fla") is None:
        print("flash-linear-attention is not installed: pip install fla-core")
        return {}
    q, k, v = (tensors[name].transpose(1, 2) for name in ("query", "key", "value"))

    def call() -> Tensor:
        from fla.ops.linear_attn import chunk_linear_attn

        return chunk_linear_attn(q, k, v, normalize=False)[0]

    return {"fla chunk_linear_attn": call}


def peer_layer(tensors: Tensors) -> dict[str, Callable[[], Tensor]]:
    """PyPI infini-transformer-pytorch's attention layer, its projections included, segment by segment."""
    if find_spec("infini_transformer_pytorch") is None:
        print("the peer is not installed: pip install infini-transformer-pytorch==0.2.1")
        return {}
    from infini_transformer_pytorch.infini_transformer import CausalAttention

    heads, _, head_dim = SHAPES[PAPER]
    layer = CausalAttention(heads * head_dim, dim_head=head_dim, heads=heads).cuda().bfloat16()
    hidden = tensors["query"].transpose(1, 2).flatten(2)

    def call() -> Tensor:
        memories, outputs = None, []
        for piece in hidden.split(N, dim=1):
            output, _, memories = layer(piece, past_memories=memories, return_new_memories=True)
            outputs.append(output)
        return torch.cat(outputs, dim=1)

    return {"infini-transformer-pytorch layer": call}


def inputs(length: int, heads: int, kv_heads: int, head_dim: int) -> Tensors:
    """Random tokens as projections make them, (1, length, heads, head_dim) in memory."""

    def randn(heads: int) -> Tensor:
        tensor = torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        return tensor.transpose(1, 2).requires_grad_()

    tensors = {name: randn(heads) for name in ("query", "local_query")}
    tensors |= {name: randn(kv_heads) for name in ("key", "local_key", "value")}
    return tensors | {"gate": torch.zeros(heads, device="cuda", requires_grad=True)}


def ours(tensors: Tensors, update_rule: str, backend: str = "triton") -> Callable[[], Tensor]:
    return lambda: infini_attention(**tensors, segment_length=N, update_rule=update_rule, backend=backend)[0]


def gradients(tensors: Tensors, **settings: Any) -> list[Tensor]:
    """The output without gradients and with them, and every gradient."""
    with torch.no_grad():
        inferred, _ = infini_attention(**tensors, **settings)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    output, state = infini_attention(**leaves, **settings)
    total = output.double().square().sum() + state.memory.double().sum()
    return [inferred, output, *torch.autograd.grad(total, list(leaves.values()))]


def segments(x: Tensor) -> Tensor:
    """(1, heads, length, dim) to (length / N, heads, N, dim), without a copy."""
    return x.unflatten(2, (-1, N)).transpose(1, 2).flatten(0, 1)


def floor_row(shape: str, name: str, tensors: Tensors, seconds: float, what: str) -> Row:
    def local() -> Tensor:
        q, k, v = (segments(tensors[name]) for name in ("local_query", "local_key", "value"))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )

    if what == "forward":
        return measured(FLOOR, shape, name, what, local, seconds)
    used = [tensors[name] for name in ("local_query", "local_key", "value")]
    return measured(FLOOR, shape, name, what, backward_of(local, used), seconds)


def backward_of(call: Callable[[], Tensor], tensors: list[Tensor]) -> Callable[[], Any]:
    gradient = torch.randn_like(call())
    return lambda: torch.autograd.grad(call(), tensors, gradient, allow_unused=True)


def measured(label: str, shape: str, name: str, what: str, call: Callable[[], Any], seconds: float) -> Row:
    """Milliseconds, peak memory beyond what was there, and what formulas say."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    once = seconds_of(call)
    extra = torch.cuda.max_memory_allocated() - before
    eager = once * 1e3 if once > 1 else do_bench(call, 25, 1000 * seconds, return_mode="median")
    row = {"system": label, "heads": shape, "length": name, "pass": what, "ms": eager, "extra_bytes": extra}
    if label in MEMORY and name != "1M":
        row["graph_ms"] = do_bench(captured(call).replay, 25, 1000 * seconds, return_mode="median")
    row |= formulas(label, shape, name, what)
    if "flop" in row:
        row["tflops"] = row["flop"] / row.get("graph_ms", eager) / 1e9
    print(row, file=sys.stderr, flush=True)
    return row


def with_ratios(rows: list[Row]) -> list[Row]:
    """`rows` with their ratios to the mean of the floors among them."""
    floors = [row for row in rows if row["system"] == FLOOR]
    for row in rows:
        for key, ratio in (("ms", "ratio"), ("graph_ms", "graph_ratio"), ("extra_bytes", "memory_ratio")):
            if row["system"] != FLOOR and key in row:
                row[ratio] = row[key] / statistics.mean(floor[key] for floor in floors)
    return rows


def formulas(label: str, shape: str, name: str, what: str) -> Row:
    """Operations, 2d(N + 2d), 2d(N + 3d) or 2dN a token and head, and bytes of the tensors of tokens.

    Bytes count what goes through device memory where local attention is a kernel of its own: q, k, v and the
    output for attention; for the memory also k, v, q and local attention's output once more, and the output.
    The backward pass is taken as 2.5 times the operations and twice the bytes.
    """
    heads, kv_heads, d = SHAPES[shape]
    length = LENGTHS[name]
    memory = MEMORY.get(label)
    if label.startswith("full"):
        flop = 2 * d * length * length * heads
    elif memory is None:
        return {}
    else:
        flop = 2 * d * (N + memory * d) * length * heads
    tensors = (
        (2 * heads + 2 * kv_heads) if memory == 0 or label.startswith("full") else (5 * heads + 4 * kv_heads)
    )
    factor = 1 if what == "forward" else 3.5
    return {"flop": factor * flop, "bytes": tensors * length * d * 2 * (1 if what == "forward" else 3)}


def seconds_of(call: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def captured(call: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def table(rows: list[Row]) -> Table:
    columns = (
        "heads",
        "length",
        "pass",
        "system",
        "ms",
        "x floor",
        "graph ms",
        "x floor",
        "TFLOP",
        "TFLOP/s",
        "GB",
        "extra MB",
        "x floor",
    )
    result = Table(*columns, title=f"bf16, batch 1, N = {N}; floor: segment-local attention alone, cuDNN")
    keys = {"ms": 1, "ratio": 1, "graph_ms": 1, "graph_ratio": 1, "flop": 1e12, "tflops": 1, "bytes": 1e9}
    for row in rows:
        figures = [f"{row[key] / unit:.3f}" if key in row else "" for key, unit in keys.items()]
        memory = [
            f"{row['extra_bytes'] / 1e6:.0f}",
            f"{row['memory_ratio']:.2f}" if "memory_ratio" in row else "",
        ]
        result.add_row(row["heads"], row["length"], row["pass"], row["system"], *figures, *memory)
    return result


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
