"""What is drawn at random about segments: how many there are, and how often each one counts."""

import math
from typing import Any

import torch
from torch import Tensor

from infini_attention.models.loss import IGNORED


def repeated_segments(
    rows: int, segments: int, ceiling: float, *, generator: torch.Generator | None = None
) -> Tensor:
    """Weights (rows, segments) fp32, as if each segment had stood there that often.

    Half of the segments count once; the others exp(u v log ceiling) times, with u uniform in [0, 1] by
    segment and v by row. So a model that is trained on short inputs learns to find little among much.

    Raises ValueError for a ceiling below 1.
    """
    if not ceiling >= 1:
        raise ValueError(f"ceiling is {ceiling}; give at least 1, which repeats nothing")
    once = torch.rand(rows, segments, generator=generator) < 0.5
    spread = torch.rand(rows, segments, generator=generator) * torch.rand(rows, 1, generator=generator)
    return torch.where(once, 1.0, torch.exp(spread * math.log(ceiling)))


def risen(ceiling: float, start_step: int, warmup_steps: int, step: int) -> float:
    """The ceiling at `step`: 1 until the start, then up to `ceiling`, by the same factor every step."""
    if step < start_step:
        return 1.0
    warm = step - start_step
    return ceiling if warm >= warmup_steps else ceiling ** (warm / warmup_steps)


def some_segments(
    length: int, segment_length: int, least: int, *, generator: torch.Generator | None = None
) -> int:
    """A length of whole segments up to `length`, their number drawn uniformly from `least` up."""
    most = length // segment_length
    if not 1 <= least <= most:
        raise ValueError(f"at least {least} segments are wanted, and inputs have {most}; give fewer")
    return int(torch.randint(least, most + 1, (), generator=generator)) * segment_length


def most_segments(segments: int, least: int, curriculum_steps: int, step: int) -> int:
    """The most segments of inputs at `step`: from `least` up to `segments`, over so many steps."""
    if not curriculum_steps:
        return segments
    return min(segments, least + int((segments - least) * min(1.0, step / curriculum_steps)))


def last_asked(targets: Tensor, segment_length: int) -> int:
    """Where the last segment ends in which any of (rows, length) targets predicts something, or 0."""
    asked = (targets != IGNORED).any(dim=0).nonzero()
    end = 0 if asked.numel() == 0 else int(asked[-1]) + 1
    return min(targets.shape[1], -(-end // segment_length) * segment_length)


def cut(inputs: dict[str, Any], span: slice) -> dict[str, Any]:
    """A batch whose tensors of tokens, (rows, length), hold those of `span`; what else it holds stays."""
    length = inputs["input_ids"].shape[1]

    def is_tokens(x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 1 and x.shape[1] == length

    return {name: x[:, span] if is_tokens(x) else x for name, x in inputs.items()}
