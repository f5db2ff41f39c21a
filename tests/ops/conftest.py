"""Every test that takes `backend` runs on all backends that work in fp64 on any device."""

import pytest

BACKENDS = ("reference", "parallel")


@pytest.fixture(scope="session", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
