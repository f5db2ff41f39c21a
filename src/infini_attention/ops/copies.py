"""Segments that stand many times in a row, under the delta rule: powers of what one does to a memory.

That is M -> T M + U, kept as one tensor [D | U] with D = T - I, as T itself would round what is small. Maps
are joined by

    [D | U] = [D_1 | U_1] + [D_2 | U_2] + D_2 [D_1 | U_1]     first 1, then 2
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_attention.ops.normalization import denominator
from infini_attention.ops.options import capturing

MOST_COPIES = 1 << 30
"""Of a segment; a float32 tells no more than every 64th number there."""
COPIED_AT_ONCE = 64
"""Runs whose doublings are alive at a time, some 50 matrices [D | U] in fp64 each."""


def joined(first: Tensor, second: Tensor) -> Tensor:
    """[D | U] of two maps in turn, each (..., feature_dim, feature_dim + value_dim)."""
    feature_dim = second.shape[-2]
    return first + second + second[..., :feature_dim] @ first


def repeated(one: Tensor, copies: Tensor) -> Tensor:
    """[D | U] of a map applied `copies` times: (...,) int64, from 0 to MOST_COPIES; by doubling."""
    bits = MOST_COPIES.bit_length() if capturing(copies) else int(copies.max()).bit_length()
    result, power = torch.zeros_like(one), one
    for bit in range(bits):
        power = joined(power, power) if bit else one
        chosen = (copies >> bit & 1)[..., None, None]
        result = torch.where(chosen.bool(), joined(result, power), result)
    return result


def copied(
    keys: Tensor, removal: Tensor, added: Tensor, before: Tensor, copies: Tensor
) -> tuple[Tensor, Tensor]:
    """What takes the place of A_s and B_s where segments stand `copies` times in a row.

    The first copy is (9) as ever. The others go on from its z, and keep it: z + z_s in place of z + k z_s, as
    the map is the same then for all, and its powers come by doubling. With the z of before, which a new
    segment is not in, these could diverge; with z + z_s, A_s has its eigenvalues from 0 to 1.

    In fp64, whose rounding a billion copies do not bring to the surface.

    Args:
        keys: features of keys, (runs, kv_heads, N, feature_dim).
        removal: A_s, (runs, kv_heads, feature_dim, feature_dim).
        added: B_s, (runs, kv_heads, feature_dim, value_dim).
        before: z of before each run, (runs, kv_heads, feature_dim).
        copies: (runs,) int64, from 1 to MOST_COPIES.
    """
    tensors = [keys, removal, added, before, copies]
    parts = zip(*(torch.split(x, COPIED_AT_ONCE) for x in tensors), strict=True)
    both = torch.cat([_without_doublings(*part) for part in parts])
    D, U = both.tensor_split([keys.shape[-1]], dim=-1)
    return -D, U


def _without_doublings(*part: Tensor) -> Tensor:
    """`_copied`, of which only what goes in is kept for the gradient: doublings keep many times that."""
    if not torch.is_grad_enabled():
        return _copied(*part)
    both: Tensor = checkpoint(_copied, *part, use_reentrant=False, preserve_rng_state=False)
    return both


def _copied(keys: Tensor, removal: Tensor, added: Tensor, before: Tensor, copies: Tensor) -> Tensor:
    dtype = removal.dtype
    keys, removal, added, before = (x.double() for x in (keys, removal, added, before))
    again = keys.transpose(-1, -2) @ (keys / denominator(keys, before + keys.sum(dim=2)))
    more = repeated(torch.cat([-again, added], dim=-1), (copies - 1)[:, None])
    return joined(torch.cat([-removal, added], dim=-1), more).to(dtype)
