"""The data that a recipe describes: rows to train on, and others to measure by."""

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch.utils.data import ConcatDataset, Dataset
from transformers import (
    DataCollatorWithFlattening,
    PreTrainedTokenizerBase,
    default_data_collator,
)

from infini_attention.data.associative_recall import AssociativeRecall
from infini_attention.data.copy_task import CopyTask
from infini_attention.data.documents import Documents, pinned
from infini_attention.data.passkey import PasskeyTask
from infini_attention.data.shards import TokenStore, tokenized
from infini_attention.data.summaries import SummariesTask, open_summaries, with_end
from infini_attention.data.tokenizers import open_tokenizer
from infini_attention.data.windows import (
    CarriedWindows,
    FlowingWindows,
    PackedDocuments,
    SplitWindows,
    Windows,
)
from infini_attention.training.models import segment_length_of
from infini_attention.training.recipe import (
    AssociativeRecallRecipe,
    DataRecipe,
    PasskeyRecipe,
    Recipe,
    SummariesRecipe,
)

logger = logging.getLogger(__name__)

LEAST_FILLED = 0.75  # of what a step reads, below which a warning says how to leave less of it empty
HELD_OUT = 1000  # sequences of the copy task, or of a cell's associative recall, that recall is measured on
HELD_OUT_PROMPTS = 128  # with pass keys, as long as the longest trained on,
LONGER = 4  # and so many times longer


@dataclass(frozen=True)
class Material:
    """What a model is trained on, and the `figure` that its validation, or each part of it, is to give."""

    train: Dataset
    validation: Dataset | dict[str, Dataset] | None
    figure: str
    vocab_size: int
    tokenizer: PreTrainedTokenizerBase | None
    collator: Callable[..., Any] = default_data_collator


def load_material(recipe: Recipe) -> Material:
    """The data of a recipe; documents are tokenised once, by one process."""
    data, args = recipe.data, recipe.training
    if data.copy_task is not None:
        task = CopyTask(**asdict(data.copy_task), seed=args.seed)
        fresh = CopyTask(**asdict(replace(data.copy_task, examples=HELD_OUT)), seed=args.seed + 1)
        return Material(task, fresh, "recall", task.vocab_size, None)
    if data.associative_recall is not None:
        return _associative_recall(recipe, data.associative_recall)
    if data.passkey is not None:
        return _passkeys(recipe, data.passkey)
    if data.summaries is not None:
        return _summaries(recipe, data.summaries)
    assert data.documents is not None
    tokenizer, held_out = tokenizer_of(recipe), None
    with args.main_process_first(local=False, desc="tokenising"):
        sources = [data.documents, *data.more_documents]
        stores = [tokenized(each, tokenizer, data.shards) for each in sources]
        if data.validation is not None:
            whole = replace(data, length=data.carried_length or data.length)
            held_out = _single_rows(tokenized(data.validation, tokenizer, data.shards), whole)
    collator = DataCollatorWithFlattening() if data.pack else default_data_collator
    rows = _rows(stores, recipe)
    return Material(rows, held_out, "validation_loss", len(tokenizer), tokenizer, collator)


def tokenizer_of(recipe: Recipe) -> Any:
    """The tokenizer that a recipe names, or that of its base; with an end for summaries."""
    name = recipe.data.tokenizer or recipe.model.base
    assert name is not None
    tokenizer = open_tokenizer(name)
    return tokenizer if recipe.data.summaries is None else with_end(tokenizer)


def _associative_recall(recipe: Recipe, chosen: AssociativeRecallRecipe) -> Material:
    """Rows to train on, and others of each cell."""
    seed, settings = recipe.training.seed, vars(chosen).copy()
    across_segments = settings.pop("across_segments")
    settings["segment_length"] = segment_length_of(recipe.model) if across_segments else None
    held_out: dict[str, Dataset] = {
        f"{pairs}_pairs_in_{length}": AssociativeRecall(
            **settings | {"examples": HELD_OUT, "grid": [(length, pairs)]}, seed=seed + 1
        )
        for length, pairs in chosen.grid
    }
    task = AssociativeRecall(**settings, seed=seed)
    return Material(task, held_out, "recall", task.vocab_size, None)


