"""What a trained model comes to, with its memory and without."""

from typing import Any

import torch

from infini_attention.models import memory_off
from infini_attention.models.loss import IGNORED, shifted
from infini_attention.models.observe import gate_logits
from infini_attention.training.material import Material
from infini_attention.training.trainer import InfiniTrainer


def measured(trainer: InfiniTrainer, material: Material) -> dict[str, float]:
    """What the trained model does with its memory, and without."""
    model: Any = trainer.model
    figures = {"gate_max": gate_logits(model).sigmoid().max().item()}
    # Else rows are counted twice to make batches even, which sharded models need: all take part in each.
    trainer.accelerator.dataloader_config.even_batches = trainer.is_fsdp_enabled
    if material.validation is None:
        return figures
    measure = {"recall": _recall, "exact_match": _exact_match, "validation_loss": _loss}[material.figure]
    for part in material.validation if isinstance(material.validation, dict) else [None]:
        name = material.figure if part is None else f"{material.figure}_{part}"
        figures[name] = measure(trainer, part)
        with memory_off(model):
            figures[f"{name}_memory_off"] = measure(trainer, part)
    return {name: round(figure, 4) for name, figure in figures.items()}


@torch.no_grad()
def _recall(trainer: InfiniTrainer, part: str | None) -> float:
    """The part of the copy task's questions that the model answers right."""
    model: Any = trainer.model
    model.eval()
    counts = torch.zeros(2)
    for batch in trainer.get_eval_dataloader(part):
        wanted = batch["shift_labels"]
        answers = model(input_ids=batch["input_ids"], use_cache=False).logits.argmax(dim=-1)
        asked = wanted != IGNORED
        counts += torch.stack([(answers[asked] == wanted[asked]).sum(), asked.sum()]).cpu()
    right, asked_for = trainer.accelerator.reduce(counts.to(trainer.args.device)).tolist()
    return float(right / asked_for)


@torch.no_grad()
def _exact_match(trainer: InfiniTrainer, part: str | None) -> float:
    """The part of the prompts whose whole answer is what the model finds likeliest."""
    model: Any = trainer.model
    model.eval()
    counts = torch.zeros(2)
    for batch in trainer.get_eval_dataloader(part):
        wanted = batch["shift_labels"]
        asked = wanted != IGNORED
        hidden = model.base_model(input_ids=batch["input_ids"], use_cache=False).last_hidden_state
        answers = torch.full_like(wanted, IGNORED)
        answers[asked] = model.logits_of(hidden[asked]).argmax(dim=-1)
        right = (answers == wanted).all(dim=1)
        counts += torch.tensor([right.sum().item(), len(right)])
    exact, prompts = trainer.accelerator.reduce(counts.to(trainer.args.device)).tolist()
    return float(exact / prompts)


@torch.no_grad()
def _loss(trainer: InfiniTrainer, part: str | None) -> float:
    """Mean cross entropy in nats a token of the validation's windows, each read by itself."""
    model: Any = trainer.model
    model.eval()
    sums = torch.zeros(2)
    for batch in trainer.get_eval_dataloader(part):
        loss = trainer.compute_loss(model, batch, num_items_in_batch=1) / trainer.accelerator.num_processes
        targets = shifted(batch.get("labels"), batch.get("shift_labels"))
        sums += torch.stack([loss, (targets != IGNORED).sum()]).cpu()
    total, tokens = trainer.accelerator.reduce(sums.to(trainer.args.device)).tolist()
    return float(total / tokens)
