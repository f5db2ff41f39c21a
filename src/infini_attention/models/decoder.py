"""Decoder: many sequences decode side by side, one token a row, in steps of constant shape and time."""

import threading
import weakref
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_attention.models.cache import InfiniCache, InfiniCacheLayer, InfiniStepCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.config import convolved_channels, head_dim_of
from infini_attention.models.interrupts import uninterrupted
from infini_attention.ops.step import StepBuffers

WARM_UPS = 3  # runs before a step is captured, as torch asks for
WIDTH_STEP = 128  # on the CPU, open segments are looked at up to a multiple of so many places


class Committed(NamedTuple):
    """What a sequence's layers know as of its last whole segment.

    Attributes:
        memory: (layers, kv_heads, feature_dim, value_dim).
        normalizer: (layers, kv_heads, feature_dim).
        recent: what short convolutions look back at, (layers, width - 1, channels); None without them.
        context_key: what local attention sees outside a segment, (layers, kv_heads, context, head_dim); None,
            as its values, where it sees nothing there.
        context_value: (layers, kv_heads, context, value_dim).
        earlier_memory: `memory` without the segment that is seen; None where local attention does not slide.
        earlier_normalizer: `normalizer` without it.
    """

    memory: Tensor
    normalizer: Tensor
    recent: Tensor | None = None
    context_key: Tensor | None = None
    context_value: Tensor | None = None
    earlier_memory: Tensor | None = None
    earlier_normalizer: Tensor | None = None


class Guest(Protocol):
    """Whoever has a sequence in a row: gets its state back when the row is wanted for another."""

    def take_back(self, cache: InfiniCache) -> None:
        """Take over the sequence's state."""

    def fall_back(self, whole: Committed) -> None:
        """A step failed, and of the sequence's state there is left what was at its last whole segment."""


