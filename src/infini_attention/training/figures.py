"""What a trained model comes to, with its memory and without."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from infini_attention.models import memory_off
from infini_attention.models.loss import IGNORED, predicted
from infini_attention.models.observe import gate_logits, gated_layers
from infini_attention.training.material import Material
from infini_attention.training.trainer import InfiniTrainer

Batch = dict[str, Any]


def measured(trainer: InfiniTrainer, material: Material) -> dict[str, float]:
    """What the trained model does, and where a gate can shut its memory off, what it does without."""
    model: Any = trainer.model
    gated = bool(gated_layers(model))
    figures = {"gate_max": gate_logits(model).sigmoid().max().item()} if gated else {}
    # Else rows are counted twice to make batches even, which sharded models need: all take part in each.
    trainer.accelerator.dataloader_config.even_batches = trainer.is_fsdp_enabled
    if material.validation is None:
        return figures
    measure = {"recall": _recall, "exact_match": _exact_match, "validation_loss": _loss}[material.figure]
    for part in material.validation if isinstance(material.validation, dict) else [None]:
        name = material.figure if part is None else f"{material.figure}_{part}"
        figures[name] = measure(trainer, part)
        if gated:
            with memory_off(model):
                figures[f"{name}_memory_off"] = measure(trainer, part)
    return {name: round(figure, 4) for name, figure in figures.items()}


def _recall(trainer: InfiniTrainer, part: str | None) -> float:
    """The part of the questions of a task that makes its own tokens that the model answers right."""

    def count(batch: Batch) -> tuple[Tensor, Tensor]:
        right, asked = _answers(trainer, batch)
        return right.sum(), asked.sum()

    return _ratio(trainer, part, count)


def _exact_match(trainer: InfiniTrainer, part: str | None) -> float:
    """The part of the prompts whose whole answer is what the model finds likeliest."""

    def count(batch: Batch) -> tuple[Tensor, Tensor]:
        right, asked = _answers(trainer, batch)
        whole = (right == asked).all(dim=1)
        return whole.sum(), torch.ones_like(whole).sum()

    return _ratio(trainer, part, count)


def _loss(trainer: InfiniTrainer, part: str | None) -> float:
    """Mean cross entropy in nats a token of the validation's windows, each read by itself."""

    def count(batch: Batch) -> tuple[Tensor, Tensor]:
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=1)
        return loss / trainer.accelerator.num_processes, predicted(batch)

    return _ratio(trainer, part, count)


@torch.no_grad()
def _ratio(
    trainer: InfiniTrainer, part: str | None, count: Callable[[Batch], tuple[Tensor, Tensor]]
) -> float:
    """The sum of what `count` gives first over that of what it gives second, for all processes' batches."""
    model: Any = trainer.model
    model.eval()
    sums = torch.zeros(2)
    for batch in trainer.get_eval_dataloader(part):
        sums += torch.stack(count(batch)).cpu()
    above, below = trainer.accelerator.reduce(sums.to(trainer.args.device)).tolist()
    return float(above / below)


def _answers(trainer: InfiniTrainer, batch: Batch) -> tuple[Tensor, Tensor]:
    """Where the model is right and where it is asked, each (rows, length) bool."""
    model: Any = trainer.model
    wanted = batch["shift_labels"]
    asked = wanted != IGNORED
    columns = asked.any(dim=0).nonzero().squeeze(1)  # all others go without logits
    logits = model(input_ids=batch["input_ids"], use_cache=False, logits_to_keep=columns).logits
    right = torch.zeros_like(asked)
    right[:, columns] = logits.argmax(dim=-1) == wanted[:, columns]
    return right & asked, asked
