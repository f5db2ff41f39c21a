"""Rows: sequences with caches of their own go on side by side, whatever layers their model has."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from infini_attention.models.cache import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.decoder import Committed, Decoder


class Rows:
    """Sequences of one model, each of which takes a token at every step.

    They decode in `decoder`. A model with layers that keep keys and values has none, and its sequences take
    their tokens one after the other.

    Args:
        model: an `infini_*` language model in evaluation mode.
        caches: of each sequence, which has read something; they belong to the rows from then on.
        decoder: one of the model with as many rows at least, which nobody else uses meanwhile; or None.
    """

    def __init__(self, model: Any, caches: Sequence[InfiniCache], decoder: Decoder | None) -> None:
        self._model, self._decoder = model, decoder
        self._caches = caches if decoder is None else []  # where there is one, the states are in it
        self._guests = [_Seated() for _ in caches]  # a decoder holds them by weak references
        self._logits = torch.empty(len(caches), model.config.vocab_size, device=model.device)
        if decoder is not None:
            for row, (guest, cache) in enumerate(zip(self._guests, caches, strict=True)):
                decoder.seat(row, guest, cache)

    @torch.inference_mode()
    def step(self, ids: dict[int, int]) -> Tensor:
        """Feed one token to each of some rows, by row; returns logits (rows, vocabulary) of all rows.

        Only those of the rows that were fed mean anything. They are valid until the next step.
        """
        if self._decoder is not None:
            return self._decoder.step(ids)[: len(self._guests)]
        for row, token in ids.items():
            output = self._model(
                input_ids=torch.tensor([[token]], device=self._model.device),
                use_cache=True,
                **{CACHE_ARGUMENT: self._caches[row]},
            )
            self._logits[row] = output.logits[0, -1]
        return self._logits


class _Seated:
    """Whoever sits in a decoder's row to the end."""

    def take_back(self, cache: InfiniCache) -> None:
        """The row is wanted for the next sequence, and this one has come to its end."""

    def fall_back(self, whole: Committed) -> None:
        """A step failed, whose exception says so."""
