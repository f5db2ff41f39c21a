"""`infini eval`: tasks of EleutherAI's lm-evaluation-harness, and those in `tasks/`, asked of any system."""

import json
import logging
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from infini_attention.baselines.systems import system_name
from infini_attention.evaluation.result_files import fingerprint, plain, write_whole
from infini_attention.provenance import Provenance, provenance

TASKS = Path(__file__).with_name("tasks")


@dataclass(frozen=True)
class Setting:
    """What was asked of which model.

    Attributes:
        model: as it was asked for.
        model_type: of its config.
        system: as `system_name`, such as "Infini delta, exp".
        fingerprint: hexadecimal; changes with any weight, the config and the tokenizer.
        tasks: as they were named.
        limit: documents of each task at most, or below 1 their share; None for all.
        num_fewshot: examples before each question; None for what a task has.
        data_files: what the tasks in `tasks/` that read texts were made from; None for plays.
        memory_reset: whether the memory was emptied before continuations.
        chat: whether questions were put into the tokenizer's chat template.
    """

    model: str
    model_type: str
    system: str
    fingerprint: str
    segment_length: int
    dtype: str
    device: str
    tasks: list[str]
    limit: float | None
    num_fewshot: int | None
    data_files: list[str] | None
    batch_size: int
    memory_reset: bool
    chat: bool


@dataclass(frozen=True)
class Figure:
    """One metric of a task or of a group of tasks.

    Attributes:
        task: its name.
        version: of the task.
        shots: examples before each question.
        samples: documents that were asked about; None for a group.
        metric: its name, and that of lm-eval's filter of answers where there is one.
        value: the figure.
        stderr: its standard error; None where lm-eval gives none.
    """

    task: str
    version: str | None
    shots: int | None
    samples: int | None
    metric: str
    value: float
    stderr: float | None


@dataclass(frozen=True)
class HarnessReport:
    """All that `infini eval` shows; `seconds` is the time that it took, making the tasks included."""

    setting: Setting
    provenance: Provenance
    lm_eval: str
    figures: list[Figure]
    seconds: float

    def to_json(self) -> str:
        """The whole report in one line of JSON; null where a number is not finite."""
        return json.dumps(plain(asdict(self)), allow_nan=False)


def harness(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    data_files: list[str] | None = None,
    batch_size: int = 8,
    memory_reset: bool = False,
    chat: bool = False,
    output: Path | None = None,
) -> HarnessReport:
    """Ask a model lm-eval's tasks, whose requests are streamed at any length (`lm_eval_model.InfiniLM`).

    Args:
        model: an `infini_*` language model or a baseline, in evaluation mode.
        tokenizer: the model's.
        tasks: names of tasks, groups or tags, or patterns of some, of lm-eval, `tasks/` and `include_path`;
            `GROUP::TASK` for one that a group's file holds.
        include_path: a folder with more task files.
        limit: documents of each task at most, or below 1 their share.
        num_fewshot: examples before each question; default what a task has.
        data_files: text files, or patterns, for infini_books, infini_continuation and infini_babi.
        batch_size: rows that are read side by side. Changes speed and working memory.
        memory_reset: the control: the memory is emptied before each continuation.
        chat: put questions into the tokenizer's chat template.
        output: a JSON file for the report.

    Raises:
        ValueError: lm-eval is not installed, a task is not known, or a setting cannot be right.
    """
    require_lm_eval()
    from lm_eval import simple_evaluate

    from infini_attention.evaluation.lm_eval_model import InfiniLM

    asked = InfiniLM(model, tokenizer=tokenizer, batch_size=batch_size, memory_reset=memory_reset)
    folders = [TASKS] if include_path is None else [TASKS, include_path]
    setting = Setting(
        model=model.name_or_path,
        model_type=model.config.model_type,
        system=system_name(model),
        fingerprint=fingerprint(model, tokenizer),
        segment_length=model.config.segment_length,
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        tasks=[*tasks],
        limit=limit,
        num_fewshot=num_fewshot,
        data_files=data_files,
        batch_size=batch_size,
        memory_reset=memory_reset,
        chat=chat,
    )
    began = time.perf_counter()
    with TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)  # tasks that count tokens load it by name
        metadata = {"tokenizer": scratch} | ({"data_files": data_files} if data_files else {})
        manager, names = _found(tasks, folders, metadata)
        with _without_advice():
            results: Any = simple_evaluate(
                asked,
                tasks=names,
                task_manager=manager,
                limit=limit,
                num_fewshot=num_fewshot,
                apply_chat_template=chat,
                log_samples=False,
            )
    seconds = time.perf_counter() - began
    report = HarnessReport(setting, provenance(), version("lm-eval"), [*_figures(results)], seconds)
    if output is not None:
        write_whole(output, report.to_json())
    return report


