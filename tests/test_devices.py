"""What is chosen when device and precision are left open."""

import pytest
import torch

from infini_attention import devices
from infini_attention.devices import choose_device, choose_dtype

CPU = torch.device("cpu")


@pytest.mark.parametrize(("bfloat16_seconds", "dtype"), [(1.0, torch.bfloat16), (1.9, torch.float32)])
def test_a_cpu_gets_bfloat16_where_it_is_clearly_faster(
    monkeypatch: pytest.MonkeyPatch, bfloat16_seconds: float, dtype: torch.dtype
) -> None:
    seconds = {torch.float32: 2.0, torch.bfloat16: bfloat16_seconds}
    monkeypatch.setattr(devices, "_product_seconds", seconds.get)
    assert choose_dtype("auto", CPU) == dtype


def test_the_measurement_itself_runs() -> None:
    assert choose_dtype("auto", CPU) in (torch.float32, torch.bfloat16)


def test_names_are_taken_at_their_word() -> None:
    assert choose_dtype("float32", CPU) == torch.float32
    assert choose_device("cpu") == CPU


def test_auto_is_a_device_that_is_there() -> None:
    assert torch.zeros(1, device=choose_device("auto")).item() == 0


def test_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="device 'abacus' cannot be used here; give auto"):
        choose_device("abacus")
    with pytest.raises(ValueError, match="dtype is 'int8'; give one of auto, float32, bfloat16"):
        choose_dtype("int8", CPU)
