"""The language-modelling loss in chunks, so that (length x vocabulary) logits never exist at once."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORED = -100


def chunked_loss(
    logits_of: Callable[[Tensor], Tensor],
    hidden_states: Tensor,
    labels: Tensor,
    *,
    chunk: int,
    num_items_in_batch: Tensor | int | None = None,
) -> Tensor:
    """Mean next-token cross entropy in nats, fp32.

    Logits are made for `chunk` tokens at a time, and once more in the backward pass.

    Args:
        logits_of: from (tokens, hidden_size) to (tokens, vocabulary).
        hidden_states: (batch, length, hidden_size), the decoder's last.
        labels: (batch, length) int64; token t is predicted from the hidden state before it, and where the
            label is -100 it is not.
        chunk: tokens whose logits are alive at once.
        num_items_in_batch: what the sum is divided by; default the tokens that are predicted here.
    """
    if chunk < 1:
        raise ValueError(f"loss_chunk is {chunk}; give at least 1, better some thousands")

    def loss_of(hidden: Tensor, wanted: Tensor) -> Tensor:
        return F.cross_entropy(logits_of(hidden).float(), wanted, ignore_index=IGNORED, reduction="sum")

    hidden, wanted = hidden_states[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    parts = zip(hidden.split(chunk), wanted.split(chunk), strict=True)
    losses = [checkpoint(loss_of, *part, use_reentrant=False) for part in parts]
    count = (wanted != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
    return sum(losses[1:], losses[0]) / count
