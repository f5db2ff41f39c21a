"""Time and peak memory by length: one attention op, and a whole model, against formulas and full attention.

    python benchmarks/efficiency.py --plot out/efficiency.png
    python benchmarks/efficiency.py --device cpu --lengths '[512, 2048]' --layers 2 --segment_length 256

The op has the paper's 8 heads of 128; the model has the shape of SmolLM2-135M, fresh weights and bf16.

- training: forward and backward of the sum of the last hidden states, without the vocabulary's logits;
  activations are checkpointed from 100,000 tokens on
- prefill: the prompt and its last token's logits; with memory in chunks of 65,536 tokens, with full attention
  in one piece, because later chunks would need a mask and lose the fast kernels
- decode: greedy, the median of 20 single tokens; a key/value cache is filled with noise, since what is in it
  does not change its speed

"full" is the same with full causal attention. Times are medians of 5 after a first run, which alone counts
where it takes over 2 seconds. Memory is the peak beyond the models' weights: inputs, cache and gradients
count. What would not fit the time is skipped in words. The last line printed is JSON.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jsonargparse
import torch
import torch.nn.functional as F
from common import SMOLLM2, environment
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.families import InfiniLlamaConfig, InfiniLlamaForCausalLM
from infini_attention.ops import infini_attention

HEADS, HEAD_DIM = 8, 128
MODEL_HEAD_DIM = SMOLLM2["hidden_size"] // SMOLLM2["num_attention_heads"]
CHUNK, STEPS, REPEATS, CHECKPOINTED_FROM = 65_536, 20, 5, 100_000
SINGLE_SHOT = 2.0  # seconds

PASSES = ("forward", "forward+backward", "training", "prefill", "decode a token")

Row = dict[str, Any]


class Meter:
    """Times calls, and takes their peak memory beyond what there was when the meter was made."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.rows: list[Row] = []
        if device == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            self.base = torch.cuda.memory_allocated()

    def time(self, what: str, call: Callable[[], Any], *, repeats: int = REPEATS) -> Row:
        """Add a row: the median of some runs after a first one, or that one if it takes long."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        first = self._seconds(call)
        runs = [first] if first > SINGLE_SHOT else sorted(self._seconds(call) for _ in range(repeats))
        row = {"pass": what, "seconds": runs[len(runs) // 2], "runs": len(runs)}
        if self.device == "cuda":
            row["bytes"] = torch.cuda.max_memory_allocated() - self.base
        self.rows.append(row)
        return row

    def _seconds(self, call: Callable[[], Any]) -> float:
        self._wait()
        begin = time.perf_counter()
        call()
        self._wait()
        return time.perf_counter() - begin

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


class Task(NamedTuple):
    """Something to measure at a length, and the passes that it measures, in order."""

    passes: tuple[str, ...]
    run: Callable[[Meter, int], None]


def main(
    lengths: list[int] = [1_000, 10_000, 100_000, 1_000_000, 10_000_000],  # noqa: B006
    layers: int = 30,
    segment_length: int = 2048,
    device: str = "cuda",
    budget_seconds: float = 200,
    plot: str | None = None,
) -> None:
    """Measures, with memory first, in ascending order of length.

    Args:
        lengths: tokens, ascending.
        layers: of the model.
        segment_length: tokens a segment.
        device: cuda or cpu.
        budget_seconds: of wall clock for all of it.
        plot: a PNG to draw.
    """
    end = time.perf_counter() + budget_seconds
    torch.manual_seed(0)
    infini, full = models(layers, segment_length, device)
    systems: dict[str, tuple[float, list[Task]]] = {
        "infini": (1.0, [*op_tasks(infini_op(segment_length)), trains(infini), reads_and_decodes(infini)]),
        "full": (2.0, [*op_tasks(full_op), trains(full), decodes_full(full), reads_full(full)]),
    }
    rows: list[Row] = []
    for system, (growth, tasks) in systems.items():
        for task in tasks:  # kernels are compiled, for lengths that are divisible by 16 and that are not
            for length in (2 * segment_length + 1, 2 * segment_length + 16):
                task.run(Meter(device), length)
        series = [Series(task, growth, device, end) for task in tasks]
        for length in lengths:
            for one in series:
                for row in one.measure(length):
                    rows.append({"system": system, "length": length, **row})
                    print(rows[-1], file=sys.stderr, flush=True)
    report = {
        "benchmark": "efficiency",
        "segment_length": segment_length,
        "layers": layers,
        "rows": rows,
        "formulas": [formulas(length, layers, segment_length) for length in lengths],
        **environment(device),
    }
    Console(width=140).print(table(report))
    if plot is not None:
        draw(report, plot)
    print(json.dumps(report))


class Series:
    """One task at growing lengths, until the time left or the memory would not do for the next."""

    def __init__(self, task: Task, growth: float, device: str, end: float) -> None:
        self.task, self.growth, self.device, self.end = task, growth, device, end
        self.last: tuple[int, float] | None = None
        self.stopped: str | None = None

    def measure(self, length: int) -> list[Row]:
        """The rows of this length; a pass that could not be measured has a note in place of figures."""
        if self.stopped is None and time.perf_counter() + self._expected(length) > self.end:
            self.stopped = "skipped: time budget"
        meter = Meter(self.device)
        if self.stopped is None:
            try:
                self.task.run(meter, length)
                self.last = length, max(row["seconds"] for row in meter.rows)
            except torch.OutOfMemoryError:
                self.stopped = "out of memory"
        missing = self.task.passes[len(meter.rows) :]
        return meter.rows + [{"pass": what, "note": self.stopped} for what in missing]

    def _expected(self, length: int) -> float:
        """Seconds, taking time to grow with length ** growth."""
        if self.last is None:
            return 0.0
        previous, seconds = self.last
        once = seconds * (length / previous) ** self.growth
        return once if once > SINGLE_SHOT else (1 + REPEATS) * once


def infini_op(segment_length: int) -> Callable[..., torch.Tensor]:
    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        gate = torch.zeros(HEADS, device=query.device)
        return infini_attention(query, key, value, gate, segment_length=segment_length)[0]

    return attend


def full_op(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def op_tasks(attend: Callable[..., torch.Tensor]) -> list[Task]:
    """Forward, and forward with backward."""

    def tokens(meter: Meter, length: int, gradients: bool) -> list[torch.Tensor]:
        sizes = (1, length, HEADS, HEAD_DIM)
        made = [torch.randn(sizes, device=meter.device, dtype=torch.bfloat16) for _ in range(3)]
        return [tensor.transpose(1, 2).requires_grad_(gradients) for tensor in made]

    @torch.no_grad()
    def forward(meter: Meter, length: int) -> None:
        tensors = tokens(meter, length, False)
        meter.time("op: forward", lambda: attend(*tensors))

    def both(meter: Meter, length: int) -> None:
        tensors = tokens(meter, length, True)
        meter.time("op: forward+backward", lambda: torch.autograd.grad(attend(*tensors).sum(), tensors))

    return [Task(("op: forward",), forward), Task(("op: forward+backward",), both)]


def models(layers: int, segment_length: int, device: str) -> tuple[Any, Any]:
    """The same shape with memory in every layer, and with full attention."""
    shape = {**SMOLLM2, "num_hidden_layers": layers}
    infini = InfiniLlamaForCausalLM(InfiniLlamaConfig(**shape, segment_length=segment_length, gate_init=-4.0))
    full = LlamaForCausalLM(LlamaConfig(**shape))
    return tuple(model.to(device, torch.bfloat16).eval() for model in (infini, full))


def trains(model: Any) -> Task:
    def train(meter: Meter, length: int) -> None:
        ids = random_ids(length, meter.device)
        if length >= CHECKPOINTED_FROM:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()

        def step() -> None:
            model.zero_grad()
            model.model(ids, use_cache=False).last_hidden_state.sum().backward()

        try:
            row = meter.time("model: training", step)
            row["checkpointed"] = length >= CHECKPOINTED_FROM
        finally:
            model.zero_grad()
            model.gradient_checkpointing_disable()
            model.eval()

    return Task(("model: training",), train)


def reads_and_decodes(model: Any) -> Task:
    """Prefill in chunks, and single tokens with the state that it leaves."""

    @torch.no_grad()
    def read_and_decode(meter: Meter, length: int) -> None:
        ids = random_ids(min(length, CHUNK), meter.device)
        cache = InfiniCache(model.config)

        def read() -> None:
            cache.reset()
            for start in range(0, length, CHUNK):
                hidden = last_hidden(model, ids[:, : length - start], cache)
            model.lm_head(hidden)

        row = meter.time("model: prefill", read)
        row["carried_bytes"] = cache.nbytes
        meter.time("model: decode a token", greedy_step(model, cache), repeats=STEPS)

    return Task(("model: prefill", "model: decode a token"), read_and_decode)


def reads_full(model: Any) -> Task:
    @torch.no_grad()
    def read_full(meter: Meter, length: int) -> None:
        ids = random_ids(length, meter.device)
        meter.time(
            "model: prefill",
            lambda: model.lm_head(last_hidden(model, ids, DynamicCache(config=model.config))),
        )

    return Task(("model: prefill",), read_full)


def decodes_full(model: Any) -> Task:
    @torch.no_grad()
    def decode_full(meter: Meter, length: int) -> None:
        cache = DynamicCache(config=model.config)
        sizes = (1, SMOLLM2["num_key_value_heads"], length, MODEL_HEAD_DIM)
        for layer in range(model.config.num_hidden_layers):
            noise = torch.randn(sizes, device=meter.device, dtype=torch.bfloat16)
            cache.update(noise, noise.clone(), layer)
        carried = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        row = meter.time("model: decode a token", greedy_step(model, cache), repeats=STEPS)
        row["carried_bytes"] = carried

    return Task(("model: decode a token",), decode_full)


def random_ids(length: int, device: str) -> torch.Tensor:
    return torch.randint(0, SMOLLM2["vocab_size"], (1, length), device=device)


def last_hidden(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    """The last token's hidden state, (1, 1, hidden_size), without keeping the others."""
    output = model.model(ids, use_cache=True, **{CACHE_ARGUMENT: cache})
    return output.last_hidden_state[:, -1:].clone()


