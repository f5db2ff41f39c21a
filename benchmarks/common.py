"""What every benchmark prints beside its figures."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "infini-attention",
    "infini-transformer-pytorch",
    "fla-core",
)

# The shape of SmolLM2-135M, without its number of layers, 30, which benchmarks vary.
SMOLLM2: dict[str, Any] = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2**24,
}


def environment(device: str = "cuda") -> dict[str, Any]:
    """Card or processor, cores, threads, versions, commit and command line, for JSON.

    With `device` "cpu" the processor is named even where there is a card. The commit is `INFINI_COMMIT` if
    that is set, as for a copy without history, else that of the checkout.
    """
    on_card = device != "cpu" and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_card else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in PACKAGES},
        "commit": os.environ.get("INFINI_COMMIT") or _commit(),
        "command": shlex.join(["python", *sys.argv]),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        described = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # no git
        return "unknown"
    return described.stdout.strip() or "unknown"
