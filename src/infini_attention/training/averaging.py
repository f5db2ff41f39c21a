"""A running average of the weights, which takes their place at the end of a training."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

FIRST_STEPS = 10  # of the average's warm-up: early on it forgets faster than its decay says


class AveragedWeights(TrainerCallback):
    """Exponential moving average of what is trained, after every optimiser step t = 1, 2, ...

        average <- d average + (1 - d) weights,  d = min(decay, t / (FIRST_STEPS + t - 1))

    The last steps of a training move the weights about a mean that none of them stands at; the average is
    nearer to it (Polyak and Juditsky, 1992), at no cost in steps.

    Args:
        model: whose parameters that require gradients are averaged, in their own dtype and place.
        decay: between 0 and 1, so 0.999 averages some 1,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._weights = [each for each in model.parameters() if each.requires_grad]
        self._average: list[Tensor] | None = None
        self._decay = decay

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Begin with the weights as they are, unless a checkpoint's average was loaded."""
        if self._average is None:
            self._average = [each.detach().clone() for each in self._weights]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the step's weights into the average."""
        assert self._average is not None
        step = state.global_step
        decay = min(self._decay, step / (FIRST_STEPS + step - 1))
        torch._foreach_lerp_(self._average, [each.detach() for each in self._weights], 1 - decay)

    def forget(self) -> None:
        """Begin anew with the next training."""
        self._average = None

    def take(self) -> None:
        """Put the average in the place of the weights."""
        assert self._average is not None
        for weight, average in zip(self._weights, self._average, strict=True):
            weight.data.copy_(average)

    def save(self) -> list[Tensor]:
        """What `load` takes."""
        assert self._average is not None
        return self._average

    def load(self, saved: list[Tensor]) -> None:
        """Go on from what `save` gave; ValueError for a checkpoint of a training without an average."""
        if not saved:
            raise ValueError(
                "ema_decay is set, and the checkpoint is of a training without it; leave it out, or start "
                "anew from the checkpoint's weights"
            )
        self._average = [average.to(weight) for average, weight in zip(saved, self._weights, strict=True)]
