import json

import pytest
import torch
from rich.console import Console

from infini_attention import cli, doctor
from infini_attention.doctor import diagnose
from infini_attention.ops import choose_backend


def test_the_cpu_is_there_with_the_backend_that_auto_takes() -> None:
    cpu = diagnose().devices[0]
    assert (cpu.name, (cpu.backend, cpu.reason)) == ("cpu", choose_backend("cpu"))


def test_the_self_check_is_sound_to_fp32_rounding() -> None:
    diagnosis = diagnose()
    assert diagnosis.sound
    for device in diagnosis.devices:
        assert device.error is not None
        assert device.error < doctor.TOLERANCE


def test_versions_are_those_imported() -> None:
    assert diagnose().versions["torch"] == torch.__version__


def test_a_package_that_is_not_installed_has_no_version() -> None:
    assert doctor.installed_version("no-such-distribution-at-all") is None


def test_a_missing_package_is_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["torch", "matplotlib>=3; extra == 'eval'", "no-such-package; extra == 'eval'"]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: lines)
    monkeypatch.setattr(doctor.metadata, "metadata", lambda name: _Provides("eval"))
    monkeypatch.setattr(doctor, "installed_version", lambda name: None if name == "no-such-package" else "1")
    (extra,) = diagnose().extras
    assert extra.missing == ["no-such-package"]
    assert extra.command == "pip install 'infini-attention[eval]'"
    cli.main(["doctor"])
    assert "[eval]" in capsys.readouterr().out


def test_a_backend_that_disagrees_is_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_self_check", lambda device, backend: 0.5)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_device_that_fails_is_reported_in_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: str, backend: str) -> float:
        raise RuntimeError("driver too old\nand a long trace")

    monkeypatch.setattr(doctor, "_self_check", broken)
    diagnosis = diagnose()
    assert not diagnosis.sound
    console = Console(record=True, width=100)
    for table in diagnosis.tables():
        console.print(table)
    assert "driver too old" in console.export_text()


def test_json_is_one_line_with_the_same_content(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["doctor", "--json"])
    output = capsys.readouterr().out
    assert output.count("\n") == 1
    assert json.loads(output)["sound"] is True


class _Provides:
    """Stands in for a distribution's metadata with one extra."""

    def __init__(self, extra: str) -> None:
        self.extra = extra

    def get_all(self, field: str) -> list[str]:
        return [self.extra]
