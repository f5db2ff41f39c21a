"""What is handed on from whole segment to whole segment, row by row."""

from collections.abc import Callable

import torch
from torch import Tensor

from infini_attention.ops.layout import Whole

Runs = Tensor | slice  # some of the runs, by number


def scan(start: Tensor, block: Whole, step: Callable[[Tensor, Runs], Tensor]) -> tuple[Tensor, Tensor]:
    """The state before each run, in the order of the runs, and the state of each row after its last one.

    `start` is (rows, ...); `step` takes the states of some rows over the runs of the given numbers.
    """
    current, before = start, []
    if len(set(block.segments)) == 1:  # by slices, which ask for no indices on the device
        count = block.segments[0]
        for number in range(count):
            before.append(current)
            current = step(current, slice(number, None, count))
        return torch.stack(before, dim=1).flatten(0, 1), current
    steps = block.steps(start.device)
    for rows, runs in steps:
        before.append(current[rows])
        current = current.index_copy(0, rows, step(before[-1], runs))
    order = torch.cat([runs for _, runs in steps]).argsort()
    return torch.cat(before)[order], current
