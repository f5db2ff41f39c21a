"""What a stream costs at any length: reading, decoding, restoring, and how many sessions fit.

    python benchmarks/stream.py
    python benchmarks/stream.py --parts '[read, decode]' --contexts '[1000, 100000]' --device cpu --layers 4

The model has the shape of SmolLM2-135M, fresh weights and bf16; contexts are random ids, read in full by
`Session.feed`.

- read: tokens a second up to the first generated token, peak memory beyond the weights, and the time from a
  compact file (`Session.load`) to a first token, by context
- decode: greedy steps of `Session.generate` by context, of a captured graph on a GPU: percentiles over more
  than a whole segment, so that ends of segments are among them
- compiled: the same with `Decoder(compiled=True)`, which goes through `torch.compile` first
- peers: one token of transformers' `generate` for the base model with full attention, eager and with a
  compiled static cache, at 4,096 tokens; and eager with a sliding window of a segment
- sessions: sequences that decode side by side in one `Decoder`, at 16 places of their segments, as many as
  fit, at segment lengths 512 and 2048

The last line printed is JSON. What fails is named with its error.
"""

import contextlib
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonargparse
import torch
from common import SMOLLM2, environment
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.families import InfiniLlamaConfig, InfiniLlamaForCausalLM
from infini_attention.streaming import Decoder, Session

SHAPE = {**SMOLLM2, "eos_token_id": None}
PEER_CONTEXT, PEER_TOKENS = 4096, 32
PLACES = 16  # of the segment, at which sessions side by side are
PARTS = ["read", "decode", "sessions", "compiled", "peers"]

Row = dict[str, Any]


def main(
    parts: list[str] = PARTS,
    contexts: list[int] = [1_000, 8_192, 100_000, 1_000_000, 10_000_000],  # noqa: B006
    layers: int = 30,
    segment_length: int = 2048,
    session_rows: dict[int, int] = {512: 4096, 2048: 1280},  # noqa: B006
    device: str = "cuda",
) -> None:
    """Measures, part by part.

    Args:
        parts: which.
        contexts: tokens, ascending.
        layers: of the model.
        segment_length: tokens a segment.
        session_rows: sessions to try to hold, by segment length; a tenth fewer until they fit.
        device: cuda or cpu.
    """
    torch.manual_seed(0)
    bench = Bench(device, layers, segment_length, contexts)
    runs: dict[str, Callable[[], None]] = {
        "read": bench.read,
        "decode": bench.decode,
        "sessions": lambda: bench.hold_sessions(session_rows),
        "compiled": bench.compiled,
        "peers": bench.peers,
    }
    for part in parts:
        try:
            runs[part]()
        except Exception as error:
            bench.add(part=part, error=f"{type(error).__name__}: {str(error)[:300]}")
    report = {"benchmark": "stream", "segment_length": segment_length, "layers": layers, "rows": bench.rows}
    report |= environment(device)
    Console(width=150).print(table(bench.rows))
    print(json.dumps(report))


