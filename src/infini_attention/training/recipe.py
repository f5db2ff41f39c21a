"""Recipes: all that an experiment is, in one YAML file, typed and checked, each value set anew by --name."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from infini_attention.data.documents import Documents
from infini_attention.data.summaries import GENERAL
from infini_attention.training.arguments import InfiniTrainingArguments

SETTINGS_OF_MEMORIES = (
    "update_rule",
    "feature_map",
    "normalization",
    "empty_memory",
    "local_attention",
    "sink_tokens",
    "short_convolution",
    "layers",
)
"""Those of a ModelRecipe, but gate_init."""
SETTINGS_OF_BASELINES = {
    "memorizing": ("gate_init",),
    "linear_attention": ("feature_map", "short_convolution"),
}
"""Settings of a memory that some baselines have, too."""


@dataclass
class LoraRecipe:
    """Low-rank matrices that learn in place of a base's weights; gates learn beside them.

    Attributes:
        rank: Of the matrices.
        alpha: What they add is multiplied by alpha / rank.
        dropout: Of what goes into them.
        target_modules: Names of linear layers, such as q_proj; by default all but the output's.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    target_modules: list[str] | None = None


@dataclass
class ModelRecipe:
    """The model to train.

    Attributes:
        base: A pre-trained model, by name, folder, GGUF file or alias: retrofitted, or gone on with if it has
            memories or is an adapter. None for fresh weights.
        lora: Train an adapter of the base, which stays as it is; the output is then an adapter.
        family: Of fresh weights: llama, mistral, qwen2, qwen3, gemma, gemma2, gemma3, smollm3 or granite.
        baseline: Another system on the same skeleton, with fresh weights: full, sliding_window,
            transformer_xl, memorizing, linear_attention or recurrent_memory. None for Infini-attention.
        sizes: Fields of the family's config, for fresh weights, and of the baseline's, such as window;
            the vocabulary's size comes from the data.
        segment_length: Tokens a segment; by default 2,048, or the base's, which can go on with another where
            it has memories.
        update_rule: linear or delta.
        feature_map: Of the memory, also of linear_attention.
        normalization: Of what the memory answers: sum, root, none or unit.
        empty_memory: local or gated.
        local_attention: segment, sliding or sink: what a token attends to beside the memory.
        sink_tokens: How many of the first tokens sink keeps in sight.
        short_convolution: Tokens that every query and key is a mixture of, also of linear_attention; 0 for
            none, or say 8.
        layers: That get a memory; by default all that can have one.
        gate_init: Logit of every gate, also of memorizing; by default 0 for fresh weights and -4 for a
            retrofit.
        memory: False shuts the gates for good and does not train them: the same model without memory.
    """

    base: str | None = None
    lora: LoraRecipe | None = None
    family: str = "llama"
    baseline: str | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    segment_length: int | None = None
    update_rule: str = "linear"
    feature_map: str = "elu1"
    normalization: str = "sum"
    empty_memory: str = "local"
    local_attention: str = "segment"
    sink_tokens: int = 4
    short_convolution: int = 0
    layers: list[int] | None = None
    gate_init: float | None = None
    memory: bool = True

    @property
    def usual_gate_init(self) -> float:
        """The `gate_init` that None stands for."""
        return 0.0 if self.base is None else -4.0


@dataclass
class CopyTaskRecipe:
    """The copy task; its segments are as long as there are keys. See `infini_attention.data.copy_task`.

    Attributes:
        examples: How many there are.
        keys: How many keys, which is also the segment length.
        values: How many values.
        segments_back: How many segments lie between a question and its answer.
    """

    examples: int
    keys: int = 8
    values: int = 16
    segments_back: int = 2


@dataclass
class AssociativeRecallRecipe:
    """Associative recall (MQAR). See `infini_attention.data.associative_recall`.

    Attributes:
        examples: How many there are.
        grid: Cells such as [64, 4], tokens in a row and pairs to know; a batch is of one of them.
        vocab_size: How many tokens there are.
        power_a: 1 asks anywhere, near 0 mostly soon after the pairs.
        across_segments: Every key is asked in a later segment than it was told in.
        rewrites: Share of the keys that are told a second time, with another value.
    """

    examples: int
    grid: list[tuple[int, int]]
    vocab_size: int = 8192
    power_a: float = 0.01
    across_segments: bool = False
    rewrites: float = 0.0


