"""InfiniCache: what a model carries from call to call, of fixed size in every layer that has a memory."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin

from infini_attention.models.config import InfiniConfigMixin
from infini_attention.ops import MemoryState
from infini_attention.ops.state import chosen
from infini_attention.ops.step import StepBuffers


@dataclass(frozen=True)
class Reading:
    """Whole segments that a layer has read in a step of a training, for the next step to read again.

    Attributes:
        before: the state that they came after; None at the start.
        hidden: SG(h) of their tokens as attention meets them, (batch, length, hidden_size).
        ended: (batch,) bool on the CPU: rows whose text is over, of which nothing is kept; None for none.
    """

    before: MemoryState | None
    hidden: Tensor
    ended: Tensor | None = None

    def select(self, rows: Tensor) -> "Reading":
        """The given rows, in the given order; `rows` is (n,) integer."""
        return Reading(
            before=None if self.before is None else self.before.select(rows),
            hidden=chosen(self.hidden, rows),
            ended=None if self.ended is None else self.ended[rows],
        )


HELD = ("state", "seen", "keeps_readings", "reading", "again")  # by a layer with a memory


class InfiniCacheLayer(CacheLayerMixin):
    """One layer's MemoryState, and how many tokens it has been given, padding included.

    Attributes:
        state: that after the last token; None before the first.
        seen: tokens so far.
        keeps_readings: whether `reading` is wanted.
        reading: what the last call has read, where it was whole segments.
        again: what the next call first reads again, and goes on from in place of `state`: gradients then
            reach the key and value projections through what that leaves.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MemoryState | None = None
        self.seen = 0
        self.keeps_readings = False
        self.reading: Reading | None = None
        self.again: Reading | None = None

    def contents(self) -> dict[str, Any]:
        """All that it holds, as `fill` takes it."""
        return {name: getattr(self, name) for name in HELD}

    def fill(self, contents: dict[str, Any]) -> None:
        """Hold what `contents` gave."""
        for name in HELD:
            setattr(self, name, contents[name])

    def advance(self, state: MemoryState, tokens: int) -> None:
        """Take over the `state` after `tokens` more tokens."""
        self.state = state
        self.seen += tokens

    def get_seq_length(self) -> int:
        """Tokens seen, padding included."""
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """What an ordinary full-attention layer would say, so that masks for such layers come out right."""
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        """-1: any length."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.state = None
        self.seen = 0
        self.forget_readings()

    def forget_readings(self) -> None:
        """Go on from the state alone."""
        self.reading = self.again = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the given rows, in the given order."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, in the given order."""
        self.forget_readings()
        if self.state is not None:
            self.state = self.state.select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, side by side."""
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing to prepare: the first `advance` brings the state."""

    def update(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A memory keeps no keys and values of the past to hand out."""
        raise ValueError("a layer with a memory takes a state, not keys and values; use advance()")

    def crop(self, *args: Any) -> NoReturn:
        """A memory cannot forget its last tokens."""
        raise ValueError(
            "crop() cannot take tokens back out of a memory; keep a copy.deepcopy(cache) from before them"
        )


class InfiniCache(DynamicCache):
    """A cache for `infini_*` models: a MemoryState for every layer that has a memory, keys and values else.

    Pass it to forward or `generate` to go on where an earlier call stopped. `get_seq_length()` counts tokens
    seen, padding included, so an attention mask has that many columns before those of the new tokens.
    `copy.deepcopy` makes an independent copy.

    Args:
        config: the model's config.

    Raises:
        ValueError: the config of a model without a memory.
    """

    def __init__(self, config: Any) -> None:
        if not isinstance(config, InfiniConfigMixin):
            raise ValueError(
                f"InfiniCache was given a {type(config).__name__}; give the config of an infini_* model"
            )
        super().__init__(config=config)  # type: ignore[arg-type]
        for layer in config.infini_layers or []:
            self.layers[layer] = InfiniCacheLayer()

    def copy(self) -> "InfiniCache":
        """A cache that goes on from the same states, which it shares until they are replaced; cheap."""
        twin = copy.copy(self)
        twin.layers = [copy.copy(layer) for layer in self.layers]
        return twin

    def detach(self) -> "InfiniCache":
        """A cache with the same states, cut off from the graph that made them."""
        return self.map_states(lambda state: state.detach())

    def without_readings(self) -> "InfiniCache":
        """A cache that goes on from the states alone, which it shares, and reads nothing again."""
        twin = self.copy()
        layers: list[Any] = twin.layers
        for layer in layers:
            if isinstance(layer, InfiniCacheLayer):
                layer.forget_readings()
        return twin

    def map_states(self, function: Callable[[MemoryState], MemoryState]) -> "InfiniCache":
        """A cache with `function` of every state, which leaves this one as it is."""
        twin = self.copy()
        layers: list[Any] = twin.layers
        for layer in layers:
            if isinstance(layer, InfiniCacheLayer) and layer.state is not None:
                layer.state = function(layer.state)
        return twin

    def to(self, device: torch.device | str) -> "InfiniCache":
        """Move every tensor to `device`, in place."""
        layers: list[Any] = self.layers
        for layer in layers:
            if isinstance(layer, InfiniCacheLayer):
                layer.state = None if layer.state is None else layer.state.to(device)
                layer.forget_readings()
            elif layer.is_initialized:
                layer.keys, layer.values = layer.keys.to(device), layer.values.to(device)
        return self

    def recent(self, layer: int) -> Tensor | None:
        """What a layer's next token looks back at; None without a convolution, or where nothing was seen."""
        layers: list[Any] = self.layers
        state = layers[layer].state
        return None if state is None else state.open_recent

    @property
    def nbytes(self) -> int:
        """Size of all states in bytes."""
        return sum(_layer_nbytes(layer) for layer in self.layers)


class InfiniStepCache(InfiniCache):
    """A cache of fixed shapes for steps of one token a row; every layer has a memory.

    A forward call with it takes (rows, 1) ids, changes `buffers` in place and plans nothing on the host: it
    can be captured or compiled. The caller marks active rows and commits segments; see `ops.step`.

    Args:
        config: the model's config.
        buffers: the rows' states. Set `width` to the places of open segments to look at, if not all.

    Raises:
        ValueError: the config of a model with layers that have no memory.
    """

    def __init__(self, config: Any, buffers: StepBuffers) -> None:
        super().__init__(config)
        config.check_every_layer_has_memory()
        self.buffers = buffers
        self.width: int | None = None

    def recent(self, layer: int) -> Tensor | None:
        """What a layer's next token looks back at; None without a convolution."""
        return self.buffers.open_recent[layer] if self.buffers.open_recent.numel() else None


def _layer_nbytes(layer: Any) -> int:
    if isinstance(layer, InfiniCacheLayer):
        return 0 if layer.state is None else layer.state.nbytes
    return sum(tensor.nbytes for tensor in (layer.keys, layer.values) if tensor is not None)
