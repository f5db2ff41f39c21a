"""Cross entropy in two kernels: each reads a token's logits in their own dtype, and computes in fp32.

Logits whose target is ignored are not read. Any other target outside the vocabulary gives NaN.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_BLOCK, WARPS = 8192, 8


@triton.jit
def losses_kernel(
    logits_TV, targets_T, losses_T, norms_T, stride, V, IGNORED: tl.constexpr, BLOCK: tl.constexpr
):
    """-log softmax at the target, and log sum exp; of one token a program."""
    token = tl.program_id(0)
    target = tl.load(targets_T + token)
    if target == IGNORED:
        tl.store(losses_T + token, 0.0)
        tl.store(norms_T + token, 0.0)
    else:
        row, columns = logits_TV + token.to(tl.int64) * stride, tl.arange(0, BLOCK)
        # Finite at first, as a block of -inf alone would make NaN of -inf.
        greatest, total = -3.4e38, 0.0
        for start in range(0, V, BLOCK):
            x = tl.load(row + start + columns, mask=start + columns < V, other=float("-inf")).to(tl.float32)
            above = tl.maximum(greatest, tl.max(x, axis=0))
            total = total * tl.exp(greatest - above) + tl.sum(tl.exp(x - above), axis=0)
            greatest = above
        inside = (target >= 0) & (target < V)
        norm = tl.where(inside, greatest + tl.log(total), float("nan"))
        logit = tl.load(row + target, mask=inside, other=0.0).to(tl.float32)
        tl.store(losses_T + token, tl.where(inside, tl.log(total) + (greatest - logit), float("nan")))
        tl.store(norms_T + token, norm)


@triton.jit
def losses_backward_kernel(
    logits_TV,
    targets_T,
    norms_T,
    grad_losses_T,
    grad_logits_TV,
    stride,
    V,
    IGNORED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(softmax - 1 at the target) times the loss's gradient; a block of one token's logits a program."""
    token, columns = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    target, place = tl.load(targets_T + token), token.to(tl.int64)
    grad = tl.zeros([BLOCK], tl.float32)
    if target != IGNORED:
        x = tl.load(logits_TV + place * stride + columns, mask=columns < V, other=0.0).to(tl.float32)
        share = tl.exp(x - tl.load(norms_T + token))
        grad = (share - (columns == target).to(tl.float32)) * tl.load(grad_losses_T + token)
    tl.store(grad_logits_TV + place * V + columns, grad, mask=columns < V)


class TokenLosses(torch.autograd.Function):
    """(tokens,) fp32 out of logits (tokens, vocabulary), targets (tokens,) int64 and the ignored target."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, ignored: int) -> Tensor:
        """One program a token."""
        logits, targets = logits if logits.stride(1) == 1 else logits.contiguous(), targets.contiguous()
        tokens, vocabulary = logits.shape
        losses, norms = (logits.new_empty(tokens, dtype=torch.float32) for _ in range(2))
        ctx.options = {"IGNORED": ignored, "num_warps": WARPS}
        ctx.options["BLOCK"] = min(MAX_BLOCK, triton.next_power_of_2(vocabulary))
        if tokens:
            sizes = logits.stride(0), vocabulary
            with torch.cuda.device_of(logits):
                losses_kernel[(tokens,)](logits, targets, losses, norms, *sizes, **ctx.options)
        ctx.save_for_backward(logits, targets, norms)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor) -> tuple[Tensor, None, None]:
        """One program a block of a token's logits, in their dtype."""
        logits, targets, norms = ctx.saved_tensors
        tokens, vocabulary = logits.shape
        grad_logits = logits.new_empty(tokens, vocabulary)
        if tokens:
            programs, sizes = triton.cdiv(vocabulary, ctx.options["BLOCK"]), (logits.stride(0), vocabulary)
            tensors = logits, targets, norms, grad_losses.contiguous(), grad_logits
            with torch.cuda.device_of(logits):
                losses_backward_kernel[(tokens, programs)](*tensors, *sizes, **ctx.options)
        return grad_logits, None, None
