"""Multi-query associative recall (MQAR): pairs of a key and a value, then the keys again among random tokens.

The task of "Zoology" (arXiv 2312.04927), and two harder ones: keys asked in a later segment than
they were told in, and keys told anew with another value.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from infini_attention.models.loss import IGNORED

BATCH, ITEM = 0, 1  # what is drawn for a batch, and for an item


@dataclass(frozen=True)
class RecallExample:
    """One row, each tensor (length,) int64.

    Attributes:
        input_ids: its tokens.
        shift_labels: the value to be predicted where a key is asked, after that key; -100 elsewhere.
        old_labels: the value that the key had before, where one is asked that was told anew; -100 elsewhere.
    """

    input_ids: Tensor
    shift_labels: Tensor
    old_labels: Tensor


class AssociativeRecall(Dataset[dict[str, Tensor]]):
    """Which value was told with each key?

    A row begins with its pairs, key and value side by side. Each key comes once more, where its value is to
    be predicted: after the pairs, in one of the places 0, 2, 4, ... Places are drawn without repeats, the
    n-th with a probability like n^(power_a - 1). All other tokens are random, but never one of the row's
    keys, so that none of them tells a key or asks for one (in the original they may, by chance). Keys are
    tokens from 1 up to half of the vocabulary, values those from there on; no two in a row are alike.

    Items are `input_ids` and `shift_labels`, each (length,) int64; shift_labels[t] is the value expected
    after the key input_ids[t], -100 where none is. The items of a batch are of one cell of the grid, drawn
    for the batch: torch's DataLoader asks for a batch at once, by `__getitems__`. All depends on the
    settings, `seed` and the batch's indices alone.

    Args:
        examples: how many items there are.
        grid: cells, each tokens in a row and pairs to know; one that stands there twice is drawn twice as
            often. The paper's are (64, 4), (128, 8), (256, 16) and (512, 64).
        vocab_size: number of tokens.
        power_a: 1 draws places uniformly; near 0, as in the paper, most are close to the pairs.
        segment_length: of the model, in tokens. Where given, pairs that are told anew and keys that are asked
            each begin with a segment, so that every key is asked in a later segment than it was told in, and
            only a memory knows it. None for the original, one after the other.
        rewrites: share of the keys, rounded to whole ones, that are told a second time, with another value,
            after all pairs and before any key is asked. The newest value is the right one.
        seed: of all that is random.

    Raises:
        ValueError: no example, cell or pair, a power_a that is not positive, a share outside 0 to 1, and
            cells that have no room in their length or their vocabulary.
    """

    def __init__(
        self,
        examples: int,
        *,
        grid: Sequence[tuple[int, int]] = ((64, 4),),
        vocab_size: int = 8192,
        power_a: float = 0.01,
        segment_length: int | None = None,
        rewrites: float = 0.0,
        seed: int = 0,
    ) -> None:
        if examples < 1 or not grid or min(pairs for _, pairs in grid) < 1:
            raise ValueError(
                f"examples is {examples} and grid {[*grid]}; give at least 1 example, and one cell of tokens "
                "and pairs, such as [64, 4]"
            )
        if segment_length is not None and segment_length < 1:
            raise ValueError(f"segment_length is {segment_length}; give at least 1, or None")
        if not power_a > 0:
            raise ValueError(f"power_a is {power_a}; give a number above 0, such as 0.01")
        if not 0 <= rewrites <= 1:
            raise ValueError(f"rewrites is {rewrites}; give a share from 0 to 1")
        self.examples, self.grid, self.vocab_size, self.power_a = examples, [*grid], vocab_size, power_a
        self.segment_length, self.rewrites, self.seed = segment_length, rewrites, seed
        for length, pairs in grid:
            self._check(length, pairs)

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The example number `index`, as a batch of its own."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """The examples of a batch, all of the same length and with as many pairs."""
        numbers = [range(len(self))[index] for index in indices]
        random = np.random.default_rng((self.seed, numbers[0], BATCH))
        length, pairs = self.grid[random.integers(len(self.grid))]
        rows = [self.example(number, length, pairs) for number in numbers]
        return [{"input_ids": row.input_ids, "shift_labels": row.shift_labels} for row in rows]

    def example(self, number: int, length: int, pairs: int) -> RecallExample:
        """The example `number` as it is in a batch of this cell."""
        random = np.random.default_rng((self.seed, number, ITEM))
        rewritten = self._rewritten(pairs)
        again, asked = self._starts(pairs)
        half = self.vocab_size // 2
        keys = 1 + random.choice(half - 1, pairs, replace=False)
        told = half + random.choice(self.vocab_size - half, pairs + rewritten, replace=False)
        changed, first, second = random.permutation(pairs)[:rewritten], told[:pairs], told[pairs:]
        newest = first.copy()
        newest[changed] = second
        others = np.delete(np.arange(self.vocab_size), keys)
        inputs = random.choice(others, length)
        inputs[: 2 * pairs] = _side_by_side(keys, first)
        inputs[again : again + 2 * rewritten] = _side_by_side(keys[changed], second)
        places = asked + 2 * self._drawn(random, (length - asked) // 2, pairs)
        inputs[places] = keys
        labels, old = np.full((2, length), IGNORED)
        labels[places], old[places[changed]] = newest, first[changed]
        return RecallExample(*map(torch.from_numpy, (inputs, labels, old)))

    def _rewritten(self, pairs: int) -> int:
        return round(self.rewrites * pairs)

    def _starts(self, pairs: int) -> tuple[int, int]:
        """Where keys begin to be told anew, and where they begin to be asked."""
        again = self._next_segment(2 * pairs)
        return again, self._next_segment(again + 2 * self._rewritten(pairs))

    def _next_segment(self, place: int) -> int:
        """The first place from `place` on that may begin something."""
        return place if self.segment_length is None else place + -place % self.segment_length

    def _drawn(self, random: np.random.Generator, places: int, count: int) -> np.ndarray:
        """Numbers from 0 to `places` - 1, in the order in which a draw without repeats finds them.

        Those with the greatest log-probabilities plus Gumbel noise are such a draw (arXiv 1903.06059).
        """
        logits = (self.power_a - 1) * np.log(np.arange(1, places + 1))
        return np.argsort(-(logits + random.gumbel(size=places)))[:count]

    def _check(self, length: int, pairs: int) -> None:
        """Raise ValueError where a cell has no room."""
        told, half = pairs + self._rewritten(pairs), self.vocab_size // 2
        if half - 1 < pairs or self.vocab_size - half < told:
            raise ValueError(
                f"vocab_size is {self.vocab_size}, and {pairs} pairs take {pairs} keys of its lower half and "
                f"{told} values of its upper half; give at least {2 * max(pairs + 1, told)}, or fewer pairs"
            )
        needed = self._starts(pairs)[1] + 2 * pairs
        if length < needed:
            where = "" if self.segment_length is None else f" in segments of {self.segment_length}"
            raise ValueError(
                f"the grid has {pairs} pairs in {length} tokens, and to tell and to ask them{where} takes "
                f"{needed}; give a longer length, or fewer pairs and rewrites"
            )


def _side_by_side(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.stack([keys, values], axis=1).reshape(-1)