def greedy_step(model: Any, cache: Any) -> Callable[[], None]:
    token = torch.zeros(1, 1, dtype=torch.int64, device=model.device)

    def step() -> None:
        token.copy_(model.lm_head(last_hidden(model, token, cache)).argmax(-1))

    return step


def formulas(length: int, layers: int, segment_length: int) -> Row:
    """The op's operations, forward, 2d(N + 2d) and 2dL a token and head; bytes that the model carries."""
    d, kv_heads, head_dim = HEAD_DIM, SMOLLM2["num_key_value_heads"], MODEL_HEAD_DIM
    sums = 2 * 4 * head_dim * (head_dim + 1)  # M and z, committed and pending, fp32
    open_segment = 2 * 2 * head_dim * (length % segment_length)
    return {
        "length": length,
        "op_flop_infini": 2 * d * (min(segment_length, length) + 2 * d) * length * HEADS,
        "op_flop_full": 2 * d * length * length * HEADS,
        "state_bytes": layers * kv_heads * (sums + open_segment),
        "cache_bytes": layers * kv_heads * 2 * 2 * head_dim * length,
    }


def table(report: Row) -> Table:
    lengths = [row["length"] for row in report["formulas"]]
    title = "milliseconds (peak MB beyond weights)"
    result = Table("", "", *(f"{length:,}" for length in lengths), title=title)
    names = {(row["pass"], row["system"]): None for row in report["rows"]}
    for what, system in sorted(names, key=lambda name: pass_order(name[0])):
        cells = {
            row["length"]: cell(row)
            for row in report["rows"]
            if (row["pass"], row["system"]) == (what, system)
        }
        result.add_row(what, system, *(cells[length] for length in lengths))
    result.add_section()
    for what, system, key, scale in (
        ("formula: op forward, TFLOP", "infini", "op_flop_infini", 1e12),
        ("", "full", "op_flop_full", 1e12),
        ("formula: carried by the model, MB", "infini", "state_bytes", 1e6),
        ("", "full", "cache_bytes", 1e6),
    ):
        result.add_row(what, system, *(f"{row[key] / scale:,.3g}" for row in report["formulas"]))
    return result


