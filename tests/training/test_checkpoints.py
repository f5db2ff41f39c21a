import json
from pathlib import Path

import pytest

from infini_attention.training.checkpoints import (
    MANIFEST,
    damage,
    keep_newest,
    newest_checkpoint,
    seal,
    unseal,
)


def checkpoint(folder: Path, step: int, *, sealed: bool = True) -> Path:
    path = folder / f"checkpoint-{step}"
    (path / "deep").mkdir(parents=True)
    (path / "model.bin").write_bytes(b"weights" * step)
    (path / "deep" / "state.bin").write_bytes(b"state")
    if sealed:
        seal(path)
    return path


def test_the_newest_is_the_one_that_was_finished_last(tmp_path: Path) -> None:
    for step in (9, 100, 20):  # as a run does that goes back from 100
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-300").write_text("a file")
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-20", [])
    keep_newest(tmp_path, 1)
    assert newest_checkpoint(tmp_path) == (tmp_path / "checkpoint-20", [])
    assert newest_checkpoint(tmp_path / "nothing") == (None, [])


@pytest.mark.parametrize("how", ["unfinished", "changed", "shortened", "missing", "manifest"])
def test_a_damaged_checkpoint_is_passed_over_and_spoken_of(tmp_path: Path, how: str) -> None:
    good, bad = checkpoint(tmp_path, 10), checkpoint(tmp_path, 20, sealed=how != "unfinished")
    if how == "changed":
        (bad / "model.bin").write_bytes(b"Weights" * 20)
    if how == "shortened":
        (bad / "model.bin").write_bytes(b"weights")
    if how == "missing":
        (bad / "deep" / "state.bin").unlink()
    if how == "manifest":
        (bad / MANIFEST).write_text('{"files": ')
    found, wrong = newest_checkpoint(tmp_path)
    assert found == good
    assert len(wrong) == 1 and str(bad) in wrong[0] and wrong[0] == damage(bad)


def test_the_manifest_names_every_file_and_comes_last(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, 3)
    files = json.loads((path / MANIFEST).read_text())["files"]
    assert set(files) == {"model.bin", "deep/state.bin"}
    assert files["model.bin"]["bytes"] == 21
    assert damage(path) is None
    unseal(path)
    assert "was not finished" in (damage(path) or "")


def test_old_and_unfinished_ones_are_deleted_and_the_best_is_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 5, sealed=False)
    keep_newest(tmp_path, 2, also=tmp_path / "checkpoint-1")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-1",
        "checkpoint-3",
        "checkpoint-4",
    ]
