"""The language-modelling loss in chunks, so that (length x vocabulary) logits never exist at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from infini_attention.ops.cross_entropy import IGNORED, cross_entropy

__all__ = ["IGNORED", "Teaching", "asked_for", "chunked_loss", "logits_of", "predicted", "shifted"]


@dataclass(frozen=True)
class Teaching:
    """What another model says to the first tokens of every row (distillation, arXiv 1503.02531).

    Attributes:
        hidden_states: (batch, tokens, its hidden_size), its decoder's last.
        logits_of: from (tokens, its hidden_size) to (tokens, vocabulary).
        weight: of its Kullback-Leibler divergence from ours, beside the cross entropy.
    """

    hidden_states: Tensor
    logits_of: Callable[[Tensor], Tensor]
    weight: float


def shifted(labels: Tensor | None, shift_labels: Tensor | None = None) -> Tensor:
    """Labels that stand where they are predicted, (batch, length) int64: `shift_labels`, if there are any.

    Else `labels` moved one place to the left. Raises ValueError where there are neither.
    """
    if shift_labels is not None:
        return shift_labels
    if labels is None:
        raise ValueError("loss_chunk is set and there are no labels; give labels, or leave it out")
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def predicted(inputs: dict[str, Any]) -> Tensor:
    """How many tokens a batch with `labels` or `shift_labels` predicts, 0-dim int64."""
    return (shifted(inputs.get("labels"), inputs.get("shift_labels")) != IGNORED).sum()


def asked_for(hidden_states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states (1, tokens, hidden_size) and targets (1, tokens) of the places that predict something."""
    wanted = targets != IGNORED
    return hidden_states[wanted][None], targets[wanted][None]


def chunked_loss(
    logits_of: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    targets: Tensor,
    *,
    chunk: int,
    num_items_in_batch: Tensor | int | None = None,
    teaching: Teaching | None = None,
) -> Tensor:
    """Mean cross entropy in nats, fp32, and a teacher's divergence, where there is one.

    Logits are made for `chunk` tokens at a time, and once more in the backward pass.

    Args:
        logits_of: from (tokens, hidden_size) to (tokens, vocabulary).
        hidden_states: (batch, length, hidden_size), the decoder's last.
        targets: (batch, length) int64; what each hidden state is to predict, -100 for nothing. See `shifted`.
        chunk: tokens whose logits are alive at once.
        num_items_in_batch: what the sums are divided by; default the tokens that are predicted here.
        teaching: adds `weight` times the sum of KL(teacher || model) over the tokens that it has read and
            that predict something.
    """
    if chunk < 1:
        raise ValueError(f"loss_chunk is {chunk}; give at least 1, better some thousands")
    if targets.shape != hidden_states.shape[:-1]:
        raise ValueError(
            f"labels are {tuple(targets.shape)}, and there are {tuple(hidden_states.shape[:-1])} tokens; "
            "give one label a token"
        )

    def entropy(hidden: Tensor, wanted: Tensor) -> Tensor:
        return cross_entropy(logits_of(hidden), wanted)

    def divergence(hidden: Tensor, wanted: Tensor, theirs: Tensor) -> Tensor:
        assert teaching is not None
        logits = (make(x).float() for make, x in ((logits_of, hidden), (teaching.logits_of, theirs)))
        ours, taught = (torch.log_softmax(each, dim=-1) for each in logits)
        lost = F.kl_div(ours, taught, reduction="none", log_target=True).sum(dim=-1)
        return lost.masked_fill(wanted == IGNORED, 0.0).sum()

    total = _summed(entropy, hidden_states, targets, chunk=chunk)
    if teaching is not None:
        first = slice(teaching.hidden_states.shape[1])
        taught = hidden_states[:, first], targets[:, first], teaching.hidden_states
        total = total + teaching.weight * _summed(divergence, *taught, chunk=chunk)
    return total / ((targets != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch)


def logits_of(model: Any, hidden_states: Tensor) -> Tensor:
    """The logits that a family's language model makes of its decoder's last hidden states."""
    config, logits = model.config, model.lm_head(hidden_states)
    if scaling := getattr(config, "logits_scaling", None):  # Granite
        logits = logits / scaling
    if cap := getattr(config, "final_logit_softcapping", None):  # Gemma 2
        logits = torch.tanh(logits / cap) * cap
    assert isinstance(logits, Tensor)
    return logits


def _summed(loss_of: Callable[..., Tensor], *tensors: Tensor, chunk: int) -> Tensor:
    """The sum of `loss_of` over all tokens of (batch, length, ...) tensors, so many at a time."""
    parts = zip(*(tensor.flatten(0, 1).split(chunk) for tensor in tensors), strict=True)
    # Nothing random happens here, so that no random state need be kept: a graph capture could not.
    losses = [checkpoint(loss_of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return sum(losses[1:], losses[0])