@dataclass
class PasskeyRecipe:
    """Prompts with pass keys, of whole segments. See `infini_attention.data.passkey`.

    Attributes:
        examples: How many there are.
        least_segments: Of a batch.
        most_segments: Of a batch; the number is drawn with a uniform logarithm.
        variants: paper, landmark, varied or numbers, each with its weight in the draw.
        most_keys: Keys in a prompt, drawn uniformly from 1 up.
        lone_keys: Share of the prompts that have one key alone.
        most_rewrites: Other values that the key asked for had before, drawn uniformly from 0 up.
        all_asked: Every key in a prompt is asked for.
        edges: Share of the prompts that ask for one key, told close to the heading or to the question.
        echoes: A value is learnt where its sentences say it again, too.
        split_answers: Share of the prompts whose answer is cut by the end of a segment.
        distractors: Share of the background, at most, that is other numbers.
        prose: What stands around the keys of varied.
    """

    examples: int
    least_segments: int = 2
    most_segments: int = 16
    variants: dict[str, float] = field(default_factory=lambda: {"paper": 1.0})
    most_keys: int = 1
    lone_keys: float = 0.0
    most_rewrites: int = 0
    all_asked: bool = False
    edges: float = 0.0
    echoes: bool = False
    split_answers: float = 0.0
    distractors: float = 0.0
    prose: Documents | None = None


@dataclass
class SummariesRecipe:
    """Summaries of long documents, each in answer to a query. See `infini_attention.data.summaries`.

    Attributes:
        documents: To train on.
        validation: Documents to measure the loss of their summaries on after training.
        query_column: Of the queries; by default queries where a row has a list of summaries, else none.
        summary_column: Of the summaries; by default a corpus' own, else summaries.
        query: What is asked where rows have one summary and no query.
        max_tokens: Of a row, whole segments; of a longer document the middle is left out.
        chat: Put queries as infini ask does, as turns of the tokenizer's chat template.
    """

    documents: Documents
    validation: Documents | None = None
    query_column: str | None = None
    summary_column: str | None = None
    query: str = GENERAL
    max_tokens: int = 32_768
    chat: bool = False


@dataclass
class DataRecipe:
    """What it is trained on: documents, the copy task, associative recall, pass keys, or summaries.

    Attributes:
        documents: To train on.
        more_documents: Further sources; rows of all are drawn alike, so that each has the share of its size.
        validation: Documents to measure the loss on after training, in rows of `carried_length` tokens if
            that is set, else of `length`.
        tokenizer: The base's by default; bytes for UTF-8 bytes, or the name of a model.
        length: Tokens a row.
        carried_length: Where training.carry_memory is set: tokens, a multiple of `length`, after which a row
            starts afresh with another window of a document; default at the end of its document.
        carried_together: All rows then start afresh at the same steps; else at different ones. Those of a
            baseline with sinks, or with segments of which `length` is no multiple, start by batches, of which
            several make a step where they are accumulated or of several processes.
        carried_packed: A row begins its next window in the step after the last one's text is over. Else it
            waits for the end of `carried_length` tokens, with nothing to predict: as many rows then begin in
            every step, for which layers of sliding attention and sinks are compiled once.
        pack: Whole documents, or pieces of at most `length` tokens, are packed into one row a process, each
            with its own memory; else rows are windows of one document.
        shards: Folder for tokens, which are made once.
        copy_task: Instead of documents.
        associative_recall: Instead of documents.
        passkey: Instead of documents.
        summaries: Instead of documents.
    """

    documents: Documents | None = None
    more_documents: list[Documents] = field(default_factory=list)
    validation: Documents | None = None
    tokenizer: str | None = None
    length: int = 32_768
    carried_length: int | None = None
    carried_together: bool = False
    carried_packed: bool = False
    pack: bool = False
    shards: Path = Path("out/tokens")
    copy_task: CopyTaskRecipe | None = None
    associative_recall: AssociativeRecallRecipe | None = None
    passkey: PasskeyRecipe | None = None
    summaries: SummariesRecipe | None = None

    @property
    def makes_tokens(self) -> bool:
        """Whether it is a task whose tokens are of no text."""
        return self.copy_task is not None or self.associative_recall is not None


