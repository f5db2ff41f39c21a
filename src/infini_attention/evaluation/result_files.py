"""Files of results that a long reading writes as it goes on, and goes on from when it was cut off."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from infini_attention.data.passkey import TOLD

PROBE = f"{TOLD} 0123456789"  # tells one tokenizer from another


def write_whole(path: Path, line: str) -> None:
    """Write a line into the file `path`, as a whole or not at all; its folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".unfinished-{os.getpid()}-{path.name}")
    unfinished.write_text(line + "\n")
    unfinished.replace(path)


def check_same_setting(path: Path, ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Raise ValueError, naming each difference, where the figures in `path` are of another setting."""
    differences = [
        f"{name} is {theirs.get(name)!r} there and {value!r} here"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differences:
        raise ValueError(f"{path} holds other figures: {', '.join(differences)}; name another file")


def fingerprint(model: Any, tokenizer: Any = None, prose: np.ndarray | None = None) -> str:
    """Hexadecimal; changes with any weight, the config, the tokenizer and the prose, (tokens,) int32.

    `tokenizer` and `prose` are None where there are none.
    """
    config = {name: value for name, value in model.config.to_dict().items() if name != "_name_or_path"}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    if tokenizer is not None:
        digest.update(json.dumps(tokenizer(PROBE, add_special_tokens=False)["input_ids"]).encode())
    if prose is not None:
        digest.update(prose.tobytes())
    return digest.hexdigest()[:16]


def plain(value: Any) -> Any:
    """The same for JSON: lists for tuples, None for numbers that it does not know."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
