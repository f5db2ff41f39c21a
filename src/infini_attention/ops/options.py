"""What a backend is given: checked tensors and checked settings."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from infini_attention.ops.feature_maps import FeatureMap

if TYPE_CHECKING:  # which itself checks its settings by this module
    from infini_attention.ops.state import MemoryState


@dataclass(frozen=True)
class Options:
    """Settings of one call, all checked; names as in `infini_attention`.

    `feature_map` is the one that `normalized` gives: backends need not know that one normalization scales it.
    """

    segment_length: int
    update_rule: str
    feature_map: FeatureMap
    normalization: str
    empty_memory: str
    scale: float
    softcap: float | None

    @classmethod
    def of_writing(
        cls, segment_length: int, update_rule: str, feature_map: FeatureMap, normalization: str
    ) -> "Options":
        """Where nothing is read, and the others do not matter."""
        return cls(
            segment_length=segment_length,
            update_rule=update_rule,
            feature_map=feature_map,
            normalization=normalization,
            empty_memory="local",
            scale=1.0,
            softcap=None,
        )


@dataclass(frozen=True)
class Inputs:
    """Tensors of one call, all checked, no defaults left to fill in; shapes as in `infini_attention`.

    `segment_weights` is (rows, segments) in the state's dtype, or None, or int64 where they are copies under
    the delta rule; `context_key` is None where no token sees anything outside its own segment, `local_value`
    where it is `value`, `context_value` where later segments see what local attention sees.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    local_query: Tensor
    local_key: Tensor
    local_value: Tensor | None
    context_key: Tensor | None
    context_value: Tensor | None
    gate: Tensor
    segment_weights: Tensor | None

    @property
    def seen_value(self) -> Tensor:
        """The values that local attention sees."""
        return self.value if self.local_value is None else self.local_value

    @property
    def handed_on_value(self) -> Tensor:
        """The values that it sees in later segments."""
        return self.seen_value if self.context_value is None else self.context_value

    @property
    def copies(self) -> Tensor | None:
        """The segment weights where they are copies."""
        return copies_in(self.segment_weights)

    def map(self, function: Callable[[Tensor], Tensor], segment_weights: Tensor | None) -> "Inputs":
        """`function` of every tensor of tokens, with other segment weights."""
        return Inputs(
            query=function(self.query),
            key=function(self.key),
            value=function(self.value),
            local_query=function(self.local_query),
            local_key=function(self.local_key),
            local_value=None if self.local_value is None else function(self.local_value),
            context_key=None if self.context_key is None else function(self.context_key),
            context_value=None if self.context_value is None else function(self.context_value),
            gate=self.gate,
            segment_weights=segment_weights,
        )

    def needs_gradient(self, state: "MemoryState") -> bool:
        """Whether autograd will ask for anything of this call."""
        tensors = [self.query, self.key, self.value, self.local_query, self.local_key, self.gate]
        others = self.context_key, self.context_value, self.local_value
        tensors += [each for each in others if each is not None]
        tensors += state.tensors().values()
        return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def copies_in(weights: Tensor | None) -> Tensor | None:
    """The weights where they are copies of segments, and None where they scale sums or there are none."""
    return None if weights is None or weights.is_floating_point() else weights


def check_choice(name: str, value: str, known: Sequence[str]) -> None:
    """Raise ValueError where the setting called `name` is none of those that are known."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, known))}")


def autocast_type(device: torch.device) -> str:
    """The device type whose autocast is to be switched off, or M and z would lose their precision to it.

    Tensors on "meta", of which only shapes are computed, have none; any type does for them.
    """
    return "cpu" if device.type == "meta" else device.type


_captured = False


@contextmanager
def as_captured() -> Iterator[None]:
    """Do everything here as in the capture of a CUDA graph.

    What warms up for a capture then meets its shapes: kernels are compiled for them, as they cannot be later.
    """
    global _captured
    before, _captured = _captured, True
    try:
        yield
    finally:
        _captured = before


def unreadable(x: Tensor) -> bool:
    """Whether no value of `x` may be looked at: a CUDA graph is being captured, or code is being compiled."""
    if torch.compiler.is_compiling():
        return True
    return x.is_cuda and (_captured or torch.cuda.is_current_stream_capturing())