@dataclass
class Recipe:
    """An experiment: a model, its data, and how it is trained."""

    model: ModelRecipe
    data: DataRecipe
    training: InfiniTrainingArguments

    def __post_init__(self) -> None:
        model, data = self.model, self.data
        sources = ("documents", "copy_task", "associative_recall", "passkey", "summaries")
        given = [name for name in sources if getattr(data, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"data has {' and '.join(given) or 'no source'}; give one of {', '.join(sources)}"
            )
        if model.base is None and not model.sizes:
            raise ValueError("model has neither base nor sizes; name a pre-trained model, or give sizes")
        if model.base is not None and model.sizes:
            raise ValueError(f"model.sizes are set, and model.base {model.base!r} has its own; leave one out")
        if model.lora is not None and model.base is None:
            raise ValueError("model.lora is set, and fresh weights have no base to adapt; leave it out")
        if model.lora is not None and model.lora.dropout and self.training.stop_gradient:
            raise ValueError(
                f"model.lora.dropout is {model.lora.dropout}, and training.stop_gradient makes keys and "
                "values twice, of which it would drop different parts; leave one of them out"
            )
        if not data.makes_tokens and data.tokenizer is None and model.base is None:
            raise ValueError("data.tokenizer is not set, and fresh weights have none; set it, say to bytes")
        if data.copy_task is not None and data.copy_task.keys != model.segment_length:
            raise ValueError(
                f"data.copy_task.keys is {data.copy_task.keys}, model.segment_length {model.segment_length}; "
                "the task's segments are as long as there are keys: set both alike"
            )
        if data.passkey is not None and self.training.least_segments is not None:
            raise ValueError(
                f"training.least_segments is {self.training.least_segments}, which would cut answers off; "
                "set data.passkey.least_segments instead"
            )
        if data.documents is None:
            self._refuse_cuts(given[0])
        if model.local_attention != "segment" and self.training.context_parallel_size > 1:
            raise ValueError(
                f"training.context_parallel_size is {self.training.context_parallel_size}, and with "
                f"model.local_attention {model.local_attention!r} tokens see keys that another process "
                "holds; leave one out"
            )
        if model.baseline is not None:
            self._refuse_settings_of_memories()
        if data.documents is None:
            self._refuse_settings_of_documents()
        if data.pack and self.training.least_segments is not None:
            raise ValueError(
                "data.pack and training.least_segments exclude each other: documents have their own lengths; "
                "leave one out"
            )
        if data.carried_length is not None:
            self._check_carried_length(data.carried_length)
        for name in ("carried_together", "carried_packed"):
            if getattr(data, name) and data.carried_length is None:
                raise ValueError(f"data.{name} is set without data.carried_length; set both, or neither")
        self._check_starts()
        if data.more_documents and self.training.carry_memory:
            raise ValueError(
                "data.more_documents and training.carry_memory exclude each other: a memory is carried "
                "through one source; leave one out"
            )
        if data.pack and self.training.carry_memory:
            raise ValueError("data.pack and training.carry_memory exclude each other; leave one out")

    def _check_carried_length(self, tokens: int) -> None:
        """Raise ValueError where rows cannot be carried through so many tokens."""
        if not self.training.carry_memory:
            raise ValueError(
                f"data.carried_length is {tokens}, and nothing is carried from step to step; set "
                "training.carry_memory"
            )
        if tokens < 2 * self.data.length or tokens % self.data.length:
            raise ValueError(
                f"data.carried_length is {tokens}; give twice data.length, {self.data.length}, or another "
                "multiple of it"
            )
        if self.data.carried_packed and self.data.carried_together:
            raise ValueError(
                "data.carried_packed and data.carried_together exclude each other; leave one out"
            )

    def _check_starts(self) -> None:
        """Raise ValueError where rows cannot start afresh in any step."""
        at_any = {
            "data.carried_packed": self.data.carried_packed,
            "training.reset_probability": self.training.reset_probability > 0,
        }
        for name, given in at_any.items():
            if given and self.training.torch_compile and self.model.local_attention != "segment":
                raise ValueError(
                    f"{name} and training.torch_compile are set, and layers with model.local_attention "
                    f"{self.model.local_attention!r} would be compiled for each number of rows that begin; "
                    "leave one of them out"
                )

    def _refuse_cuts(self, source: str) -> None:
        """Raise ValueError for what would take a summary from its document, or questions from their keys."""
        cuts = ["least_segments"] * (source in ("associative_recall", "summaries"))
        for name in [*cuts, "carry_memory"]:
            if value := getattr(self.training, name):
                raise ValueError(
                    f"training.{name} is {value}, and every row of data.{source} is a whole by itself, with "
                    "what is asked at its end; leave it out"
                )

    def _refuse_settings_of_memories(self) -> None:
        """Raise ValueError for what a baseline has no use for."""
        name, training, usual = self.model.baseline, self.training, ModelRecipe()
        useless = ("base", "lora", *SETTINGS_OF_MEMORIES, "memory", "gate_init")
        given = {
            f"model.{field}": getattr(self.model, field) != getattr(usual, field)
            for field in useless
            if field not in SETTINGS_OF_BASELINES.get(name or "", ())
        }
        given |= {
            "data.pack": self.data.pack,
            "training.context_parallel_size": training.context_parallel_size > 1,
            "training.observe_steps": training.observe_steps > 0,
            "training.repeat_ceiling": training.repeat_ceiling > 1,
            "training.stop_gradient": training.stop_gradient,
            "training.read_again": training.read_again is not None,
        }
        if name == "full":
            given["training.carry_memory"] = training.carry_memory
            given["training.checkpoint_segments"] = training.checkpoint_segments is not None
            given["training.detach_every"] = training.detach_every is not None
        if wrong := [setting for setting, is_set in given.items() if is_set]:
            raise ValueError(
                f"model.baseline is {name!r}, which has no use for {', '.join(wrong)}; leave out one or the "
                "other"
            )

    def _refuse_settings_of_documents(self) -> None:
        """Raise ValueError for what a task that makes its own rows would not use."""
        names = ["more_documents", "validation", "length", "carried_length", "carried_together"]
        names += ["carried_packed", "pack"]
        names += ["tokenizer"] * self.data.makes_tokens
        given = [name for name in names if getattr(self.data, name) != getattr(DataRecipe(), name)]
        if given:
            raise ValueError(
                f"data.{', data.'.join(given)} belong to documents, and there are none; leave them out"
            )


@dataclass
class Reading:
    """A recipe as it was read: `text` is all of it as YAML; the others say what to do with it."""

    recipe: Recipe
    text: str
    dry_run: bool
    json: bool


def read_recipe(path: Path, overrides: Sequence[str] = ()) -> Reading:
    """The recipe of a YAML file with some values set anew.

    `overrides` are command-line options such as "--training.max_steps=10". Mistakes end the program with a
    line that names the value, as mistakes on a command line do. Raises ValueError without accelerate.
    """
    if not path.is_file():
        raise ValueError(f"there is no recipe {path}; give a YAML file, such as recipes/copy-task.yaml")
    if find_spec("accelerate") is None:
        raise ValueError("training needs accelerate; install it with: pip install 'infini-attention[train]'")
    parser = _parser()
    chosen = parser.parse_args(["--config", str(path), *overrides])
    flags = chosen.pop("dry_run"), chosen.pop("json")
    settings = parser.instantiate(chosen)
    recipe = Recipe(settings.model, settings.data, settings.training)
    chosen.pop("config")
    return Reading(recipe, parser.dump(chosen, skip_default=True, skip_validation=True), *flags)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="infini train RECIPE", description="Train by a recipe.")
    parser.add_argument("--config", action="config", help="The recipe.")
    parser.add_argument(
        "--dry_run", "--dry-run", action="store_true", help="Show what would run and what it would need."
    )
    parser.add_argument("--json", action="store_true", help="Print one line of JSON instead of tables.")
    parser.add_class_arguments(ModelRecipe, "model", help="The model")
    parser.add_class_arguments(DataRecipe, "data", help="The data")
    parser.add_class_arguments(InfiniTrainingArguments, "training", help="The training")
    return parser
