"""Checkpoints that are whole or not there: a manifest with every file's size and hash, written last."""

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

MANIFEST = "manifest.json"
RECIPE, SUMMARY, MODEL = "recipe.yaml", "summary.json", "model"  # what a run leaves in its folder at its end


def seal(checkpoint: Path) -> None:
    """Write the manifest of the files in `checkpoint`, after all of them have reached the disk."""
    files = {}
    for path in _files(checkpoint):
        _sync(path)
        files[path.relative_to(checkpoint).as_posix()] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    unfinished = checkpoint / f"{MANIFEST}.unfinished"
    unfinished.write_text(json.dumps({"sealed_at": time.time_ns(), "files": files}, indent=1))
    _sync(unfinished)
    os.replace(unfinished, checkpoint / MANIFEST)
    _sync(checkpoint)


def unseal(checkpoint: Path) -> None:
    """Take the manifest away before files change."""
    (checkpoint / MANIFEST).unlink(missing_ok=True)


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None where every file is as it was written."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
    except FileNotFoundError:
        return f"{checkpoint} has no {MANIFEST}: it was not finished"
    except (json.JSONDecodeError, KeyError, UnicodeDecodeError):
        return f"{checkpoint / MANIFEST} cannot be read"
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected["bytes"] or _hash(path) != expected["sha256"]:
            return f"{path} is not what was written"
    return None


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint in `folder`, or None, and what is wrong with newer ones."""
    wrong: list[str] = []
    for checkpoint in checkpoints(folder):
        reason = damage(checkpoint)
        if reason is None:
            return checkpoint, wrong
        wrong.append(reason)
    return None, wrong


def checkpoints(folder: Path) -> list[Path]:
    """The folders of all checkpoints in `folder`, good or not: by when they were sealed, latest first.

    A run that went back to an earlier one counts from there: what it then saves is newer than later steps.
    Those that were not finished come before all others, by their step.
    """
    found = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        step = path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
        if path.is_dir() and step.isdecimal():
            found.append((_sealed_at(path), int(step), path))
    return [path for *_, path in sorted(found, reverse=True)]


def keep_newest(folder: Path, number: int, *, also: Path | None = None) -> None:
    """Delete all but the newest `number` finished checkpoints, and the one to keep `also`."""
    finished = 0
    for checkpoint in checkpoints(folder):
        good = (checkpoint / MANIFEST).exists()
        finished += good
        if (finished > number or not good) and checkpoint != also:
            unseal(checkpoint)  # first, so that no half of it looks whole
            shutil.rmtree(checkpoint)


def _sealed_at(checkpoint: Path) -> float:
    try:
        return float(json.loads((checkpoint / MANIFEST).read_text())["sealed_at"])
    except (OSError, ValueError, KeyError):
        return math.inf


def _files(checkpoint: Path) -> list[Path]:
    return sorted(path for path in checkpoint.rglob("*") if path.is_file())


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until what was written to `path` is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
