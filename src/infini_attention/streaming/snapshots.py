"""A bounded number of earlier states, many of late and fewer of long ago."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from infini_attention.streaming.state_file import Snapshot


class Snapshots:
    """At most `most` snapshots in the host's memory, in the order of their tokens.

    When there is one too many, the one goes whose neighbours lie closest together for their age, so that the
    gaps between those left grow with age: log-spaced, whatever the length of the text.
    """

    def __init__(self, most: int) -> None:
        if most < 0:
            raise ValueError(f"snapshots is {most}; give how many to keep, 0 for none")
        self.most = most
        self._kept: list[Snapshot] = []

    @property
    def places(self) -> list[int]:
        """Tokens at which there is a snapshot, rising."""
        return [snapshot.tokens for snapshot in self._kept]

    def add(self, snapshot: Snapshot) -> None:
        """Keep a snapshot of later than all others."""
        tensors: dict[str, Any] = {
            name: _on_host(value) for name, value in vars(snapshot).items() if isinstance(value, Tensor)
        }
        self._kept.append(replace(snapshot, **tensors))
        if len(self._kept) > self.most:
            del self._kept[self._most_superfluous()]

    def at(self, tokens: int) -> Snapshot | None:
        """The snapshot of exactly so many tokens; None if there is none."""
        return next((snapshot for snapshot in self.all() if snapshot.tokens == tokens), None)

    def all(self) -> list[Snapshot]:
        """All of them, oldest first."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # copies to the host are under way without anyone waiting for them
        return list(self._kept)

    def forget_after(self, tokens: int) -> None:
        """Drop those of more than so many tokens."""
        self._kept = [snapshot for snapshot in self._kept if snapshot.tokens <= tokens]

    def copy(self) -> "Snapshots":
        """An independent collection of the same snapshots, which never change."""
        twin = Snapshots(self.most)
        twin._kept = list(self._kept)
        return twin

    def _most_superfluous(self) -> int:
        places = [0, *self.places]
        if len(places) == 2:
            return 0
        now = places[-1]

        def gap_for_age(number: int) -> float:
            before, after = places[number], places[number + 2]
            return (after - before) / (now - before)

        return min(range(len(places) - 2), key=gap_for_age)


def _on_host(x: Tensor) -> Tensor:
    """A copy in the host's memory; of a GPU's tensor it comes about without waiting."""
    if not x.is_cuda:
        return x.clone()
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)