class Decoder:
    """Buffers for `rows` sequences, and the model's step over them.

    On a GPU the step is captured as a CUDA graph, once, and anew where a sequence takes a row and the weights
    have moved; they stay where they are while any is in one. On a CPU it runs as it is. `compiled=True` puts
    it through `torch.compile` first, on either: the first step then takes minutes and later ones less time.
    Guests and the model are held by weak references: a sequence that nobody holds any more leaves its row
    free. `lock` is for those who need several calls to belong together, in programs of several threads.

    Args:
        model: an `infini_*` language model in evaluation mode, with a memory in every layer.
        rows: sequences at most.
        compiled: whether to use `torch.compile`.

    Raises:
        ValueError: a model that cannot step, or no rows.
    """

    def __init__(self, model: PreTrainedModel, rows: int = 1, *, compiled: bool = False) -> None:
        if rows < 1:
            raise ValueError(f"rows is {rows}; give at least 1")
        self.rows = rows
        self.compiled = compiled
        self.lock = threading.RLock()
        self._model = weakref.ref(model)
        with torch.inference_mode(False):  # or only inference mode could change them
            self.buffers = _buffers(model, rows)
            self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=model.device)
        self._cache = InfiniStepCache(model.config, self.buffers)
        self._guests: list[weakref.ref[Guest] | None] = [None] * rows
        self._lengths = [0] * rows  # tokens that each row's sequence has seen
        # Not the bound method, through which a decoder would hold itself, and its buffers outlive their use.
        self._forward: Any = torch.compile(Decoder._step, dynamic=False) if compiled else Decoder._step
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captured_weights: list[int] = []
        self._logits = torch.empty(0)

    @property
    def model(self) -> PreTrainedModel:
        """Whose steps these are; RuntimeError when nobody holds it any more."""
        model = self._model()
        if model is None:
            raise RuntimeError("the decoder's model is gone; keep a reference to it")
        return model

    def fits(self, model: PreTrainedModel) -> bool:
        """Whether these are steps of `model`, on its device and in its dtype."""
        keys = self.buffers.local_key
        return self._model() is model and keys.device == model.device and keys.dtype == model.dtype

    def guest(self, row: int) -> Guest | None:
        """Whose sequence is in `row`; None if nobody's."""
        reference = self._guests[row]
        return None if reference is None else reference()

    def free_row(self) -> int | None:
        """A row without a guest; None if all are taken."""
        return next((row for row in range(self.rows) if self.guest(row) is None), None)

    def seat(self, row: int, guest: Guest, cache: InfiniCache) -> None:
        """Put `guest`'s sequence, the only one in `cache`, into `row`; who was there gets its state back."""
        with self.lock:
            if self._graph is not None and self._captured_weights != self._weights():
                self._graph = None
            occupant = self.guest(row)
            if occupant is not None:
                self.release(row, occupant)
            states = [layer.state for layer in cache.layers if isinstance(layer, InfiniCacheLayer)]
            self.buffers.load(row, [state for state in states if state is not None])
            self._lengths[row] = cache.get_seq_length()
            self._guests[row] = weakref.ref(guest)

    def release(self, row: int, guest: Guest) -> None:
        """Give the sequence in `row` back to `guest`, if it is there, and free the row."""
        with self.lock:
            if self.guest(row) is guest:
                guest.take_back(self._cache_of(row))
                self._guests[row] = None

    @property
    def row_nbytes(self) -> int:
        """Size of one row's state in bytes."""
        return self.buffers.nbytes // self.rows

    def committed(self, row: int) -> Committed:
        """What all layers know of `row` as of its last whole segment; copies."""
        return Committed(**{name: x[:, row].clone() for name, x in self.buffers.committed().items()})

    @torch.inference_mode()
    def step(self, ids: dict[int, int]) -> Tensor:
        """Feed one token to each of some rows, by row; returns logits (rows, vocabulary) of all rows.

        Only those of the rows that were fed mean anything. They are valid until the next step. If a step
        fails, its rows are free, and their guests fall back to their last whole segments.
        """
        with self.lock, uninterrupted():
            try:
                return self._step_rows(ids)
            except BaseException:
                for row in ids:
                    guest, self._guests[row] = self.guest(row), None
                    if guest is not None:
                        guest.fall_back(self.committed(row))
                raise

    def _step_rows(self, ids: dict[int, int]) -> Tensor:
        rows = sorted(ids)
        self._set(self._ids[:, 0], rows, [ids[row] for row in rows])
        self.buffers.active.zero_()
        self._set(self.buffers.active, rows, [True] * len(rows))
        logits = self._run(rows)
        ended = []
        for row in rows:
            self._lengths[row] += 1
            if self._lengths[row] % self.buffers.segment_length == 0:
                ended.append(row)
        if ended:
            self.buffers.commit(ended)
        return logits

    def _set(self, target: Tensor, rows: list[int], values: list[Any]) -> None:
        if rows == list(range(self.rows)):
            target.copy_(torch.tensor(values, dtype=target.dtype))
        else:
            target[torch.tensor(rows, device=target.device)] = torch.tensor(
                values, dtype=target.dtype, device=target.device
            )

    def _run(self, rows: list[int]) -> Tensor:
        if self._ids.is_cuda:
            if self._graph is None:
                self._capture()
            assert self._graph is not None
            self._graph.replay()
            return self._logits
        if not self.compiled:
            used = max(self._lengths[row] % self.buffers.segment_length for row in rows)
            self._cache.width = min(-(-(used + 1) // WIDTH_STEP) * WIDTH_STEP, self.buffers.segment_length)
        return self._forward(self)

    def _step(self) -> Tensor:
        arguments = {CACHE_ARGUMENT: self._cache, "use_cache": True}
        logits = self.model(input_ids=self._ids, **arguments).logits[:, 0]
        self.buffers.advance()
        return logits

    def _capture(self) -> None:
        """Capture the step. Warming up leaves no trace: no row is active, places in use stay as they are."""
        active = self.buffers.active.clone()
        self.buffers.active.zero_()
        stream = torch.cuda.Stream(self._ids.device)
        stream.wait_stream(torch.cuda.current_stream(self._ids.device))
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._forward(self)
        torch.cuda.current_stream(self._ids.device).wait_stream(stream)
        self._graph, self._captured_weights = torch.cuda.CUDAGraph(), self._weights()
        with torch.cuda.graph(self._graph):
            self._logits = self._forward(self)
        self.buffers.active.copy_(active)

    def _weights(self) -> list[int]:
        """Where the weights are, which is what a captured step reads."""
        return [parameter.data_ptr() for parameter in self.model.parameters()]

    def _cache_of(self, row: int) -> InfiniCache:
        """A cache of its own for the sequence in `row`."""
        cache = InfiniCache(self.model.config)
        for layer, state in zip(cache.layers, self.buffers.store(row, self._lengths[row]), strict=True):
            assert isinstance(layer, InfiniCacheLayer)
            layer.advance(state, self._lengths[row])
        return cache


def _buffers(model: PreTrainedModel, rows: int) -> StepBuffers:
    config: Any = model.config
    head_dim, convolution = head_dim_of(config), config.short_convolution
    return StepBuffers.empty(
        config.num_hidden_layers,
        rows,
        config.num_key_value_heads,
        head_dim,
        head_dim,
        segment_length=config.segment_length,
        feature_map=config.feature_map,
        local_attention=config.local_attention,
        sink_tokens=config.sink_tokens,
        recent=(convolution - 1, convolved_channels(config)) if convolution else (0, 0),
        dtype=model.dtype,
        device=model.device,
    )
