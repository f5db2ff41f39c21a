"""The cross entropy of logits, without copies of them in fp32 where a kernel can make it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_attention.ops.triton.availability import missing

IGNORED = -100
"""The target of a token that predicts nothing."""


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """The sum over tokens of -log softmax(logits)[target], in nats: fp32, 0-dim.

    Kernels read bf16 or fp16 logits as they are, and write their gradient so; a vocabulary's logits are what
    a small model's step spends most memory traffic on.

    Args:
        logits: (tokens, vocabulary).
        targets: (tokens,) int64, IGNORED for nothing.

    Raises:
        ValueError: not one target a token.
    """
    if targets.shape != logits.shape[:1]:
        raise ValueError(
            f"targets are {tuple(targets.shape)} and logits {tuple(logits.shape)}; give one target a token"
        )
    # torch.compile makes kernels of its own.
    if not torch.compiler.is_compiling() and missing(logits.device) is None:
        from infini_attention.ops.triton.cross_entropy import TokenLosses

        losses: Tensor = TokenLosses.apply(logits, targets, IGNORED)  # type: ignore[no-untyped-call]
        return losses.sum()
    return F.cross_entropy(logits.float(), targets, ignore_index=IGNORED, reduction="sum")
