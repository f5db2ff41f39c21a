"""What a figure needs beside it to be believed: when, where, with which code and command it was made."""

import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = ("infini-attention", "torch", "transformers", "tokenizers")


@dataclass(frozen=True)
class Provenance:
    """Time (UTC), command, commit (None outside a git checkout), versions, processor and GPU of a run."""

    date: str
    command: str
    commit: str | None
    versions: dict[str, str]
    processor: str
    threads: int
    card: str | None


def provenance() -> Provenance:
    """Describe this run."""
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        commit=_commit(),
        versions={"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        processor=_processor(),
        threads=torch.get_num_threads(),
        card=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # run from its source folder
        return "not installed"


def _commit() -> str | None:
    """The commit of the checkout that this very file lies in, marked where files were changed since."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or no commit yet
        return None


def _processor() -> str:
    description = Path("/proc/cpuinfo")
    if description.exists():
        for line in description.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
