"""Low precision and many segments: as near the truth as torch's own arithmetic allows."""

import pytest
import torch
from torch import Tensor

from infini_attention.ops import feature_maps

from .cases import Case, make_case, run

MAPS = ("elu1", "exp", "softplus")


def error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm())


def plain(case: Case) -> Tensor:
    """One row by the paper's equations in torch, every intermediate in the inputs' dtype; whole segments."""
    (row,), settings = case.rows, case.settings
    sigma, N = feature_maps.get(settings["feature_map"]), case.segment_length
    group = row.query.shape[0] // row.key.shape[0]
    keys, values, local_keys = (x.repeat_interleave(group, 0) for x in (row.key, row.value, row.local_key))
    share = case.gate.sigmoid().to(row.query.dtype)[:, None, None]
    state, outputs = None, []
    tensors = (row.query, keys, values, row.local_query, local_keys)
    for q, k, v, lq, lk in zip(*(x.split(N, dim=1) for x in tensors), strict=True):
        scores = lq @ lk.transpose(-1, -2) * q.shape[-1] ** -0.5
        output = scores.masked_fill(~torch.ones(N, N, dtype=torch.bool).tril(), float("-inf")).softmax(-1) @ v
        written = v
        if state is not None:
            M, z = state
            output = share * (sigma(q) @ M / (sigma(q) @ z)) + (1 - share) * output
            if settings["update_rule"] == "delta":
                written = v - sigma(k) @ M / (sigma(k) @ z)
        sums = sigma(k).transpose(-1, -2) @ written, sigma(k).sum(dim=1)[..., None]
        state = sums if state is None else (state[0] + sums[0], state[1] + sums[1])
        outputs.append(output)
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("feature_map", MAPS)
def test_parallel_is_at_most_twice_as_wrong_as_plain_torch(
    feature_map: str, update_rule: str, dtype: torch.dtype
) -> None:
    settings = {"segment_length": 32, "update_rule": update_rule, "feature_map": feature_map}
    case = make_case([320], head_dim=16, value_dim=16, **settings).to(dtype)
    (exact,), _ = run(case.to(torch.float64), backend="reference")
    (output,), _ = run(case, backend="parallel")
    assert output.dtype == dtype
    assert error(output, exact) <= 2 * error(plain(case), exact)


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_memory_keeps_its_precision_under_autocast(update_rule: str) -> None:
    case = make_case([100], segment_length=16, update_rule=update_rule).to(torch.float32)
    (expected,), expected_state = run(case, backend="parallel")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (output,), state = run(case, backend="parallel")
    assert torch.equal(output, expected)
    assert torch.equal(state.memory, expected_state.memory)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("update_rule", ["linear", "delta"])
@pytest.mark.parametrize("feature_map", [*MAPS, "relu2", "dpfp"])
def test_two_thousand_segments_stay_finite_and_near_fp64(
    feature_map: str, update_rule: str, dtype: torch.dtype
) -> None:
    settings = {"segment_length": 4, "update_rule": update_rule, "feature_map": feature_map}
    case = make_case([8000], kv_heads=1, group=1, head_dim=8, value_dim=8, **settings).to(dtype)
    (exact,), exact_state = run(case.to(torch.float64), backend="parallel")
    (output,), state = run(case, backend="parallel")
    assert output.isfinite().all()
    assert error(output, exact) <= (1e-5 if dtype == torch.float32 else 1e-2)
    assert error(state.memory, exact_state.memory) <= 1e-5
    assert error(state.normalizer, exact_state.normalizer) <= 1e-5
