"""A short convolution over time: what stands just before a token, over the ends of segments too."""

import torch
from torch import Tensor

from infini_attention.ops.state import state_dtype


def short_convolution(
    x: Tensor,
    weight: Tensor,
    recent: Tensor | None,
    *,
    document_positions: Tensor | None = None,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every channel's own mixture of a token and those just before it.

        y_t = sum_{j = 0}^{width - 1} weight_j x_{t - j}, where x is 0 before its sequence begins

    Args:
        x: (batch, length, channels).
        weight: (channels, width); weight[:, 0] is for the token itself.
        recent: the last width - 1 real tokens of each row before `x`, (batch, width - 1, channels); None at
            the start.
        document_positions: of each token in its own document, (length,), where documents are packed.
        padding_mask: (batch, length) bool, True = a real token; None when all are.

    Returns:
        y, (batch, length, channels) in x's dtype, of no meaning at padding; and what was seen, `recent` and
        the real tokens after it, (batch, width - 1 + length, channels), for `recent_after`.
    """
    before = weight.shape[1] - 1
    if recent is None:
        recent = x.new_zeros(x.shape[0], before, x.shape[2])
    weight = weight.to(state_dtype(x.dtype))
    earlier, seen = _look_back(x, recent.to(x.dtype), padding_mask)
    output = x * weight[:, 0]
    for back in range(1, before + 1):
        share = weight[:, back]
        if document_positions is not None:
            share = torch.where((document_positions >= back)[:, None], share, 0)
        output = torch.addcmul(output, earlier[back - 1], share)
    return output.to(x.dtype), seen


def recent_after(seen: Tensor, before: int, tokens: Tensor) -> Tensor:
    """The `before` tokens up to each row's `tokens` (batch,) of a call, (batch, before, channels)."""
    if len(alike := set(tokens.tolist())) == 1:
        return seen.narrow(1, alike.pop(), before).clone()  # no view, which would keep all of it alive
    places = tokens.to(seen.device)[:, None] + torch.arange(before, device=seen.device)
    return _taken(seen, places)


def _look_back(x: Tensor, recent: Tensor, padding_mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """For 1, 2, ... tokens back, what real token stood there, each like `x`; and what was seen, in order."""
    before, length = recent.shape[1], x.shape[1]
    if padding_mask is None:
        seen = torch.cat([recent, x], dim=1)
        return [seen[:, before - back :][:, :length] for back in range(1, before + 1)], seen
    real = padding_mask.to(x.device)
    order = real.int().argsort(dim=1, descending=True, stable=True)  # real tokens first
    seen = torch.cat([recent, _taken(x, order)], dim=1)
    places = before + real.cumsum(dim=1) - 1
    return [_taken(seen, (places - back).clamp(min=0)) for back in range(1, before + 1)], seen


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """(batch, n, channels) and (batch, m) to (batch, m, channels): each row's tokens at its places."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
