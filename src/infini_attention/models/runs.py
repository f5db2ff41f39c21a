"""A sequence in runs of whole segments: what training keeps of it is then the states between them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutputWithPast

from infini_attention.models.cache import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.inputs import packed_documents, padding_of


def in_runs(
    model: Any,
    inputs: Tensor,
    *,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    segment_weights: Tensor | None,
    cache: Any,
    use_cache: bool | None,
    checkpoint_segments: int | None,
    detach_every: int | None,
    **kwargs: Any,
) -> BaseModelOutputWithPast:
    """The decoder's output, made a run of segments at a time; states are handed from run to run.

    A run is `checkpoint_segments` segments and goes through the model once more in the backward pass; where
    that is None, it is `detach_every` segments and does not. Gradients flow through the states from the last
    run to the first, except where `detach_every` cuts them off.

    Args:
        model: a decoder whose layers carry nothing that grows.
        inputs: (batch, length) ids, or embeddings (batch, length, hidden_size).
        attention_mask: as in the decoder's forward.
        position_ids: not used, but where they restart documents are packed, which is refused.
        segment_weights: (batch, segments) as in the decoder's forward.
        cache: a cache of its `cache_class` to go on from, which has the last states afterwards; or None.
        use_cache: whether to return one where none was given.
        checkpoint_segments: a whole number of at least 1, or None.
        detach_every: a multiple of it, or None.
        **kwargs: what else the family's forward takes.

    Raises:
        ValueError: numbers that do not divide, packed documents, or weights beside rows that are cut at
            different places.
    """
    carried = model.cache_class(model.config) if cache is None else cache.copy()
    seen, (batch, length) = carried.get_seq_length(), inputs.shape[:2]
    padding_mask = padding_of(attention_mask, batch=batch, length=length, seen=seen)
    _check(model, position_ids, padding_mask, kwargs, checkpoint_segments, detach_every)
    run_segments = checkpoint_segments or detach_every
    assert run_segments is not None
    used = _used(model._open_lengths(carried), padding_mask, segment_weights)

    def forward(
        tokens: Tensor, before: InfiniCache, weights: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, InfiniCache]:
        after = before.copy()  # the run happens twice, from the same states
        ids = {"input_ids": tokens} if inputs.dim() == 2 else {"inputs_embeds": tokens}
        settings = {"attention_mask": mask, "segment_weights": weights, "use_cache": True}
        output = model(**ids, **settings, **{CACHE_ARGUMENT: after}, **kwargs)
        return output.last_hidden_state, after

    hidden = []
    for number, run in enumerate(segment_runs(length, run_segments, model.config.segment_length, used)):
        if number:  # or the caches that checkpoints keep would hold the hidden states of every run
            carried = carried.without_readings()
        if detach_every is not None and number and number * run_segments % detach_every == 0:
            carried = carried.detach()
        columns = slice(number * run_segments, (number + 1) * run_segments)
        weights = None if segment_weights is None else segment_weights[:, columns]
        mask = None if attention_mask is None else attention_mask[:, : seen + run.stop]
        if checkpoint_segments is not None and torch.is_grad_enabled():
            output, carried = checkpoint(forward, inputs[:, run], carried, weights, mask, use_reentrant=False)
        else:
            output, carried = forward(inputs[:, run], carried, weights, mask)
        hidden.append(output)
    if cache is not None:
        cache.layers = carried.layers
    kept: dict[str, Any] = {CACHE_ARGUMENT: cache if cache is not None else carried if use_cache else None}
    return BaseModelOutputWithPast(last_hidden_state=torch.cat(hidden, dim=1), **kept)


def segment_runs(length: int, run_segments: int, segment_length: int, used: int) -> Iterator[slice]:
    """The tokens of each run of so many segments; the first finishes one that has `used` tokens already."""
    start = 0
    while start < length:
        stop = min(length, start + run_segments * segment_length - (used if start == 0 else 0))
        yield slice(start, stop)
        start = stop


def _check(
    model: Any,
    position_ids: Tensor | None,
    padding_mask: Tensor | None,
    arguments: dict[str, Any],
    checkpoint_segments: int | None,
    detach_every: int | None,
) -> None:
    for name, number in (("checkpoint_segments", checkpoint_segments), ("detach_every", detach_every)):
        if number is not None and number < 1:
            raise ValueError(f"{name} is {number}; give at least 1, or None")
    if checkpoint_segments and detach_every and detach_every % checkpoint_segments:
        raise ValueError(
            f"detach_every is {detach_every}, which is no multiple of checkpoint_segments "
            f"{checkpoint_segments}; gradients can be cut between runs only"
        )
    if model.gradient_checkpointing and model.training:
        raise ValueError(
            "layers are checkpointed already; call model.gradient_checkpointing_disable(), or leave out "
            "checkpoint_segments and detach_every"
        )
    packed = packed_documents(
        position_ids, cu_seqlens=arguments.get("cu_seq_lens_q"), padding_mask=padding_mask, can_pack=True
    )
    if packed is not None:
        raise ValueError(
            "documents are packed, and have no common segments to take in runs; give one document a row, or "
            "leave out checkpoint_segments and detach_every"
        )
    if arguments.get("output_hidden_states"):
        raise ValueError(
            "output_hidden_states=True, but runs keep no hidden states between layers; leave it out"
        )


def _used(open_lengths: Tensor | None, padding_mask: Tensor | None, segment_weights: Tensor | None) -> int:
    """Tokens of the open segment, so that runs end where segments do; 0 where rows differ."""
    used = [0] if open_lengths is None else open_lengths.tolist()
    alike = len(set(used)) == 1 and padding_mask is None
    if segment_weights is not None and not alike:
        raise ValueError(
            "segment_weights are set, and rows are padded or have open segments of different lengths, so "
            "that no run has the same segments in all rows; give rows of equal length, or no weights"
        )
    return used[0] if alike else 0
