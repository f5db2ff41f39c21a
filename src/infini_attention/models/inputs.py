"""Reading transformers' masks and positions: which tokens are padding, where packed documents start."""

import torch
from torch import Tensor


def padding_of(attention_mask: Tensor | None, *, batch: int, length: int, seen: int) -> Tensor | None:
    """The mask of this call's tokens: (batch, length) bool, True = a real token; None when all are.

    `attention_mask` is (batch, seen + length), non-zero = a real token, `seen` the tokens in the cache.
    Raises ValueError for any other shape.
    """
    if attention_mask is None:
        return None
    shape = (
        tuple(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    )
    if shape != (batch, seen + length):
        raise ValueError(
            f"attention_mask is {shape}; a memory needs to know padding only, so give (batch, tokens seen "
            f"so far + new tokens) = ({batch}, {seen + length}), non-zero where a token is real"
        )
    mask = attention_mask[:, seen:] != 0
    return None if bool(mask.all()) else mask


def packed_documents(
    position_ids: Tensor | None, *, cu_seqlens: Tensor | None, padding_mask: Tensor | None, can_pack: bool
) -> Tensor | None:
    """Where packed documents start and end: (documents + 1,) as `cu_seqlens`, or None for ordinary rows.

    Documents are told by `cu_seqlens`, or by `position_ids` (batch or 1, length) that restart at 0.
    `can_pack` says whether this call could be packed at all. Raises ValueError if it is but cannot be, or if
    positions jump in any other way.
    """
    starts = None if position_ids is None else _restarts(position_ids, padding_mask)
    if cu_seqlens is None and starts is None:
        return None
    if not can_pack:
        raise ValueError(
            "cu_seq_lens_q, or position_ids that restart at 0, say that documents are packed; give them as a "
            "batch of one, without attention_mask, cache and use_cache=True, or one document a row"
        )
    if cu_seqlens is not None:
        return cu_seqlens
    assert starts is not None and position_ids is not None
    ends = starts.new_tensor([0]), starts, starts.new_tensor([position_ids.shape[1]])
    return torch.cat(ends)


def positions_of(cu_seqlens: Tensor, length: int) -> Tensor:
    """Each token's position in its own document: (1, length), from the (documents + 1,) boundaries."""
    order = torch.arange(length, device=cu_seqlens.device)
    document = torch.searchsorted(cu_seqlens.long(), order, right=True) - 1
    return (order - cu_seqlens[document]).unsqueeze(0)


def _restarts(position_ids: Tensor, padding_mask: Tensor | None) -> Tensor | None:
    """Indices at which positions restart at 0, beyond the first; None if they only count on."""
    if position_ids.shape[1] < 2:
        return None
    jumps = position_ids.diff(dim=1) != 1
    if padding_mask is not None:
        jumps = jumps & padding_mask[:, 1:] & padding_mask[:, :-1]
    if not bool(jumps.any()):
        return None
    landed = position_ids[:, 1:].expand_as(jumps)[jumps]
    if bool((landed != 0).any()):
        wrong = int(landed[landed != 0][0])
        raise ValueError(
            f"position_ids jump to {wrong}; a memory takes every token in order, so let them count on by 1, "
            "restart them at 0 for packed documents, or leave them out"
        )
    return jumps.any(dim=0).nonzero().squeeze(1) + 1