class Bench:
    """The model, and the rows that come out."""

    def __init__(self, device: str, layers: int, segment_length: int, contexts: list[int]) -> None:
        self.device, self.layers, self.segment_length, self.contexts = (
            device,
            layers,
            segment_length,
            contexts,
        )
        self.rows: list[Row] = []
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))
        self.model = self.fresh(segment_length)
        self.sessions: dict[int, Session] = {}

    def add(self, **row: Any) -> None:
        self.rows.append(row)
        print(row, file=sys.stderr, flush=True)

    def fresh(self, segment_length: int) -> Any:
        config = InfiniLlamaConfig(
            **SHAPE, num_hidden_layers=self.layers, segment_length=segment_length, gate_init=-4.0
        )
        return InfiniLlamaForCausalLM(config).to(self.device, torch.bfloat16).eval()

    def ids(self, length: int) -> torch.Tensor:
        return torch.randint(0, SHAPE["vocab_size"], (length,))

    # --- parts

    def read(self) -> None:
        for context in sorted({*self.contexts[:2], self.contexts[-1] % 100_000 + 100_000}):  # kernels compile
            warm = Session(self.model, self.tokenizer)
            warm.feed(self.ids(context))
            list(warm.generate(max_new_tokens=3))
            self.restored(warm)
        self.free()
        for context in self.contexts:
            base = self.allocated()
            session = Session(self.model, self.tokenizer)
            ids = self.ids(context)
            with self.measured() as seconds:
                session.feed(ids)
                next(session.generate(max_new_tokens=1))
            row = {"part": "read", "context": context, "tokens_per_second": context / seconds()}
            row |= {"peak_bytes": self.peak() - base, "state_bytes": session.info().state_bytes}
            self.sessions[context] = session
            self.add(**row, **self.restored(session))

    def restored(self, session: Session) -> Row:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "a.state"
            size = session.save(path)
            exact = session.save(Path(folder) / "b.state", exact=True)
            with self.measured() as seconds:
                loaded = Session.load(path, self.model, self.tokenizer)
                next(loaded.generate(max_new_tokens=1))
            return {"file_bytes": size, "exact_file_bytes": exact, "first_token_seconds": seconds()}

    def decode(self) -> None:
        for context, session in self.sessions.items():
            self.add(part="decode", context=context, **self.latencies(session, self.segment_length + 100))

    def latencies(self, session: Session, steps: int) -> Row:
        steps = steps if self.device == "cuda" else 40
        stream = session.fork().generate(max_new_tokens=steps + 20, do_sample=False, eos_token_id=None)
        for _ in range(10):
            next(stream)
        times = []
        for _ in range(steps):
            begin = time.perf_counter()
            next(stream)
            times.append(time.perf_counter() - begin)
        stream.close()
        return percentiles(times)

    def compiled(self) -> None:
        session = Session(self.model, self.tokenizer, decoder=Decoder(self.model, compiled=True))
        session.feed(self.ids(PEER_CONTEXT))
        with self.measured() as seconds:
            list(session.generate(max_new_tokens=3, eos_token_id=None))
        first = seconds()
        row = self.latencies(session, 400)
        self.add(part="compiled", context=PEER_CONTEXT, compile_seconds=first, **row)

    def peers(self) -> None:
        base = {**SHAPE, "num_hidden_layers": self.layers}
        full = LlamaForCausalLM(LlamaConfig(**base)).to(self.device, torch.bfloat16).eval()
        window = MistralConfig(**base, sliding_window=self.segment_length)
        sliding = MistralForCausalLM(window).to(self.device, torch.bfloat16).eval()
        for name, model, settings in (
            ("full attention, eager", full, {}),
            ("sliding window, eager", sliding, {}),
            ("infini, transformers' generate", self.model, {}),
            ("full attention, compiled static cache", full, {"cache_implementation": "static"}),
        ):
            try:
                self.add(part="peers", system=name, context=PEER_CONTEXT, **self.generated(model, settings))
            except Exception as error:
                self.add(part="peers", system=name, error=f"{type(error).__name__}: {str(error)[:300]}")

    def generated(self, model: Any, settings: Row) -> Row:
        """Seconds a token: a generation's time less that of one token, after warming up."""
        ids = self.ids(PEER_CONTEXT)[None].to(self.device)

        def seconds_of(tokens: int) -> float:
            with self.measured() as seconds:
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    min_new_tokens=tokens,
                    max_new_tokens=tokens,
                    do_sample=False,
                    pad_token_id=0,
                    **settings,
                )
            return seconds()

        compiling = seconds_of(PEER_TOKENS + 1)
        runs = [seconds_of(PEER_TOKENS + 1) - seconds_of(1) for _ in range(3)]
        return {"median_ms": 1e3 * statistics.median(runs) / PEER_TOKENS, "compile_seconds": compiling}

    def hold_sessions(self, session_rows: dict[int, int]) -> None:
        self.sessions.clear()
        for segment_length, rows in session_rows.items():
            self.free()
            model = self.fresh(int(segment_length))
            while rows:
                try:
                    self.add(part="sessions", segment=int(segment_length), **self.held(model, rows))
                    break
                except torch.OutOfMemoryError:
                    rows = rows * 9 // 10
                self.free()

    def held(self, model: Any, rows: int) -> Row:
        """Sessions with texts of their own, at places spread over the segment, that decode side by side."""
        before = self.allocated()
        decoder = Decoder(model, rows)
        size = decoder.buffers.segment_length
        guests = [_Guest() for _ in range(rows)]
        caches = []
        for place in range(PLACES):
            caches.append(InfiniCache(model.config))
            ids = self.ids(size + 1 + place * (size - 16) // PLACES)[None].to(self.device)
            with torch.inference_mode():
                model(ids, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: caches[-1]})
        for row, guest in enumerate(guests):
            decoder.seat(row, guest, caches[row % PLACES])
        ids = self.ids(rows).tolist()
        decoder.step(dict(enumerate(ids)))
        times = []
        for _ in range(8):
            with self.measured() as seconds:
                decoder.step(dict(enumerate(ids))).argmax(-1).tolist()
            times.append(seconds())
        return {
            "sessions": rows,
            "bytes_a_session": decoder.row_nbytes,
            "used_bytes": self.peak() - before,
            "tokens_per_second": rows / statistics.median(times),
            **percentiles(times),
        }

    # --- measuring

    @contextlib.contextmanager
    def measured(self) -> Iterator[Callable[[], float]]:
        self.wait()
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        end = [0.0]
        yield lambda: end[0] - begin
        self.wait()
        end[0] = time.perf_counter()

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else 0

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def free(self) -> None:
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


class _Guest:
    def take_back(self, cache: InfiniCache) -> None:
        """Nobody wants it."""


def percentiles(times: list[float]) -> Row:
    ordered = sorted(1e3 * seconds for seconds in times)
    return {
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[int(0.99 * (len(ordered) - 1))],
        "max_ms": ordered[-1],
        "steps": len(ordered),
    }


def table(rows: list[Row]) -> Table:
    names = ["part", "system", "context", "segment", "sessions"]
    scaled = {
        "tokens_per_second": ("tokens/s", 1),
        "median_ms": ("median ms", 1),
        "p99_ms": ("p99 ms", 1),
        "max_ms": ("max ms", 1),
        "peak_bytes": ("peak MB", 1e6),
        "state_bytes": ("state MB", 1e6),
        "file_bytes": ("file MB", 1e6),
        "first_token_seconds": ("restore s", 1),
        "used_bytes": ("used GB", 1e9),
    }
    result = Table(*names, *(title for title, _ in scaled.values()))
    for row in rows:
        if "error" in row:
            result.add_row(row["part"], f"{row.get('system', '')} {row['error']}")
            continue
        cells = [f"{row[name]:,}" if isinstance(row.get(name), int) else row.get(name, "") for name in names]
        cells += [f"{row[key] / unit:,.3f}" if key in row else "" for key, (_, unit) in scaled.items()]
        result.add_row(*cells)
    return result


if __name__ == "__main__":
    jsonargparse.auto_cli(main, as_positional=False)
