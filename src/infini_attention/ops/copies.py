"""Segments that stand many times in a row, under the delta rule: powers of what one does to a memory.

With P = sigma(K), (N, F), and Q what tokens are divided by, a copy is M <- (I - A) M + B, where A = P^T Q P
and B = P^T V. Such a map is kept as one tensor [A | B], as I - A would round what is small. Two are joined by

    [A | B] = [A_1 | B_1] + [A_2 | B_2] - A_2 [A_1 | B_1]     first 1, then 2

Where a segment has fewer tokens than a key has features, k copies come from the smaller X = Q P P^T, (N, N),
since (I - A) P^T = P^T (I - X):

    [A | B]_k = P^T H [Q P | V]     H = I + (I - X) + ... + (I - X)^(k-1), which is B_k of the map [X | I]
"""

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_attention.ops.normalization import denominator
from infini_attention.ops.options import unreadable

MOST_COPIES = 1 << 30
"""Of a segment; a float32 tells no more than every 64th number there."""
COPIED_AT_ONCE = 64
"""Runs whose doublings are alive at a time, some 150 matrices [A | B] in fp64 each."""


def joined(first: Tensor, second: Tensor) -> Tensor:
    """[A | B] of two maps in turn, each (..., n, n + m)."""
    size = second.shape[-2]
    return first + second - second[..., :size] @ first


def repeated(one: Tensor, copies: Tensor) -> Tensor:
    """[A | B] of a map applied `copies` times: (...,) int64, from 0 to MOST_COPIES; by doubling."""
    bits = MOST_COPIES.bit_length() if unreadable(copies) else int(copies.max()).bit_length()
    result, power = torch.zeros_like(one), one
    for bit in range(bits):
        power = joined(power, power) if bit else one
        chosen = (copies >> bit & 1)[..., None, None]
        result = torch.where(chosen.bool(), joined(result, power), result)
    return result


def copied(
    keys: Tensor, values: Tensor, removal: Tensor, added: Tensor, before: Tensor, copies: Tensor
) -> tuple[Tensor, Tensor]:
    """What takes the place of A_s and B_s where segments stand `copies` times in a row.

    The first copy is (9) as ever. The others go on from its z, and keep it: z + z_s in place of z + k z_s, as
    the map is the same then for all, and its powers come by doubling. With the z of before, which a new
    segment is not in, these could diverge; with z + z_s, A has its eigenvalues from 0 to 1.

    In fp64, whose rounding a billion copies do not bring to the surface.

    Args:
        keys: features of keys, (runs, kv_heads, N, feature_dim).
        values: (runs, kv_heads, N, value_dim).
        removal: A_s, (runs, kv_heads, feature_dim, feature_dim).
        added: B_s, (runs, kv_heads, feature_dim, value_dim).
        before: z of before each run, (runs, kv_heads, feature_dim).
        copies: (runs,) int64, from 1 to MOST_COPIES.
    """
    tensors = [keys, values, removal, added, before, copies]
    parts = zip(*(torch.split(x, COPIED_AT_ONCE) for x in tensors), strict=True)
    both = torch.cat([_without_doublings(*part) for part in parts])
    removal, added = both.tensor_split([keys.shape[-1]], dim=-1)
    return removal, added


def _without_doublings(*part: Tensor) -> Tensor:
    """`_copied`, of which only what goes in is kept for the gradient: doublings keep many times that."""
    if not torch.is_grad_enabled():
        return _copied(*part)
    both: Tensor = checkpoint(_copied, *part, use_reentrant=False, preserve_rng_state=False)
    return both


def _copied(
    keys: Tensor, values: Tensor, removal: Tensor, added: Tensor, before: Tensor, copies: Tensor
) -> Tensor:
    """[A | B] of all copies: of the first, then of the others, which meet what it left."""
    dtype = removal.dtype
    keys, values, removal, added, before = (x.double() for x in (keys, values, removal, added, before))
    others = _others(keys, values, before + keys.sum(dim=2), (copies - 1)[:, None])
    return joined(torch.cat([removal, added], dim=-1), others).to(dtype)


def _others(keys: Tensor, values: Tensor, normalizer: Tensor, copies: Tensor) -> Tensor:
    """[A | B] of so many copies that all divide by the same `normalizer`.

    From fp64 keys and values throughout: what a rounded sum has outside the keys' span, copies multiply.
    """
    transposed, divided = keys.transpose(-1, -2), keys / denominator(keys, normalizer)
    tokens, features = keys.shape[-2:]
    if tokens >= features:
        return repeated(transposed @ torch.cat([divided, values], dim=-1), copies)
    small = divided @ transposed
    one = torch.eye(tokens, dtype=small.dtype, device=small.device).expand_as(small)
    sums = repeated(torch.cat([small, one], dim=-1), copies)[..., tokens:]
    return transposed @ (sums @ torch.cat([divided, values], dim=-1))
