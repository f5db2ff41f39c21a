"""A short convolution over time: what stands just before a token, as far as its segment goes."""

import torch
from torch import Tensor

from infini_attention.ops.state import state_dtype


def short_convolution(
    x: Tensor,
    weight: Tensor,
    recent: Tensor | None,
    *,
    positions: Tensor,
    padding_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Every channel's own mixture of a token and those before it in the same segment.

        y_t = sum_{j = 0}^{width - 1} weight_j x_{t - j}, without those j that are larger than t's position

    It restarts in every segment as positions do, so that a whole segment needs nothing of those before it.

    Args:
        x: (batch, length, channels).
        weight: (channels, width); weight[:, 0] is for the token itself.
        recent: the last width - 1 real tokens of each row before `x`, (batch, width - 1, channels); None at
            the start.
        positions: of each token in its own segment, (batch or 1, length) int64; see `segment_positions`.
        padding_mask: (batch, length) bool, True = a real token; None when all are.

    Returns:
        y, (batch, length, channels) in x's dtype, of no meaning at padding, and the new `recent`.
    """
    before = weight.shape[1] - 1
    if recent is None:
        recent = x.new_zeros(x.shape[0], before, x.shape[2])
    weight = weight.to(state_dtype(x.dtype))
    earlier, recent = _look_back(x, recent.to(x.dtype), padding_mask)
    output = x * weight[:, 0]
    for back in range(1, before + 1):
        visible = (positions >= back)[..., None]  # in the weight, which is smaller than x
        output = torch.addcmul(output, earlier[back - 1], torch.where(visible, weight[:, back], 0))
    return output.to(x.dtype), recent


def of_open_segment(recent: Tensor, open_length: Tensor) -> Tensor:
    """What of `recent` is in a row's open segment, of `open_length` (batch,) tokens; zeros for the rest."""
    before = torch.arange(recent.shape[1], 0, -1)
    is_open = (before <= open_length[:, None]).to(recent.device)
    return torch.where(is_open[..., None], recent, 0)


def _look_back(x: Tensor, recent: Tensor, padding_mask: Tensor | None) -> tuple[list[Tensor], Tensor]:
    """For 1, 2, ... tokens back, what real token stood there, each like `x`; and the last ones of all."""
    before, length = recent.shape[1], x.shape[1]
    if padding_mask is None:
        seen = torch.cat([recent, x], dim=1)
        return [seen[:, before - back :][:, :length] for back in range(1, before + 1)], seen[:, length:]
    real = padding_mask.to(x.device)
    order = real.int().argsort(dim=1, descending=True, stable=True)  # real tokens first
    seen = torch.cat([recent, _taken(x, order)], dim=1)
    places = before + real.cumsum(dim=1) - 1
    earlier = [_taken(seen, (places - back).clamp(min=0)) for back in range(1, before + 1)]
    return earlier, _taken(seen, real.sum(dim=1, keepdim=True) + torch.arange(before, device=x.device))


def _taken(x: Tensor, places: Tensor) -> Tensor:
    """(batch, n, channels) and (batch, m) to (batch, m, channels): each row's tokens at its places."""
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))
