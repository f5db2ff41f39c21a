"""MemoryWarnings: says in words, once, what goes wrong with a memory while it is trained."""

import logging
from collections import Counter, deque
from collections.abc import Callable
from statistics import fmean, pstdev
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from infini_attention.layers import MemoryGate
from infini_attention.models.observe import Observation, gate_logits

logger = logging.getLogger("infini_attention.training")


class MemoryWarnings(TrainerCallback):
    """Warns, through the logger `infini_attention.training`, of gates and memories that do not do their work.

    Each cause is spoken of once in a training, with its remedy; a loss that leaps, once each time. Where no
    gate is trained, as in a control without memory, only the loss is watched.

    Args:
        observation: gives the latest Observation, or None while there is none.

    Attributes:
        said: all warnings so far, in order.
    """

    patience = 200  # steps that gates, and a memory that helps nothing, are given
    in_a_row = 3  # observations that have to agree
    least_move = 0.05  # in logits; gates that stay within it of their start do not move
    shut = 1e-3  # a share below this is as good as none
    full = 0.9  # saturation from here up
    window = 50  # logged losses that the next is compared with
    least_window = 10  # losses without which there is no comparison
    deviations = 5.0  # so far above the window's mean, a loss is a leap
    least_leap = 0.05  # and by so much of the mean, for losses that hardly vary

    def __init__(self, observation: Callable[[], Observation | None] = lambda: None) -> None:
        self.said: list[str] = []
        self._observation = observation
        self._last: Observation | None = None
        self._held: Counter[str] = Counter()
        self._losses: deque[float] = deque(maxlen=self.window)
        self._start: Tensor | None = None  # where the gates start, if they are trained
        self._first_step = 0

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Remember where the gates start; an earlier training is forgotten, but for what was said."""
        self._held.clear()
        self._losses.clear()
        gates = [module for module in model.modules() if isinstance(module, MemoryGate)]
        trained = any(gate.logits.requires_grad for gate in gates)
        self._start, self._first_step = gate_logits(model) if trained else None, state.global_step

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Look at the latest figures, where they are of training."""
        if logs is None or "loss" not in logs:
            return
        # By every process: sharded gates are gathered.
        moved = None if self._start is None else (gate_logits(model) - self._start).abs().max().item()
        if not state.is_world_process_zero:
            return
        self._look_at_loss(logs["loss"], state.global_step)
        if moved is None:
            return
        steps = state.global_step - self._first_step
        self._look_at_gates(moved, steps)
        observation = self._observation()
        if observation is not None and observation is not self._last:
            self._last = observation
            self._look_at_memory(observation, steps)

    def _look_at_loss(self, loss: float, step: int) -> None:
        if len(self._losses) >= self.least_window:
            mean, deviation = fmean(self._losses), pstdev(self._losses)
            if loss > mean + max(self.deviations * deviation, self.least_leap * abs(mean)):
                self._losses.clear()  # what follows is compared with what follows
                self._say(
                    f"the loss leapt to {loss:.3f} at step {step}, from {mean:.3f} on average before; if it "
                    "does not come back, go on from an earlier checkpoint with a lower learning_rate or "
                    "max_grad_norm, and look at the texts of that step"
                )
        self._losses.append(loss)

    def _look_at_gates(self, moved: float, steps: int) -> None:
        self._say_if(
            "gates do not move",
            steps >= self.patience and moved < self.least_move,
            f"gates have moved by {moved:.3f} at most in {steps} steps: the memory is not being used; raise "
            "gate_learning_rate, or check that inputs have several segments",
        )

    def _look_at_memory(self, seen: Observation, steps: int) -> None:
        share = seen.share.max().item()
        self._say_if(
            "nothing is read",
            share == 0,
            "no token had a memory to read: inputs are no longer than a segment, and nothing trains the "
            "memory; give inputs of 16 segments or more, or lower segment_length",
            self.in_a_row,
        )
        self._say_if(
            "gates are shut",
            steps >= self.patience and 0 < share < self.shut,
            f"the gates are as good as shut: the memory's share is {share:.3%} at most in every head; start "
            "them higher (gate_init), warm them up (gate_warmup_steps), and train on texts whose later "
            "segments need the earlier ones",
            self.in_a_row,
        )
        self._say_if(
            "memory is useless",
            steps >= self.patience and share >= self.shut and seen.memory_gain <= 0,
            f"the memory makes {seen.share.mean():.1%} of what attention puts out, and the loss without it "
            f"is no higher ({seen.loss_memory_off:.4f} against {seen.loss:.4f} with it); train on inputs of "
            "16 segments or more, of texts whose later segments need the earlier ones",
            self.in_a_row,
        )
        recalled = 1 - seen.saturation.mean().item()
        self._say_if(
            "memory is full",
            recalled < 1 - self.full,
            f"the memory is full: what it answers to the keys it was given correlates by only {recalled:.2f} "
            "with their values; use update_rule='delta', a wider feature_map such as 'dpfp', more kv_heads, "
            "or fewer tokens a text",
            self.in_a_row,
        )

    def _say_if(self, cause: str, holds: bool, words: str, times: int = 1) -> None:
        """Say `words` when `cause` has held so many `times` in a row, unless they have been said."""
        if self._held[cause] == times:
            return
        self._held[cause] = self._held[cause] + 1 if holds else 0
        if self._held[cause] == times:
            self._say(words)

    def _say(self, words: str) -> None:
        self.said.append(words)
        logger.warning(words)