def _passkeys(recipe: Recipe, chosen: PasskeyRecipe) -> Material:
    """Prompts to train on, and others: of the most segments that are trained on, and longer."""
    args, tokenizer, prose = recipe.training, tokenizer_of(recipe), None
    if chosen.prose is not None:
        with args.main_process_first(local=False, desc="tokenising"):
            prose = tokenized(chosen.prose, tokenizer, recipe.data.shards)
    settings = vars(chosen) | {"prose": prose, "segment_length": segment_length_of(recipe.model)}
    task = PasskeyTask(tokenizer, **settings, seed=args.seed)
    held_out: dict[str, Dataset] = {}
    for most in (chosen.most_segments, LONGER * chosen.most_segments):
        longest = settings | {"least_segments": most, "most_segments": most, "examples": HELD_OUT_PROMPTS}
        shares = dict.fromkeys(("lone_keys", "edges", "split_answers", "distractors"), 0.0)
        plain = longest | shares | {"all_asked": False, "echoes": False}
        held_out[f"{most}_segments"] = PasskeyTask(tokenizer, **plain, seed=args.seed + 1)
    return Material(task, held_out, "exact_match", len(tokenizer), tokenizer)


def _summaries(recipe: Recipe, chosen: SummariesRecipe) -> Material:
    """Summaries to train on, and those of other documents."""
    tokenizer, segment_length = tokenizer_of(recipe), segment_length_of(recipe.model)
    columns = {name: getattr(chosen, name) for name in ("query_column", "summary_column", "query")}

    def task(documents: Documents) -> SummariesTask:
        documents = pinned(documents)
        store = tokenized(documents, tokenizer, recipe.data.shards)
        asked = open_summaries(documents, **columns)
        lengths = {"segment_length": segment_length, "max_tokens": chosen.max_tokens}
        return SummariesTask(tokenizer, store, asked, chat=chosen.chat, **lengths)

    with recipe.training.main_process_first(local=False, desc="tokenising"):
        train = task(chosen.documents)
        held_out = None if chosen.validation is None else task(chosen.validation)
    return Material(train, held_out, "validation_loss", len(tokenizer), tokenizer)


def _rows(stores: list[TokenStore], recipe: Recipe) -> Dataset:
    """The documents of all stores as a training's rows."""
    if recipe.training.carry_memory:
        return _carried_rows(stores[0], recipe)
    return ConcatDataset([_single_rows(store, recipe.data) for store in stores])


def _carried_rows(store: TokenStore, recipe: Recipe) -> Dataset:
    """Rows that go on from step to step."""
    data, args = recipe.data, recipe.training
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    by_rows = _may_start_alone(recipe)
    if not by_rows and (data.carried_length is None or data.carried_packed or args.reset_probability):
        raise ValueError(
            f"rows of model.baseline {recipe.model.baseline!r} start together where they have sinks or are "
            "no whole segments; set data.carried_length, and neither data.carried_packed nor "
            "training.reset_probability, or leave out the sinks and make data.length a multiple of "
            "model.segment_length"
        )
    if data.carried_length is None:
        return CarriedWindows(store, data.length, rows, seed=args.seed)
    parts = data.carried_length // data.length
    if data.carried_packed:
        return FlowingWindows(store, data.length, rows, parts, seed=args.seed)
    together = rows if data.carried_together else 1 if by_rows else args.per_device_train_batch_size
    windows = SplitWindows(store, data.length, rows, parts, together=together, seed=args.seed)
    if windows.filled < LEAST_FILLED:
        logger.warning(
            "%.0f %% of what a step reads is empty, beyond the end of a document or of a row's last one; "
            "lower data.carried_length from %d, or set data.carried_packed where rows need not wait",
            100 * (1 - windows.filled),
            data.carried_length,
        )
    return windows


def _may_start_alone(recipe: Recipe) -> bool:
    """Whether a row may start afresh where others of its batch go on."""
    model = recipe.model
    if model.baseline in (None, "linear_attention", "sliding_window"):
        return not model.sizes.get("sinks")
    return recipe.data.length % segment_length_of(model) == 0


def _single_rows(store: TokenStore, data: DataRecipe) -> Dataset:
    """Rows that know nothing of each other."""
    return PackedDocuments(store, data.length) if data.pack else Windows(store, data.length)
