"""From a recipe to a trained model."""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch.utils.data import Dataset
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    default_data_collator,
    set_seed,
)
from transformers.integrations import TensorBoardCallback

from infini_attention.data.copy_task import CopyTask
from infini_attention.data.passkey import PasskeyTask
from infini_attention.data.shards import TokenStore, tokenized
from infini_attention.data.tokenizers import open_tokenizer
from infini_attention.data.windows import CarriedWindows, PackedDocuments, Windows
from infini_attention.layers import MemoryGate
from infini_attention.models import FAMILIES, load_model, memory_off, retrofit
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.loss import IGNORED, shifted
from infini_attention.models.memory_off import SHUT
from infini_attention.models.observe import gate_logits
from infini_attention.provenance import provenance
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.checkpoints import checkpoints, newest_checkpoint
from infini_attention.training.estimate import estimate
from infini_attention.training.recipe import DataRecipe, ModelRecipe, PasskeyRecipe, Recipe
from infini_attention.training.tensorboard import MemoryBoard
from infini_attention.training.trainer import InfiniTrainer
from infini_attention.training.view import TrainingView

RECIPE, SUMMARY, MODEL = "recipe.yaml", "summary.json", "model"  # what a run leaves in its folder
HELD_OUT = 1000  # sequences of the copy task that recall is measured on
HELD_OUT_PROMPTS, LONGER = (
    128,
    4,
)  # with pass keys, as long as the longest trained on, and so many times longer


