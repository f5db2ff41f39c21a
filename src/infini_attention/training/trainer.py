"""InfiniTrainer: transformers' Trainer, with what a memory needs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from infini_attention.layers import MemoryGate
from infini_attention.training.parameters import parameter_groups
from infini_attention.training.segments import repeated_segments, some_segments


@dataclass
class InfiniTrainingArguments(TrainingArguments):
    """transformers' arguments, and those of the memory.

    Attributes:
        gate_learning_rate: of the gates; they have no weight decay.
        gate_warmup_steps: linear, of the gates alone; the body's decay follows.
        repeat_ceiling: how often a segment may count at most, drawn anew every step; 1 for never. See
            `segments.repeated_segments`.
        least_segments: inputs are cut to a random number of whole segments from here up; None for never.
        loss_chunk: tokens whose logits exist at once.
    """

    gate_learning_rate: float = field(default=1e-2)
    gate_warmup_steps: int = field(default=0)
    repeat_ceiling: float = field(default=1.0)
    least_segments: int | None = field(default=None)
    loss_chunk: int = field(default=2048)


class InfiniTrainer(Trainer):
    """Trains an `infini_*` language model; takes what transformers' Trainer takes.

    Its args are InfiniTrainingArguments. Gates are a parameter group of their own, the loss is made in
    chunks, and segments can repeat. A loss that is no number stops the training with FloatingPointError.
    """

    args: InfiniTrainingArguments

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if not isinstance(self.args, InfiniTrainingArguments):
            raise ValueError(f"args are {type(self.args).__name__}; give InfiniTrainingArguments")
        self.model_accepts_loss_kwargs = True  # losses are sums over a whole step, accumulation included
        self._random = torch.Generator().manual_seed(self.args.seed)
        self.add_callback(GateWatch())

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser that `args.optim` names, over `parameter_groups`."""
        if self.optimizer is None:
            whole: Any = self.model if model is None else model
            chosen, settings = self.get_optimizer_cls_and_kwargs(self.args, whole)
            groups = parameter_groups(
                whole,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                gate_learning_rate=self.args.gate_learning_rate,
            )
            self.optimizer = chosen(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The scheduler that the args name; the gates take its decay after a warm-up of their own."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR):
            warmup = self.args.get_warmup_steps(num_training_steps)
            for number, group in enumerate(scheduler.optimizer.param_groups):
                if group.get("name") == "gates":
                    body = scheduler.lr_lambdas[number]
                    factor = _gates_factor(body, warmup, self.args.gate_warmup_steps)
                    scheduler.lr_lambdas[number] = factor
                    group["lr"] = scheduler.base_lrs[number] * factor(scheduler.last_epoch)
        return scheduler

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        """Log, and with every loss the memory's share by the gates: least, mean and most over all heads."""
        if "loss" in logs:
            shares = gate_logits(self.model).sigmoid()
            figures = {"gate_min": shares.min(), "gate_mean": shares.mean(), "gate_max": shares.max()}
            logs |= {name: round(value.item(), 4) for name, value in figures.items()}
        super().log(logs, *arguments, **settings)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross entropy a token; of the whole step's tokens where `num_items_in_batch` counts them."""
        inputs, chunk = dict(inputs), self.args.loss_chunk
        if model.training:
            inputs = self._drawn(inputs)
        output = model(**inputs, use_cache=False, loss_chunk=chunk, num_items_in_batch=num_items_in_batch)
        if model.training and not torch.isfinite(output.loss):
            raise FloatingPointError(
                f"the loss is {output.loss.item()} at step {self.state.global_step}; go on from the last "
                f"checkpoint in {self.args.output_dir} with a lower learning rate"
            )
        return (output.loss, {"loss": output.loss}) if return_outputs else output.loss

    def _drawn(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The inputs of this step: so many segments, each so often."""
        model: Any = self.model
        size, (rows, length) = model.config.segment_length, inputs["labels"].shape
        if self.args.least_segments is not None:
            length = some_segments(length, size, self.args.least_segments, generator=self._random)
            inputs = {name: x[:, -length:] for name, x in inputs.items()}
        if self.args.repeat_ceiling > 1:
            segments = math.ceil(length / size)
            weights = repeated_segments(rows, segments, self.args.repeat_ceiling, generator=self._random)
            inputs["segment_weights"] = weights.to(inputs["labels"].device)
        return inputs


class GateWatch(TrainerCallback):
    """Says in words when the gates do not move."""

    patience = 200  # steps after which gates that stay within `least` of their start are worth a word
    least = 0.05

    def __init__(self) -> None:
        self._start: Tensor | None = None
        self._said = False

    def on_train_begin(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """Remember where the gates start."""
        self._start = gate_logits(model)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, float] | None = None,
        **_: Any,
    ) -> None:
        """Say once when the gates stay where they were."""
        if logs is None or model is None or "loss" not in logs:
            return
        logits = gate_logits(model)
        moved = 0.0 if self._start is None else (logits - self._start).abs().max().item()
        if state.global_step >= self.patience and moved < self.least and not self._said:
            self._said = True
            print(
                f"gates have moved by {moved:.3f} at most in {state.global_step} steps: the memory is not "
                "being used; raise gate_learning_rate, or check that inputs have several segments"
            )


def gate_logits(model: Any) -> Tensor:
    """All gates' logits, (layers with a memory, heads) fp32 on the CPU."""
    gates = [module for module in model.modules() if isinstance(module, MemoryGate)]
    return torch.stack([gate.logits.detach().float().cpu() for gate in gates])


def _gates_factor(body: Callable[[int], float], warmup: int, own: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / own if own else 1.0) * (body(step) if step >= warmup else 1.0)

    return factor
