"""Equations (6) to (10) of arXiv 2404.07143, one sequence, one head and one token at a time, in numpy fp64.

It shares no code with the package and knows neither batches, blocks, padding nor chunks: what the
backends must be equal to, in the plainest words. What local attention sees outside a token's segment is a
list of places.
"""

import math

import numpy as np


def sigma(feature_map: str, x: np.ndarray) -> np.ndarray:
    """Features of one vector, element by element."""
    if feature_map == "dpfp":
        rectified = [max(a, 0.0) for a in (*x, *-x)]
        return np.array([a * rectified[i - 1] for i, a in enumerate(rectified)])
    function = {
        "elu1": lambda a: a + 1 if a > 0 else math.exp(a),
        "exp": lambda a: math.exp(min(max(a, -20.0), 10.0)),
        "relu2": lambda a: max(a, 0.0) ** 2,
        "softplus": lambda a: math.log1p(math.exp(a)),
        "identity": float,
    }[feature_map]
    return np.array([function(a) for a in x])


def unit(x: np.ndarray) -> np.ndarray:
    """The vector in x's direction whose squares sum to 1; none has the direction of zeros."""
    squares = sum(float(a) ** 2 for a in x)
    return x / math.sqrt(squares) if squares else x


def retrieve(features: np.ndarray, M: np.ndarray, z: np.ndarray, normalization: str = "sum") -> np.ndarray:
    """sigma(x) M over what the normalization says; nothing is found where nothing is stored."""
    if normalization in ("none", "unit"):
        return features @ M
    denominator = features @ z
    if denominator == 0:
        return np.zeros(M.shape[1])
    return features @ M / {"sum": denominator, "root": abs(denominator) ** 0.5}[normalization]


def oracle(
    *,
    query: np.ndarray,
    key: np.ndarray,
    value: np.ndarray,
    local_query: np.ndarray,
    local_key: np.ndarray,
    local_value: np.ndarray,
    context_value: np.ndarray,
    gate: np.ndarray,
    context_key: np.ndarray,
    weights: np.ndarray,
    segment_length: int,
    update_rule: str,
    feature_map: str,
    normalization: str,
    empty_memory: str,
    local_attention: str,
    sink_tokens: int,
    scale: float | None,
    softcap: float | None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """One sequence's output (heads, length, value_dim), and its state's fields without the batch axis.

    Tensors are (heads or kv_heads, length, dim); `weights` (segments,) says how often each segment counts.
    """

    def features_of(x: np.ndarray) -> np.ndarray:
        return unit(sigma(feature_map, x)) if normalization == "unit" else sigma(feature_map, x)

    heads, length, head_dim = query.shape
    kv_heads, _, value_dim = value.shape
    feature_dim = len(sigma(feature_map, np.ones(head_dim)))
    scale = head_dim**-0.5 if scale is None else scale
    share = [1 / (1 + math.exp(-beta)) for beta in gate]
    M, z = np.zeros((kv_heads, feature_dim, value_dim)), np.zeros((kv_heads, feature_dim))
    new_M, new_z = np.zeros_like(M), np.zeros_like(z)
    earlier_M, earlier_z = M, z  # without the segment before, which a sliding window still sees
    output = np.zeros((heads, length, value_dim))

    for t in range(length):
        first = t // segment_length * segment_length  # where this token's segment began
        outside = {
            "segment": [],
            "sliding": range(max(0, first - segment_length), first),
            "sink": range(min(first, sink_tokens)),
        }[local_attention]
        read_M, read_z = (earlier_M, earlier_z) if local_attention == "sliding" else (M, z)
        weight = weights[t // segment_length]
        for h in range(heads):
            g = h * kv_heads // heads  # the key/value head of this query head
            keys = [context_key[g, u] for u in outside] + [local_key[g, u] for u in range(first, t + 1)]
            values = [context_value[g, u] for u in outside] + [local_value[g, u] for u in range(first, t + 1)]
            scores = [scale * (local_query[h, t] @ k) for k in keys]
            if softcap is not None:
                scores = [softcap * math.tanh(score / softcap) for score in scores]
            likelihoods = [math.exp(score - max(scores)) for score in scores]
            A_dot = sum(p * v for p, v in zip(likelihoods, values, strict=True)) / sum(likelihoods)
            A_mem = retrieve(features_of(query[h, t]), read_M[g], read_z[g], normalization)
            remembers = read_z[g].any() or empty_memory == "gated"
            output[h, t] = share[h] * A_mem + (1 - share[h]) * A_dot if remembers else A_dot
        for g in range(kv_heads):
            features = features_of(key[g, t])
            removed = retrieve(features, M[g], z[g]) if update_rule == "delta" else 0.0
            new_M[g] += np.outer(features, weight * value[g, t] - removed)
            new_z[g] += weight * features
        if (t + 1) % segment_length == 0:
            earlier_M, earlier_z = M, z
            M, z = M + new_M, z + new_z
            new_M, new_z = np.zeros_like(M), np.zeros_like(z)

    still_open = length // segment_length * segment_length
    state = {
        "memory": M,
        "normalizer": z,
        "pending_memory": new_M,
        "pending_normalizer": new_z,
        "local_key": local_key[:, still_open:],
        "local_value": local_value[:, still_open:],
    }
    context = {"segment": 0, "sliding": segment_length, "sink": sink_tokens}[local_attention]
    if context:
        start = still_open - segment_length if local_attention == "sliding" else 0
        seen = slice(start, start + context) if still_open else slice(0)
        places = ((0, 0), (0, 0 if still_open else context), (0, 0))
        state["context_key"] = np.pad(context_key[:, seen], places)
        state["context_value"] = np.pad(context_value[:, seen], places)
        state["open_context_key"] = context_key[:, still_open:][:, :context]
    if local_attention == "sliding":
        state |= {"earlier_memory": earlier_M, "earlier_normalizer": earlier_z}
    return output, state