@dataclass(frozen=True)
class Material:
    """What a model is trained on, and the `figure` that its validation, or each part of it, is to give."""

    train: Dataset
    validation: Dataset | dict[str, Dataset] | None
    figure: str
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase | None
    collator: Callable[..., Any] = default_data_collator


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
    started = time.monotonic()
    with _shown(trainer):
        trainer.train(resume_from_checkpoint=_going_on(args, folder))
    figures: dict[str, Any] = {
        "steps": trainer.state.global_step,
        "seconds": round(time.monotonic() - started, 1),
    }
    if trainer.stopped_by is not None:
        return figures | {"stopped_by": trainer.stopped_by, "output": str(folder)}
    figures |= _measured(trainer, material) | {"output": str(folder / MODEL)}
    trainer.save_model(str(folder / MODEL))
    if args.should_save:
        summary = figures | {"provenance": asdict(provenance())}
        (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    return figures


def _going_on(args: InfiniTrainingArguments, folder: Path) -> bool:
    """Whether there is a whole checkpoint; the first process looks before any of them writes."""
    with args.main_process_first(local=False, desc="looking for checkpoints"):
        return newest_checkpoint(folder)[0] is not None


def dry_run(recipe: Recipe) -> dict[str, Any]:
    """What `train` would run and need, without reading data or writing anything."""
    data, args = recipe.data, recipe.training
    if data.copy_task is not None:
        task = CopyTask(**asdict(data.copy_task))
        source, vocab_size, length = "the copy task", task.vocab_size, len(task[0]["input_ids"])
    elif data.passkey is not None:
        length = data.passkey.most_segments * recipe.model.segment_length
        source, vocab_size = "pass keys", len(_tokenizer(recipe))
    else:
        assert data.documents is not None
        source, vocab_size, length = data.documents.source, len(_tokenizer(recipe)), data.length
    model = make_model(recipe.model, vocab_size)
    needs = asdict(estimate(model, args, length=length))
    figures = {"model": type(model).__name__, "data": source, "length": length, "device": str(args.device)}
    figures |= needs | {"steps": args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs} epochs"}
    if args.max_steps > 0:
        figures["hours"] = needs["seconds_a_step"] * args.max_steps / 3600
    return figures


def make_model(recipe: ModelRecipe, vocab_size: int) -> Any:
    """The model, in fp32: fresh, retrofitted, or as it is where it has memories; raises ValueError."""
    settings: dict[str, Any] = {
        "segment_length": recipe.segment_length,
        "update_rule": recipe.update_rule,
        "feature_map": recipe.feature_map,
        "empty_memory": recipe.empty_memory,
    }
    if recipe.base is None:
        gate_init = 0.0 if recipe.gate_init is None else recipe.gate_init
        model = _fresh(recipe, vocab_size, settings | {"gate_init": gate_init})
    else:
        model = load_model(recipe.base, dtype=torch.float32)
        if isinstance(model.config, InfiniConfigMixin):
            _refuse_memory_settings(recipe)
        else:
            gate_init = -4.0 if recipe.gate_init is None else recipe.gate_init
            model = retrofit(model, layers=recipe.layers, gate_init=gate_init, **settings)
    if model.config.vocab_size < vocab_size:
        raise ValueError(
            f"the data has {vocab_size} tokens and model.base {recipe.base} knows {model.config.vocab_size}; "
            "use the base's tokenizer"
        )
    if not recipe.memory:
        _shut_for_good(model)
    return model


def _refuse_memory_settings(recipe: ModelRecipe) -> None:
    """Raise ValueError for settings of a memory that a base with memories has already."""
    names = ("segment_length", "update_rule", "feature_map", "empty_memory", "layers", "gate_init")
    given = [name for name in names if getattr(recipe, name) != getattr(ModelRecipe(), name)]
    if given:
        raise ValueError(
            f"model.base {recipe.base} has memories already, and model.{', model.'.join(given)} would change "
            "them; leave these out"
        )


def load_material(recipe: Recipe) -> Material:
    """The data of a recipe; documents are tokenised once, by one process."""
    data, args = recipe.data, recipe.training
    if data.copy_task is not None:
        task = CopyTask(**asdict(data.copy_task), seed=args.seed)
        fresh = CopyTask(**asdict(replace(data.copy_task, examples=HELD_OUT)), seed=args.seed + 1)
        return Material(task, fresh, "recall", task.vocab_size, None)
    if data.passkey is not None:
        return _passkeys(recipe, data.passkey)
    assert data.documents is not None
    tokenizer, held_out = _tokenizer(recipe), None
    with args.main_process_first(local=False, desc="tokenising"):
        store = tokenized(data.documents, tokenizer, data.shards)
        if data.validation is not None:
            held_out = _single_rows(tokenized(data.validation, tokenizer, data.shards), data)
    collator = DataCollatorWithFlattening() if data.pack else default_data_collator
    rows = _rows(store, recipe)
    return Material(rows, held_out, "validation_loss", len(tokenizer), tokenizer, collator)


def _passkeys(recipe: Recipe, chosen: PasskeyRecipe) -> Material:
    """Prompts to train on, and others: of the most segments that are trained on, and longer."""
    args, tokenizer, prose = recipe.training, _tokenizer(recipe), None
    if chosen.prose is not None:
        with args.main_process_first(local=False, desc="tokenising"):
            prose = tokenized(chosen.prose, tokenizer, recipe.data.shards)
    settings = vars(chosen) | {"prose": prose, "segment_length": recipe.model.segment_length}
    task = PasskeyTask(tokenizer, **settings, seed=args.seed)
    held_out: dict[str, Dataset] = {}
    for most in (chosen.most_segments, LONGER * chosen.most_segments):
        longest = {"examples": HELD_OUT_PROMPTS, "least_segments": most, "most_segments": most}
        held_out[f"{most}_segments"] = PasskeyTask(tokenizer, **settings | longest, seed=args.seed + 1)
    return Material(task, held_out, "exact_match", len(tokenizer), tokenizer)


def _tokenizer(recipe: Recipe) -> Any:
    name = recipe.data.tokenizer or recipe.model.base
    assert name is not None
    return open_tokenizer(name)


def _rows(store: TokenStore, recipe: Recipe) -> Dataset:
    """The store's documents as a training's rows."""
    args = recipe.training
    if args.carry_memory:
        rows = args.per_device_train_batch_size * args.world_size
        return CarriedWindows(store, recipe.data.length, rows, seed=args.seed)
    return _single_rows(store, recipe.data)


def _single_rows(store: TokenStore, data: DataRecipe) -> Dataset:
    """Rows that know nothing of each other."""
    return PackedDocuments(store, data.length) if data.pack else Windows(store, data.length)


def _fresh(recipe: ModelRecipe, vocab_size: int, settings: dict[str, Any]) -> Any:
    families = {
        base.__name__.removesuffix("ForCausalLM").lower(): family for base, family in FAMILIES.items()
    }
    if recipe.family not in families:
        raise ValueError(f"model.family is {recipe.family!r}; choose one of {', '.join(families)}")
    family = families[recipe.family]
    not_here = {field.name for field in fields(InfiniConfigMixin)} | {"vocab_size"}  # set by other means
    known = {field.name for field in fields(family.config_class)} - not_here
    strangers = sorted(set(recipe.sizes) - known)
    if strangers:
        raise ValueError(
            f"model.sizes has {', '.join(strangers)}, which are no sizes of {family.config_class.__name__}; "
            "see its fields, such as hidden_size, intermediate_size, num_hidden_layers, num_attention_heads"
        )
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None}
    if "num_attention_heads" in recipe.sizes:  # a head has its own keys and values unless sizes say otherwise
        sizes["num_key_value_heads"] = recipe.sizes["num_attention_heads"]
    try:
        config = family.config_class(**sizes | recipe.sizes, **settings, infini_layers=recipe.layers)
    except StrictDataclassError as error:
        raise ValueError(f"model.sizes make no {recipe.family}: {error}") from error
    return family(config)


def _shut_for_good(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, MemoryGate):
            module.logits.requires_grad_(False).fill_(SHUT)


def _same_run(folder: Path, text: str, writes: bool) -> None:
    """Keep the recipe in the run's folder; raise ValueError where there is another one's run."""
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


def _measured(trainer: InfiniTrainer, material: Material) -> dict[str, float]:
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