def pass_order(name: str) -> int:
    return PASSES.index(name.split(": ")[1])


def cell(row: Row) -> str:
    if "note" in row:
        return row["note"]
    memory = f" ({row['bytes'] / 1e6:,.0f})" if "bytes" in row else ""
    return f"{row['seconds'] * 1e3:,.2f}{memory}"


def draw(report: Row, path: str) -> None:
    """Time and memory by length, log-log; infini solid, full attention dashed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed, and nothing was drawn: pip install matplotlib", file=sys.stderr)
        return

    figure = Figure(figsize=(13, 5), layout="constrained")
    panels = figure.subplots(1, 2)
    for axis, key, label in zip(
        panels, ("seconds", "bytes"), ("seconds", "peak bytes beyond weights"), strict=True
    ):
        for what, system in {(row["pass"], row["system"]): None for row in report["rows"]}:
            found = [
                row for row in report["rows"] if (row["pass"], row["system"]) == (what, system) and key in row
            ]
            style = {"linestyle": "-" if system == "infini" else "--", "color": f"C{pass_order(what)}"}
            points = [row["length"] for row in found], [row[key] for row in found]
            if found:
                axis.loglog(*points, marker="o", label=f"{what}, {system}", **style)
        axis.set(xlabel="tokens", ylabel=label)
        axis.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    device = report["device"]
    figure.suptitle(f"One op of 8 heads of 128, and a model of SmolLM2-135M's shape: {device}, bf16")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    jsonargparse.auto_cli(main)
