"""The language-modelling loss in chunks, so that (length x vocabulary) logits never exist at once."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100


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
) -> Tensor:
    """Mean cross entropy in nats, fp32.

    Logits are made for `chunk` tokens at a time, and once more in the backward pass.

    Args:
        logits_of: from (tokens, hidden_size) to (tokens, vocabulary).
        hidden_states: (batch, length, hidden_size), the decoder's last.
        targets: (batch, length) int64; what each hidden state is to predict, -100 for nothing. See `shifted`.
        chunk: tokens whose logits are alive at once.
        num_items_in_batch: what the sum is divided by; default the tokens that are predicted here.
    """
    if chunk < 1:
        raise ValueError(f"loss_chunk is {chunk}; give at least 1, better some thousands")

    def loss_of(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(hidden).float(), wanted, ignore_index=IGNORED, reduction="sum")

    hidden, wanted = hidden_states.flatten(0, 1), targets.flatten()
    parts = zip(hidden.split(chunk), wanted.split(chunk), strict=True)
    # Nothing random happens here, so that no random state need be kept: a graph capture could not.
    losses = [checkpoint(loss_of, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    count = (wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return sum(losses[1:], losses[0]) / count
