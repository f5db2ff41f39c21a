"""From a recipe to a trained model."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from infini_attention.data.copy_task import CopyTask
from infini_attention.provenance import provenance
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.checkpoints import MODEL, RECIPE, SUMMARY, checkpoints, newest_checkpoint
from infini_attention.training.estimate import estimate
from infini_attention.training.figures import measured
from infini_attention.training.material import load_material, tokenizer_of
from infini_attention.training.models import make_model, segment_length_of
from infini_attention.training.recipe import Recipe
from infini_attention.training.tensorboard import MemoryBoard
from infini_attention.training.trainer import InfiniTrainer
from infini_attention.training.view import TrainingView


def train(recipe: Recipe, text: str) -> dict[str, Any]:
    """Train by `recipe`, whose text is kept beside the results; goes on where an earlier run was cut off.

    Returns the figures at the end. Raises ValueError where the folder holds a run of another recipe.
    """
    args = recipe.training
    assert args.output_dir is not None
    folder = Path(args.output_dir)
    _same_run(folder, text, args.should_save)
    set_seed(args.seed)
    material = load_material(recipe)
    model = make_model(recipe.model, material.vocab_size)
    trainer = InfiniTrainer(
        model=model,
        args=args,
        train_dataset=material.train,
        eval_dataset=material.validation,
        data_collator=material.collator,
        processing_class=material.tokenizer,
    )
    with _shown(trainer):
        trainer.train(resume_from_checkpoint=_going_on(args, folder))
    figures: dict[str, Any] = {"steps": trainer.state.global_step} | trainer.cost.figures()
    figures |= _untold(recipe)
    if trainer.stopped_by is not None:
        return figures | {"stopped_by": trainer.stopped_by, "output": str(folder)}
    figures |= measured(trainer, material) | {"output": str(folder / MODEL)}
    trainer.save_model(str(folder / MODEL))
    if args.should_save:
        summary = figures | {"provenance": asdict(provenance())}
        (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return figures


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """What `train` would run and need, without reading data or writing anything."""
    data, args = recipe.data, recipe.training
    if data.copy_task is not None:
        task = CopyTask(**asdict(data.copy_task))
        source, vocab_size, length = "the copy task", task.vocab_size, len(task[0]["input_ids"])
    elif data.associative_recall is not None:
        chosen = data.associative_recall
        source, vocab_size = "associative recall", chosen.vocab_size
        length = max(tokens for tokens, _ in chosen.grid)
    elif data.passkey is not None:
        length = data.passkey.most_segments * segment_length_of(recipe.model)
        source, vocab_size = "pass keys", len(tokenizer_of(recipe))
    elif data.summaries is not None:
        length, vocab_size = data.summaries.max_tokens, len(tokenizer_of(recipe))
        source = f"summaries of {data.summaries.documents.source}"
    else:
        assert data.documents is not None
        source = ", ".join(each.source for each in (data.documents, *data.more_documents))
        vocab_size, length = len(tokenizer_of(recipe)), data.length
    model = make_model(recipe.model, vocab_size)
    needs = asdict(estimate(model, args, length=length))
    figures = {"model": type(model).__name__, "data": source, "length": length, "device": str(args.device)}
    figures |= needs | {"steps": args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs} epochs"}
    if args.max_steps > 0:
        figures["hours"] = needs["seconds_a_step"] * args.max_steps / 3600
    return figures


def _untold(recipe: Recipe) -> dict[str, Any]:
    """What makes another system of the model, or another training of it, and its weights do not tell."""
    model, data, args = recipe.model, recipe.data, recipe.training
    told: dict[str, Any] = {"learning_rate": args.learning_rate}
    if model.memory:
        told["gate_learning_rate"] = args.gate_learning_rate
    if data.documents is not None:
        told["row_tokens"] = data.length
    if args.carry_memory:
        told["carried_through"] = data.carried_length or "documents"
    if args.reset_probability:
        told["reset_probability"] = args.reset_probability
    if args.read_again is not None:
        told["read_again"] = args.read_again
    told |= {name: True for name in ("carried_together", "carried_packed") if getattr(data, name)}
    if args.stop_gradient:
        told["stop_gradient"] = True
    if model.memory and model.gate_init not in (None, model.usual_gate_init):
        told["gate_init"] = model.gate_init
    return told


def _going_on(args: InfiniTrainingArguments, folder: Path) -> bool:
    """Whether there is a whole checkpoint; the first process looks before any of them writes."""
    with args.main_process_first(local=False, desc="looking for checkpoints"):
        return newest_checkpoint(folder)[0] is not None


def _same_run(folder: Path, text: str, writes: bool) -> None:
    """Keep the recipe in the run's folder; raise ValueError where it has another one's run, or is a file."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"training.output_dir is {folder}, which is a file; name a folder")
    kept = folder / RECIPE
    if kept.exists() and checkpoints(folder) and kept.read_text() != text:
        raise ValueError(
            f"{folder} holds a run of another recipe ({kept}); set training.output_dir to another folder, or "
            "delete this one"
        )
    if writes and not (kept.exists() and kept.read_text() == text):  # others may be reading it
        folder.mkdir(parents=True, exist_ok=True)
        kept.write_text(text)


@contextmanager
def _shown(trainer: InfiniTrainer) -> Iterator[None]:
    """Our views in place of transformers'."""
    view = TrainingView(lambda: trainer.observation, trainer.warnings.said)
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(view)
    if trainer.pop_callback(TensorBoardCallback) is not None:
        trainer.add_callback(MemoryBoard(lambda: trainer.observation))
    try:
        yield
    finally:
        view.close()
