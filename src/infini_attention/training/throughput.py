"""How fast training is: tokens a second, and the part of the card's peak that they come to."""

import time
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.models.config import head_dim_of
from infini_attention.ops import feature_maps

# Dense bf16 and fp16 FLOPs a second: NVIDIA's datasheets of A100, B200, H100, H200, L40S; its Ada whitepaper.
# By whole names: MIG slices and laptop cards have names that begin alike.
PEAKS = {
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA GeForce RTX 4090": 165e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
}


class Throughput:
    """Counts tokens between two logs; the first batch starts the clock and is not counted.

    Figures are of this process and its device, and time is all time, evaluations and checkpoints included.
    Work that is done twice to save memory counts once, as is the custom; keys that were carried from earlier
    steps, and what of these is read again, are not counted.

    Args:
        model: an `infini_*` language model, or a baseline.
        args: says on which device it trains, and in which precision.
    """

    def __init__(self, model: Any, args: TrainingArguments) -> None:
        self._flops_per_token = cache(lambda length: flops_per_token(model, length))
        self._peak = peak_flops(args.device, _dtype(model, args))
        self._tokens, self._flops = 0, 0.0
        self._began: float | None = None

    def count(self, shape: torch.Size) -> None:
        """Take note of a batch of this shape, (rows, length), that was trained on."""
        if self._began is None:
            self._began = time.perf_counter()
            return
        self._tokens += shape.numel()
        self._flops += shape.numel() * self._flops_per_token(shape[1])

    def figures(self) -> dict[str, float]:
        """`tokens_per_second`, and `mfu` where the card's peak is known, since the last call.

        Empty where no token was counted.
        """
        if self._began is None or not self._tokens:
            return {}
        now = time.perf_counter()
        seconds, tokens, flops = now - self._began, self._tokens, self._flops
        self._began, self._tokens, self._flops = now, 0, 0.0
        figures = {"tokens_per_second": tokens / seconds}
        return figures if self._peak is None else figures | {"mfu": flops / seconds / self._peak}


class Cost:
    """What a training has cost so far, over all runs that went on from its checkpoints.

    Args:
        device: that it trains on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tokens = torch.zeros((), dtype=torch.int64, device=device)  # added up there, so nobody waits
        self._seconds, self._peak_bytes = 0.0, 0
        self._began: float | None = None

    def begin(self) -> None:
        """The training begins, or goes on."""
        self._began = time.perf_counter()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def count(self, tokens: Tensor) -> None:
        """Take note of a step in which all processes predict so many tokens, an int64 of no dimension."""
        self._tokens = self._tokens + tokens

    def figures(self) -> dict[str, float]:
        """`tokens` predicted, `seconds`, and on a GPU `peak_memory_bytes`, the most that torch held of it."""
        seconds = self._seconds + (0.0 if self._began is None else time.perf_counter() - self._began)
        figures = {"tokens": int(self._tokens), "seconds": round(seconds, 1)}
        if self._device.type != "cuda":
            return figures
        peak = max(self._peak_bytes, torch.cuda.max_memory_allocated(self._device))
        return figures | {"peak_memory_bytes": peak}

    def load(self, figures: dict[str, float]) -> None:
        """Go on from the figures of a checkpoint; nothing where it is of a version that had none."""
        self._tokens = torch.tensor(int(figures.get("tokens", 0)), device=self._device)
        self._seconds = figures.get("seconds", 0.0)
        self._peak_bytes = int(figures.get("peak_memory_bytes", 0))


def flops_per_token(model: Any, length: int) -> float:
    """Floating-point operations of forward and backward, a token of sequences of `length` tokens.

    A weight matrix takes two an entry forward, two for the gradient of its input and, if it is trained, two
    for its own. Attention takes three times its forward, which a head is 2 d (N + 2 f) with a memory under
    the linear rule, 2 d (N + 3 f) under the delta rule, where N is the segment length or, if less, that of
    the sequence, and f the number of features of a key, mostly d; 4 d times the tokens that it sees outside
    its segment, where it does; and 2 d times the length without a memory,
    since a token sees half of it. A baseline's is 4 d times the keys that a token sees, and tokens that it
    adds to a text count nothing. The embedding's lookup counts nothing.
    """
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    matrices = sum(linear.weight.numel() * (6 if linear.weight.requires_grad else 4) for linear in linears)
    layers = range(model.config.num_hidden_layers)
    attention = sum(_attention_flops(model.config, layer, length) for layer in layers)
    return float(matrices + 3 * attention)


def peak_flops(device: torch.device | str, dtype: torch.dtype) -> float | None:
    """What the card behind `device` can do at most in `dtype`, dense FLOPs a second; None where unknown."""
    if torch.device(device).type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    return PEAKS.get(torch.cuda.get_device_name(device))


def _attention_flops(config: Any, layer: int, length: int) -> float:
    """A token's in one layer, forward, all heads together."""
    width = head_dim_of(config)
    if isinstance(config, BaselineConfigMixin):
        seen = 2 * config.keys_seen(layer, length)
    elif layer in config.infini_layers:
        features = feature_maps.get(config.feature_map).feature_dim(width)
        segment = min(config.segment_length, length)
        seen = segment + {"linear": 2, "delta": 3}[config.update_rule] * features
        seen += 2 * config.context_tokens * (1 - segment / length)  # the first segment sees none
    else:
        window = min(config._window(layer) or length, length)
        seen = window * (2 - window / length)  # twice the tokens that one sees on average
    return config.num_attention_heads * 2 * width * seen


def _dtype(model: Any, args: TrainingArguments) -> torch.dtype:
    if args.bf16:
        return torch.bfloat16
    return torch.float16 if args.fp16 else model.dtype
