"""Between a model's cache of one sequence and the stacked tensors that files and snapshots hold."""

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infini_attention.models import InfiniCache
from infini_attention.models.cache import InfiniCacheLayer
from infini_attention.models.config import InfiniConfigMixin, convolved_channels, head_dim_of
from infini_attention.models.decoder import Committed
from infini_attention.ops import MemoryState, feature_maps
from infini_attention.ops.state import state_dtype
from infini_attention.streaming.state_file import OpenSegment, Shapes, Snapshot, StateContents

MOST_TAIL, MOST_SNAPSHOTS = 2**20, 1_024  # what a state file may hold
IN_MODELS_DTYPE = ("recent", "context_key", "context_value")


def check_model(model: PreTrainedModel) -> None:
    """Raise ValueError for a model that a session cannot have."""
    config: Any = model.config
    if not isinstance(config, InfiniConfigMixin):
        raise ValueError(f"{type(model).__name__} has no memory; give a model that retrofit() made")
    config.check_every_layer_has_memory()
    if model.training:
        raise ValueError("the model is in training mode; call model.eval()")


def shapes_of(model: PreTrainedModel) -> Shapes:
    """Sizes of the model's states."""
    config: Any = model.config
    head_dim = head_dim_of(config)
    return Shapes(
        layers=config.num_hidden_layers,
        kv_heads=config.num_key_value_heads,
        feature_dim=feature_maps.get(config.feature_map).feature_dim(head_dim),
        head_dim=head_dim,
        value_dim=head_dim,
        recent=max(config.short_convolution - 1, 0),
        recent_channels=convolved_channels(config) if config.short_convolution else 0,
        context=config.context_tokens,
        earlier=config.local_attention == "sliding",
        vocab_size=config.vocab_size,
        most_tail=MOST_TAIL,
        most_snapshots=MOST_SNAPSHOTS,
    )


def states_of(cache: InfiniCache) -> list[MemoryState]:
    """Each layer's state; empty before the first token."""
    return [layer.state for layer in cache.layers if isinstance(layer, InfiniCacheLayer) and layer.state]


def committed(model: PreTrainedModel, cache: InfiniCache | None) -> Committed:
    """What the cache of one sequence holds as of its last whole segment, copied; zeros for no cache."""
    states = [] if cache is None else states_of(cache)
    if not states:
        return _nothing(model)
    tensors = {}
    for name in Committed._fields:
        parts = [part[0] for state in states if (part := getattr(state, name)) is not None]
        if parts:
            # Under autocast some may be narrower than the model, to which files and buffers keep.
            dtype = model.dtype if name in IN_MODELS_DTYPE else parts[0].dtype
            tensors[name] = torch.stack(parts).to(dtype)
    return Committed(**tensors)


def _nothing(model: PreTrainedModel) -> Committed:
    """What is committed of a text before its first token."""
    shapes, dtype = shapes_of(model), state_dtype(model.dtype)
    heads = shapes.layers, shapes.kv_heads
    memory = torch.zeros(*heads, shapes.feature_dim, shapes.value_dim, dtype=dtype)
    whole = Committed(memory, memory[..., 0].clone())
    if shapes.recent:
        recent = torch.zeros(shapes.layers, shapes.recent, shapes.recent_channels, dtype=model.dtype)
        whole = whole._replace(recent=recent)
    if shapes.context:
        key, value = (
            torch.zeros(*heads, shapes.context, width, dtype=model.dtype)
            for width in (shapes.head_dim, shapes.value_dim)
        )
        whole = whole._replace(context_key=key, context_value=value)
    if shapes.earlier:
        whole = whole._replace(earlier_memory=whole.memory, earlier_normalizer=whole.normalizer)
    return whole


def committed_of(kept: Snapshot | StateContents) -> Committed:
    """What a snapshot or a file holds as of its last whole segment."""
    return Committed(**{name: getattr(kept, name) for name in Committed._fields})


def open_segment_of(cache: InfiniCache) -> OpenSegment:
    """What the cache of one sequence holds of its open segment, copied."""
    layers: dict[str, list[Tensor]] = {}
    for state in states_of(cache):
        for field in fields(OpenSegment):
            if (tensor := getattr(state, field.name)) is not None:
                layers.setdefault(field.name, []).append(tensor[0])
    return OpenSegment(**{name: torch.stack(parts) for name, parts in layers.items()})


def cache_of(
    model: PreTrainedModel,
    whole: Committed,
    *,
    tokens: int,
    opened: OpenSegment | None = None,
) -> InfiniCache:
    """A cache of one sequence of `tokens` tokens on the model's device: `committed`'s, and what is open."""
    shapes, device = shapes_of(model), model.device
    if opened is None:
        nothing = torch.zeros(shapes.layers, shapes.kv_heads, 0, shapes.head_dim, dtype=model.dtype)
        sums = torch.zeros_like(whole.memory), torch.zeros_like(whole.normalizer)
        seen_later = nothing if shapes.context else None
        opened = OpenSegment(*sums, nothing, nothing, whole.recent, seen_later)
    parts = whole._asdict() | vars(opened)
    tensors = {name: tensor.to(device) for name, tensor in parts.items() if tensor is not None}
    cache = InfiniCache(model.config)
    for number, layer in enumerate(cache.layers):
        assert isinstance(layer, InfiniCacheLayer)
        state = MemoryState(
            **{name: tensor[number, None] for name, tensor in tensors.items()},
            length=torch.tensor([tokens]),
            segment_length=model.config.segment_length,
        )
        layer.advance(state, tokens)
    return cache