def require_lm_eval() -> None:
    """Raise ValueError with the pip command where lm-eval is not installed."""
    if find_spec("lm_eval") is None:
        raise ValueError(
            "infini eval needs the package lm-eval; install it with: pip install 'infini-attention[harness]'"
        )


@contextmanager
def _without_advice() -> Iterator[None]:
    """Keep out what lm-eval says of an option of its own command."""

    def other(record: logging.LogRecord) -> bool:
        return "--metadata" not in record.getMessage()

    logger = logging.getLogger("lm_eval.api.task")
    logger.addFilter(other)
    try:
        yield
    finally:
        logger.removeFilter(other)


def _found(tasks: Sequence[str], folders: list[Path], metadata: dict[str, Any]) -> tuple[Any, list[Any]]:
    """What loads tasks, and those asked for, by name or settings; ValueError where there is no such task."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
    own = ", ".join(manager.all_tasks)
    if not all("::" in task or manager.match_tasks([task]) for task in tasks):
        manager = TaskManager(include_path=folders, metadata=metadata)  # lm-eval's own take long to look at
    found: dict[str, Any] = {}
    for task in tasks:
        named = {name: name for name in manager.match_tasks([task])}
        matching = _members(task, folders) if "::" in task else named
        if not matching:
            raise ValueError(
                f"no task is called {task!r}; here are {own}, and `lm_eval ls tasks` lists others"
            )
        found |= matching
    return manager, [*found.values()]


def _members(asked: str, folders: list[Path]) -> dict[str, Any]:
    """Settings of the tasks `GROUP::TASK` that match, by name; lm-eval itself knows no part of a group."""
    from lm_eval.config.group import GroupConfig
    from lm_eval.tasks._yaml_loader import load_yaml

    of_groups = {field.name for field in fields(GroupConfig)}
    found = {}
    for path in (path for folder in folders for path in sorted(folder.glob("**/*.yaml"))):
        if fnmatch(path.stem, asked.partition("::")[0]):
            group = load_yaml(path)
            shared = {name: value for name, value in group.items() if name not in of_groups}
            for member in group["task"] if "group" in group else ():
                name = f"{group['group']}::{member['task']}"
                if fnmatch(name, asked):
                    found[name] = shared | member | {"task": name}
    return found


def _figures(results: dict[str, Any]) -> Iterator[Figure]:
    """What lm-eval found, in its order; groups after tasks."""
    for task, found in (results["results"] | results.get("groups", {})).items():
        for name, value in found.items():
            metric, _, filtered = name.partition(",")
            if not filtered or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{filtered}")
            known = isinstance(error, int | float) and math.isfinite(error)
            of_task = results["versions"].get(task)
            yield Figure(
                task=task,
                version=None if of_task is None else str(of_task),
                shots=results["n-shot"].get(task),
                samples=results["n-samples"].get(task, {}).get("effective"),
                metric=metric if filtered == "none" else f"{metric}, {filtered}",
                value=float(value),
                stderr=float(error) if known else None,
            )
