"""Segment weights: how often a segment counts in memory."""

from dataclasses import replace

import torch
from torch import Tensor

from .cases import Case, Row, assert_equal, make_case, run

N = 4


def rebuilt(case: Case, segments: list[int], weights: list[float] | None = None) -> Case:
    """The case's only row as the given of its segments, in order."""
    (row,) = case.rows

    def pick(x: Tensor) -> Tensor:
        return torch.cat([x[:, N * s : N * (s + 1)] for s in segments], dim=1)

    given = None if weights is None else torch.tensor(weights, dtype=torch.float64)
    names = ("query", "key", "value", "local_query", "local_key")
    return replace(case, rows=[Row(*(pick(getattr(row, name)) for name in names), weights=given)])


def test_a_weight_of_3_is_the_segment_three_times(backend: str) -> None:
    case = make_case([3 * N], segment_length=N, update_rule="linear")
    _, weighted = run(rebuilt(case, [0, 1, 2], [1, 3, 2]), backend=backend)
    _, repeated = run(rebuilt(case, [0, 1, 1, 1, 2, 2]), backend=backend)
    assert_equal(weighted.memory, repeated.memory, tolerance=1e-12)
    assert_equal(weighted.normalizer, repeated.normalizer, tolerance=1e-12)


def test_a_weight_of_0_leaves_the_segment_out(backend: str) -> None:
    """Also of the first: memory is then as empty as if it had never stood there."""
    case = make_case([3 * N], segment_length=N, update_rule="linear")
    (weighted,), _ = run(rebuilt(case, [0, 1, 2], [0, 1, 1]), backend=backend)
    (left_out,), _ = run(rebuilt(case, [1, 2]), backend=backend)
    assert_equal(weighted[:, N:], left_out, tolerance=1e-12)


def test_under_delta_a_segment_is_added_by_weight_and_takes_out_once(backend: str) -> None:
    case = make_case([2 * N], segment_length=N, update_rule="delta", feature_map="elu1")
    (row,) = case.rows
    _, first = run(rebuilt(case, [0]), backend=backend)
    _, both = run(rebuilt(case, [0, 1], [1, 5]), backend=backend)
    features = torch.nn.functional.elu(row.key[:, N:]) + 1
    removed = features.transpose(-1, -2) @ first.read(row.key[None, :, N:], feature_map="elu1")[0]
    added = features.transpose(-1, -2) @ row.value[:, N:]
    assert_equal(both.memory[0], first.memory[0] - removed + 5 * added, tolerance=1e-12)
    assert_equal(both.normalizer[0], first.normalizer[0] + 5 * features.sum(dim=1), tolerance=1e-12)
