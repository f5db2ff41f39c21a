from typing import Any

import pytest
import torch

from infini_attention.baselines import BASELINES

from .cases import make_baseline


@pytest.fixture(params=list(BASELINES))
def model(request: pytest.FixtureRequest) -> Any:
    """A tiny model of each system in turn."""
    return make_baseline(request.param)


@pytest.fixture(params=[name for name in BASELINES if name != "full"])
def segmented(request: pytest.FixtureRequest) -> Any:
    """The same of those that go through a text by segments."""
    return make_baseline(request.param)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
