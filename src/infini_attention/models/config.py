"""The configuration fields that a family's own config gains."""

import math
from dataclasses import dataclass
from typing import Any

from infini_attention.ops.infini import EMPTY_MEMORY, memory_map
from infini_attention.ops.local import context_tokens
from infini_attention.ops.options import check_choice


@dataclass(kw_only=True)
class InfiniConfigMixin:
    """Fields of every `infini_*` config; they come on top of those of the family's own config.

    Attributes:
        segment_length: N, tokens a segment.
        update_rule: "linear" or "delta".
        feature_map: a name of `infini_attention.ops.feature_maps`.
        normalization: of what memory answers: "sum", "root", "none" or "unit"; see
            `infini_attention.ops.infini_attention`.
        empty_memory: "local" or "gated"; see `infini_attention.ops.infini_attention`.
        local_attention: what a token attends to beside the memory: "segment", its own, as in the paper;
            "sliding", the whole segment before it too, which is not read from the memory then; or "sink", the
            text's first tokens too. See `infini_attention.ops.infini_attention`.
        sink_tokens: how many those are, at most segment_length; of no meaning but for "sink".
        short_convolution: how many tokens, a token and those just before it, every query and
            every key is a learned mixture of, at most segment_length; 0 for queries and keys as in the paper.
            See `ops.convolution`.
        infini_layers: indices of the layers that have a memory. None stands for every full-attention layer
            and every sliding-window layer whose window is at least what local attention sees, which is
            `segment_length` and what it sees outside (such a window never bites); the list that this comes to
            replaces it.
        gate_init: initial logit of every head's gate. 0 for training from scratch; well below 0 keeps a
            retrofitted model close to its base.

    Raises:
        ValueError: a value that cannot be right; the text names it and the remedy.
    """

    segment_length: int = 2048
    update_rule: str = "linear"
    feature_map: str = "elu1"
    normalization: str = "sum"
    empty_memory: str = "local"
    local_attention: str = "segment"
    sink_tokens: int = 4
    short_convolution: int = 0
    infini_layers: list[int] | None = None
    gate_init: int | float = 0.0

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        if self.infini_layers is None:
            self.infini_layers = [layer for layer in range(self._layers) if self._can_have_memory(layer)]
        # `strict` runs validators too, but wraps what they raise in an exception that is no ValueError.
        self.validate_infini()

    def validate_infini(self) -> None:
        """Raise ValueError for fields that cannot be right."""
        if self.segment_length < 1:
            raise ValueError(f"segment_length is {self.segment_length}; give a whole number of at least 1")
        memory_map(self.update_rule, self.feature_map, self.normalization)
        check_choice("empty_memory", self.empty_memory, EMPTY_MEMORY)
        _ = self.context_tokens
        if self.short_convolution < 0 or self.short_convolution == 1:
            raise ValueError(
                f"short_convolution is {self.short_convolution}; give 0 for none, or at least 2 tokens, say 8"
            )
        if self.short_convolution > self.segment_length:
            raise ValueError(
                f"short_convolution is {self.short_convolution}, more than segment_length, "
                f"{self.segment_length}; give at most that"
            )
        if not math.isfinite(self.gate_init):
            raise ValueError(f"gate_init is {self.gate_init}; give a finite logit, such as -4.0")
        if getattr(self, "use_bidirectional_attention", None):
            raise ValueError(
                "use_bidirectional_attention is set, and a memory of the past is causal by nature; "
                "set use_bidirectional_attention=False"
            )
        self._check_layers()

    @property
    def layers_without_memory(self) -> list[int]:
        """Layers that keep keys and values of their own."""
        return sorted(set(range(self._layers)) - set(self.infini_layers or []))

    def check_every_layer_has_memory(self) -> None:
        """Raise ValueError where a layer keeps keys and values of its own, so that a state would grow."""
        if lacking := self.layers_without_memory:
            raise ValueError(
                f"layers {lacking} have no memory and keep keys and values of their own, which grow; "
                "retrofit all layers (layers=None, and a segment_length of at most their sliding window)"
            )

    @property
    def context_tokens(self) -> int:
        """Tokens outside its own segment that local attention sees; ValueError for what cannot be right."""
        return context_tokens(
            self.local_attention, segment_length=self.segment_length, sink_tokens=self.sink_tokens
        )

    @property
    def local_attention_name(self) -> str:
        """Local attention as reports name it: "segment", "sliding", or such as "4 sinks"."""
        return f"{self.sink_tokens} sinks" if self.local_attention == "sink" else self.local_attention

    def layer_type(self, layer: int) -> str:
        """What the family calls the attention of `layer`: "full_attention", or "sliding_attention"."""
        layer_types = getattr(self, "layer_types", None)
        return "full_attention" if layer_types is None else str(layer_types[layer])

    @property
    def _layers(self) -> int:
        return self.num_hidden_layers  # type: ignore[attr-defined]

    def _check_layers(self) -> None:
        layers = self.infini_layers or []
        if not layers:
            raise ValueError(
                f"no layer would have a memory: every layer's sliding window is shorter than {self._seen}, "
                "or infini_layers is empty; name layers, or choose a segment_length of at most the window"
            )
        if len(set(layers)) < len(layers) or not all(0 <= layer < self._layers for layer in layers):
            raise ValueError(
                f"infini_layers is {layers}; name each layer once, as a number from 0 to {self._layers - 1}"
            )
        for layer in layers:
            if not self._can_have_memory(layer):
                raise ValueError(
                    f"layer {layer} has a sliding window of {self._window(layer)} tokens, shorter than "
                    f"{self._seen}; leave it out of the layers, or choose a segment_length of at most its "
                    "window"
                )

    def _can_have_memory(self, layer: int) -> bool:
        window = self._window(layer)
        return window is None or window >= self.segment_length + self.context_tokens

    @property
    def _seen(self) -> str:
        """What local attention sees at most, in words."""
        outside = self.context_tokens
        beside = f" and the {outside} tokens that {self.local_attention!r} sees outside" if outside else ""
        return f"segment_length {self.segment_length}{beside}"

    def _window(self, layer: int) -> int | None:
        """The sliding window of `layer` in tokens; None where attention is full."""
        if getattr(self, "layer_types", None) is not None and self.layer_type(layer) != "sliding_attention":
            return None
        return getattr(self, "sliding_window", None)


def convolved_channels(config: Any) -> int:
    """Channels that a layer's short convolution has: those of all queries and keys of a token."""
    return (config.num_attention_heads + config.num_key_value_heads) * head_dim_of(config)


def head_dim_of(config: Any) -> int:
    """Width of a head; some families' configs do not name it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
