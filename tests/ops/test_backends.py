"""Which backend is taken, and what is said when it is not the fast one."""

import warnings
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
import torch

from infini_attention.ops import choose_backend, infini, infini_attention
from infini_attention.ops.triton import availability

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of today, whatever is really here."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(availability, "version", lambda name: "3.6.0")
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    availability.missing.cache_clear()
    infini._warn_once.cache_clear()
    yield
    availability.missing.cache_clear()


def test_a_gpu_gets_the_fused_kernels() -> None:
    assert choose_backend(GPU)[0] == "triton"


def test_a_cpu_gets_all_segments_at_once() -> None:
    name, reason = choose_backend("cpu")
    assert name == "parallel"
    assert "not on an NVIDIA GPU" in reason


@pytest.mark.parametrize(
    ("dtype", "head_dim", "reason"),
    [
        (torch.float64, 64, "no torch.float64"),
        (torch.bfloat16, 512, "256 features and values, not 512"),
    ],
)
def test_tensors_that_the_kernels_do_not_take_get_the_other_backend(
    dtype: torch.dtype, head_dim: int, reason: str
) -> None:
    name, words = choose_backend(GPU, dtype=dtype, head_dim=head_dim)
    assert name == "parallel"
    assert reason in words


@pytest.mark.parametrize("normalization", ["root", "none", "unit"])
def test_a_normalization_that_the_kernels_lack_gets_the_other_backend(normalization: str) -> None:
    name, words = choose_backend(GPU, normalization=normalization)
    assert name == "parallel"
    assert f"the fused kernels have no normalization '{normalization}'" in words


def test_a_missing_triton_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(availability, "version", missing)
    assert "triton is not installed" in choose_backend(GPU)[1]


def test_an_old_triton_is_named_with_its_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(availability, "version", lambda name: "2.1.0")
    assert "triton 2.1.0 is older than" in choose_backend(GPU)[1]


def test_an_old_gpu_is_named_with_its_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "capability 7.5 is below 8.0" in choose_backend(GPU)[1]


def test_the_fused_kernels_are_refused_in_words_where_they_cannot_run() -> None:
    tensors = torch.randn(3, 1, 2, 8, 4)
    with pytest.raises(ValueError, match=r"backend is .triton., but the tensors are on cpu.*backend=.auto."):
        infini_attention(*tensors, torch.zeros(2), segment_length=4, backend="triton")


def test_the_slower_path_is_announced_once() -> None:
    with pytest.warns(UserWarning, match="slower torch path, because triton is old"):
        infini._warn_once("triton is old")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infini._warn_once("triton is old")


def test_auto_on_a_gpu_that_cannot_warns_exactly_once() -> None:
    """Through the choice that every call makes; tensors on a GPU are only described here."""
    tensor = SimpleNamespace(device=GPU, dtype=torch.float64, shape=(1, 2, 8, 4), is_cuda=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        inputs = SimpleNamespace(query=tensor, segment_weights=None)
        chosen = [infini._backend("auto", inputs, 4, "sum") for _ in range(3)]
    assert [backend.__name__ for backend in chosen] == ["parallel"] * 3
    assert ["no torch.float64" in str(warning.message) for warning in caught] == [True]


def test_auto_on_a_cpu_says_nothing() -> None:
    tensors = torch.randn(3, 1, 2, 8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        infini_attention(*tensors, torch.zeros(2), segment_length=4)
