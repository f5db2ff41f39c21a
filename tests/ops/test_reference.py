"""The reference backend against the equations, a token at a time."""

from typing import Any

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from infini_attention.ops.state import OPEN

from .cases import LAYOUTS, Case, assert_equal, cases, run, splits, state_fields
from .oracle import oracle


@given(st.data(), cases())
def test_the_reference_is_the_papers_equations(data: st.DataObject, case: Case) -> None:
    layouts = data.draw(st.lists(st.sampled_from(LAYOUTS), min_size=1, max_size=3))
    _compare(case, pieces=data.draw(splits(case)), layouts=layouts)


@given(st.sampled_from(LAYOUTS), cases(own_contexts=True))
def test_later_segments_see_values_of_their_own(layout: str, case: Case) -> None:
    _compare(case, layouts=[layout])


def _compare(case: Case, **how: Any) -> None:
    outputs, state = run(case, backend="reference", **how)
    for index, row in enumerate(case.rows):
        segments = -(-row.length // case.segment_length)
        local_value = row.value if row.local_value is None else row.local_value
        expected, expected_state = oracle(
            query=row.query.numpy(),
            key=row.key.numpy(),
            value=row.value.numpy(),
            local_query=row.local_query.numpy(),
            local_key=row.local_key.numpy(),
            context_key=(row.local_key if row.context_key is None else row.context_key).numpy(),
            local_value=local_value.numpy(),
            context_value=(local_value if row.context_value is None else row.context_value).numpy(),
            gate=case.gate.numpy(),
            weights=np.ones(segments) if row.weights is None else row.weights.numpy(),
            **case.settings,
        )
        assert_equal(outputs[index], torch.tensor(expected), tolerance=1e-10)
        assert int(state.length[index]) == row.length
        assert state_fields(state).keys() == expected_state.keys()
        for name, field in state_fields(state).items():
            actual, wanted = field[index], torch.tensor(expected_state[name])
            if name in OPEN:
                still_open = wanted.shape[1]
                assert not actual[:, still_open:].any(), "places beyond the open segment are zero"
                actual = actual[:, :still_open]
            assert_equal(actual, wanted, tolerance=1e-10, what=name)
