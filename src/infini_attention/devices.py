"""Where to compute and in which precision, when the user leaves it open."""

import time

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WORTH_IT = 1.3  # bfloat16 has to be so much faster to be chosen on a CPU


def choose_device(name: str) -> torch.device:
    """Return the device called `name`; "auto" is the first GPU, else the CPU.

    Raises ValueError for a name that torch does not know and for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError):  # torch asserts that it was built for the device
        raise ValueError(
            f"device {name!r} cannot be used here; give auto or one that `infini doctor` lists"
        ) from None


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype called `name` for weights on `device`.

    "auto" is bfloat16 on a GPU. On a CPU some processors have instructions for it and others only emulate
    them, so there it is bfloat16 where a matrix product, measured in some milliseconds, is clearly faster.
    Raises ValueError for any other name than "auto", "float32" and "bfloat16".
    """
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise ValueError(f"dtype is {name!r}; give one of auto, {', '.join(DTYPES)}")
    if device.type != "cpu":
        return torch.bfloat16
    faster = _product_seconds(torch.float32) > WORTH_IT * _product_seconds(torch.bfloat16)
    return torch.bfloat16 if faster else torch.float32


def _product_seconds(dtype: torch.dtype) -> float:
    """The quickest of a few matrix products of a small model's size on the CPU."""
    left, right = torch.ones(256, 512, dtype=dtype), torch.ones(512, 2048, dtype=dtype)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(left, right)
        seconds.append(time.perf_counter() - begin)
    return min(seconds)
