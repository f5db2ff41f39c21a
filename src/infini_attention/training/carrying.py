"""What goes on from one optimiser step to the next: a memory, or whatever else a system carries."""

from dataclasses import asdict, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from infini_attention.baselines.linear_attention import LinearAttentionState
from infini_attention.baselines.memorizing import MemorizingState
from infini_attention.baselines.recurrent_memory import MemoryVectors
from infini_attention.baselines.state import SegmentState
from infini_attention.baselines.transformer_xl import TransformerXLState
from infini_attention.models.cache import InfiniCache, InfiniCacheLayer, Reading
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.ops import MemoryState

STATES: dict[str, type[Any]] = {
    each.__name__: each
    for each in (
        MemoryState,
        SegmentState,
        TransformerXLState,
        MemorizingState,
        MemoryVectors,
        LinearAttentionState,
    )
}


class Carried(NamedTuple):
    """What goes on of one layer.

    Attributes:
        state: of its rows; None where there is none yet.
        seen: tokens that its cache counts.
        reading: what the step has read, of a memory.
    """

    state: Any
    seen: int
    reading: Reading | None

    def select(self, rows: Tensor) -> "Carried":
        """The given rows, in the given order."""
        state, reading = self.state, self.reading
        return self._replace(
            state=None if state is None else state.select(rows),
            reading=None if reading is None else reading.select(rows),
        )


class CarriedMemory:
    """The states of a batch's rows between two steps, without the graphs that made them.

    With `read_again` a memory's last step is read again, layer by layer, before the next one goes on: what it
    left is then made by the weights of the step that reads it, and teaches the key and value projections.

    Rows go through the model in an order of their own: those that start afresh before those that go on, which
    stay as they were. Where as many do in every step, they are in the same places, for which layers can be
    compiled and steps captured.
    """

    def __init__(self, *, read_again: bool) -> None:
        self._read_again = read_again
        self._carried: list[Carried] = []  # by layer
        self._order = torch.empty(0, dtype=torch.int64)  # the batch's rows, as the states have them

    def continued(self, model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch, its rows in order, with a cache that goes on from the last step.

        Rows start afresh where `starts_document`, (rows,) bool, says so; what is returned has it no more.
        Raises ValueError where a batch has none, or has other rows than the last one; for a model that
        carries all keys; and for a baseline some of whose rows start in the midst of a segment.
        """
        cache = empty_cache(model)
        starts = inputs.get("starts_document")
        if starts is None:
            raise ValueError(
                "carry_memory is set and the batch has no starts_document, (rows,) bool; use CarriedWindows, "
                "SplitWindows or FlowingWindows, or add it to every example"
            )
        starts = self._turned(starts.cpu())
        layers: list[Any] = cache.layers
        for layer in layers:
            layer.keeps_readings = self._read_again
        if self._carried and not bool(starts.all()):
            for layer, (state, seen, reading) in zip(layers, self._carried, strict=True):
                layer.state, layer.seen = None if state is None else state.forget(starts), seen
                if self._read_again and reading is not None:
                    layer.again = replace(reading, ended=starts)
        return self._ordered(inputs) | {CACHE_ARGUMENT: cache}

    def _turned(self, starts: Tensor) -> Tensor:
        """Put rows that start afresh before the others; returns `starts` in the new order."""
        if not self._carried:
            self._order = torch.arange(len(starts))
        if len(starts) != len(self._order):
            raise ValueError(
                f"the batch has {len(starts)} rows, the memory carried to it {len(self._order)}; "
                "give batches of equal size: dataloader_drop_last=True"
            )
        starts = starts[self._order]
        places = torch.argsort(~starts, stable=True)
        if not torch.equal(places, torch.arange(len(places))):
            self._order = self._order[places]
            self._carried = [each.select(places) for each in self._carried]
        return starts[places]

    def _ordered(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The batch with its rows as the states have them, and without what says which start."""
        rows, taken = len(self._order), {key: x for key, x in inputs.items() if key != "starts_document"}
        if torch.equal(self._order, torch.arange(rows)):
            return taken
        columns = {key: x for key, x in taken.items() if isinstance(x, Tensor) and x.shape[:1] == (rows,)}
        return taken | {key: x[self._order.to(x.device)] for key, x in columns.items()}

    def keep(self, cache: InfiniCache) -> None:
        """Take over the states after a step."""
        layers: list[Any] = cache.layers
        self._carried = [
            Carried(*_kept(layer.state, layer.seen), _reading(layer.reading)) for layer in layers
        ]

    def save(self) -> dict[str, Any]:
        """What `load` takes: tensors, numbers and names only."""
        layers = [
            {
                "state": _written(state),
                "seen": seen,
                "read_after": _written(reading and reading.before),
                "read": reading and reading.hidden,
            }
            for state, seen, reading in self._carried
        ]
        return {"order": self._order, "layers": layers}

    def load(self, saved: dict[str, Any], device: torch.device) -> None:
        """Go on, on `device`, from what `save` gave."""

        def made(name: str, fields: dict[str, Any]) -> Any:
            return STATES[name](**fields).to(device) if name else None

        self._order, self._carried = saved["order"], []
        for each in saved["layers"]:
            hidden = each["read"]
            reading = None if hidden is None else Reading(made(*each["read_after"]), hidden.to(device))
            self._carried.append(Carried(made(*each["state"]), each["seen"], reading))


def empty_cache(model: Any) -> InfiniCache:
    """A cache of the model's kind; ValueError for a model that carries all keys."""
    config: Any = model.config
    if isinstance(config, InfiniConfigMixin):
        config.check_every_layer_has_memory()
    # Of the decoder, which adapters wrap.
    make = next((each.cache_class for each in model.modules() if hasattr(each, "cache_class")), None)
    cache: InfiniCache | None = None if make is None else make(config)
    if cache is None or not cache.layers or not isinstance(cache.layers[0], InfiniCacheLayer):
        raise ValueError(
            f"carry_memory is set, and a {type(config).__name__} has nothing of fixed size to carry; "
            "leave it out"
        )
    return cache


def _kept(state: Any, seen: int) -> tuple[Any, int]:
    """A state and its cache's count of tokens; a memory has its own, and masks are of one batch alone."""
    if state is None:
        return None, seen
    if isinstance(state, MemoryState):
        return state.detach().recounted(), 0
    return state.carried(), seen


def _reading(reading: Reading | None) -> Reading | None:
    """What was read, without the graph that made the state before it."""
    if reading is None or reading.before is None:
        return reading
    return replace(reading, before=reading.before.detach().recounted())


def _written(state: Any) -> tuple[str, dict[str, Any]]:
    """The name of a state's class, and its fields; nothing of None."""
    return ("", {}) if state is None else (type(state).__name__, asdict(state))
