"""A sequence task that a model can do with its memory alone: copy from some segments ago."""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from infini_attention.models.loss import IGNORED


class CopyTask(Dataset[dict[str, Tensor]]):
    """Which value did each key have, `segments_back` segments ago?

    A token says a key and a value: key * values + value; one more, the last, says nothing. The first segment
    gives every key a random value. Segments that say nothing follow. The last segment says every key again,
    in another order and with another random value, and at each the token that the first segment had for the
    key is to be predicted. The last segment by itself does not tell it: attention that reaches no further is
    right in one of `values` cases, and the values that it does see are in the memory's way as long as the
    gate is not open.

    Items are `input_ids` and `shift_labels`, each (length,) int64; shift_labels[t] is the answer expected at
    position t (there is no further shift), -100 outside the last segment. An item depends on the settings,
    `seed` and its index alone.

    Args:
        examples: how many items there are.
        keys: how many keys, which is also the length of a segment.
        values: how many values.
        segments_back: how many segments after the first one it is asked.
        seed: of the random values and orders.

    Raises:
        ValueError: a setting below 1, or fewer than 2 values, which leave nothing to know.
    """

    def __init__(
        self, examples: int, *, keys: int = 8, values: int = 16, segments_back: int = 2, seed: int = 0
    ) -> None:
        if min(examples, keys, segments_back) < 1 or values < 2:
            raise ValueError(
                f"examples, keys, segments_back are {examples}, {keys}, {segments_back} and values {values}; "
                "give at least 1 of each, and 2 values"
            )
        self.examples, self.keys, self.values = examples, keys, values
        self.segments_back, self.seed = segments_back, seed

    @property
    def segment_length(self) -> int:
        """Tokens a segment: the one that the model has to have."""
        return self.keys

    @property
    def vocab_size(self) -> int:
        """Number of tokens: a pair of every key and value, and one that says nothing."""
        return self.keys * self.values + 1

    @property
    def chance(self) -> float:
        """Share of right answers of a model that sees the last segment only."""
        return 1 / self.values

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The example number `index`."""
        # Not torch's generator, which keeps 32 bits of its seed.
        random = np.random.default_rng((self.seed, range(len(self))[index]))
        stored, shown = random.integers(self.values, size=(2, self.keys))
        pairs = np.arange(self.keys) * self.values
        told, asked = random.permutation(self.keys), random.permutation(self.keys)
        silence = np.full(self.keys * (self.segments_back - 1), self.vocab_size - 1)
        inputs = np.concatenate([(pairs + stored)[told], silence, (pairs + shown)[asked]])
        labels = np.full_like(inputs, IGNORED)
        labels[-self.keys :] = (pairs + stored)[asked]
        return {"input_ids": torch.from_numpy(inputs), "shift_labels": torch.from_numpy(labels)}
