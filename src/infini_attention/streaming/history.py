"""History: which tokens a state has seen, in a few bytes."""

import hashlib
from collections.abc import Iterable

import torch

START = hashlib.sha256(b"infini-attention").hexdigest()


class History:
    """A chain of hashes over whole segments, and the ids of the tokens after the last one.

    Two histories are equal when the same tokens were added, in whatever pieces.
    """

    def __init__(self, segment_length: int, digest: str = START, opened: Iterable[int] = ()) -> None:
        self.segment_length = segment_length
        self.digest = digest
        self.opened = list(opened)

    def add(self, ids: list[int]) -> None:
        """Note the next tokens."""
        self.opened += ids
        size = self.segment_length
        while len(self.opened) >= size:
            segment = torch.tensor(self.opened[:size], dtype=torch.int32).numpy().tobytes()
            self.digest = hashlib.sha256(bytes.fromhex(self.digest) + segment).hexdigest()
            self.opened = self.opened[size:]

    def copy(self) -> "History":
        """An independent history that goes on from here."""
        return History(self.segment_length, self.digest, self.opened)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, History) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]  # it changes
