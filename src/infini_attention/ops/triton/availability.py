"""Whether the fused kernels can be trusted here. Imports nothing that may be missing."""

import os
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from infini_attention.ops.options import copies_in

FIRST_TRITON = (3, 6)  # the oldest whose results were checked on a GPU
MAX_WIDTH = 256  # features, or values, of a head


@torch.compiler.assume_constant_result
def obstacle(device: torch.device, dtype: torch.dtype, width: int, normalization: str) -> str | None:
    """Why the fused kernels cannot take such tensors on `device`, in words; None when they can.

    `width` is the largest of head_dim, value_dim and what the feature map makes of head_dim.
    """
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"the fused kernels have no {dtype}"
    if width > MAX_WIDTH:
        return f"the fused kernels take heads of at most {MAX_WIDTH} features and values, not {width}"
    if normalization != "sum":
        return f"the fused kernels have no normalization {normalization!r}, only 'sum'"
    return missing(device)


def weights_obstacle(weights: Tensor | None) -> str | None:
    """Why the fused kernels cannot take such weights of segments, in words; None when they can."""
    if copies_in(weights) is not None:
        return "the fused kernels make no copies of segments under the delta rule"
    if weights is not None and weights.requires_grad and torch.is_grad_enabled():
        return "segment_weights ask for a gradient, which the fused kernels do not give"
    return None


@lru_cache(maxsize=16)
def missing(device: torch.device) -> str | None:
    """Why no kernel can be compiled for `device`, in words; None when they can."""
    try:
        installed = version("triton")
    except PackageNotFoundError:
        return "triton is not installed"
    if tuple(int(part) for part in installed.split(".")[:2]) < FIRST_TRITON:
        return f"triton {installed} is older than {'.'.join(map(str, FIRST_TRITON))}"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the tensors are on {device.type}, not on an NVIDIA GPU"
    if torch.version.hip is not None:
        return "the GPU is not NVIDIA's"
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return f"compute capability {capability[0]}.{capability[1]} is below 8.0"
    return None
