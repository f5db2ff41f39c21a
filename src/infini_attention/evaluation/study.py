"""`infini study`: one recipe in several arms and seeds, each trained and then asked the same questions.

A study is a YAML file; the folder recipes/studies has some. Each run, an arm with a seed, is a process of its
own and has a folder of its own. What is whole there is not done again.
"""

import io
import json
import os
import re
import signal
import sys
import threading
import time
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from multiprocessing import get_context
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, get_type_hints

import torch
from jsonargparse import ArgumentParser
from transformers.utils import logging

from infini_attention.baselines.loading import load_system
from infini_attention.devices import choose_device
from infini_attention.evaluation.questions import Answer, Cell, Question
from infini_attention.evaluation.result_files import plain
from infini_attention.provenance import Provenance, provenance
from infini_attention.training.checkpoints import MODEL, RECIPE, SUMMARY, checkpoints
from infini_attention.training.recipe import Reading, Recipe, read_recipe
from infini_attention.training.run import train

LOG, REPORT = "log.txt", "study.json"  # of a run in its folder, and of the study in that of all runs
LOGGED = ("loss", "gate_mean", "gate_max")  # figures of a training's last step
GRACE = 60.0  # seconds that a process has to save a checkpoint before it is killed
VISIBLE = "CUDA_VISIBLE_DEVICES"

Settings = dict[str, Any]  # values of a recipe by their dotted names


@dataclass(frozen=True)
class Study:
    """A study's file. Every arm is trained with every seed and asked every question.

    Attributes:
        title: The question that the study is to answer.
        recipe: The recipe's file; the path is relative to the study's own.
        ask: Questions by name: for pass keys, by settings of `infini passkey`; for associative recall, by a
            grid; for perplexity of whole documents or for summaries of them, by `perplexity_of` or
            `summaries_of`, which say what `data.documents` does in a recipe, and further settings.
        set: Values of the recipe set anew for every arm.
        vary: Values to try; every combination is an arm.
        arms: Named arms, each by its values; with `vary`, each of them in every combination.
        leave_out: Combinations that are no arms, by some of their values.
        seeds: Of the trainings.
        published: Figures of others to stand below ours, by what they are of: token accuracy in % by length,
            as the paper's table 3 has it, such as 97/99/100 for a key at start, middle and end.
    """

    title: str
    recipe: Path
    ask: dict[str, Question]
    set: Settings = field(default_factory=dict)
    vary: dict[str, list[Any]] = field(default_factory=dict)
    arms: dict[str, Settings] = field(default_factory=dict)
    leave_out: list[Settings] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    published: dict[str, dict[int, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """A way to train: `settings` over the recipe's, and `factors`, what tells it from others, in short."""

    name: str
    factors: dict[str, str]
    settings: Settings


@dataclass(frozen=True)
class Run:
    """A training with its questions, in `folder`; `overrides` make its recipe out of the study's."""

    arm: str
    seed: int
    folder: Path
    recipe: Path
    overrides: list[str]
    ask: dict[str, Question]

    def read(self) -> Reading:
        """Its recipe; ValueError where the arm's values do not fit it."""
        said = io.StringIO()
        try:
            with redirect_stderr(said):
                return read_recipe(self.recipe, self.overrides)
        except SystemExit:
            reason = " ".join(said.getvalue().rpartition("error: ")[2].split())
        except ValueError as error:
            reason = str(error)
        raise ValueError(f"{self.recipe} cannot be trained as {self.arm}: {reason}")

    def trained(self) -> dict[str, Any] | None:
        """The figures of the training, with those that it logged last; None before its end."""
        summary = self.folder / SUMMARY
        if not summary.exists():
            return None
        figures = json.loads(summary.read_text())
        for checkpoint in checkpoints(self.folder)[:1]:
            for logged in json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]:
                figures |= {name: logged[name] for name in LOGGED if name in logged}
        return figures

    def has_weights(self) -> bool:
        """Whether the trained model's weights are there: figures may have been kept without them."""
        return any((self.folder / MODEL).glob("*.safetensors"))

    def report(self, name: str) -> dict[str, Any] | None:
        """What there is of a question's report; None also where the question was another one then."""
        path = self.folder / f"{name}.json"
        report = json.loads(path.read_text()) if path.exists() else None
        if report is None or not self.ask[name].asked().items() <= report["setting"].items():
            return None
        return report

    def done(self) -> bool:
        """Whether it is trained and has answered everything."""
        reports = [(question, self.report(name)) for name, question in self.ask.items()]
        answered = all(report is not None and question.is_whole(report) for question, report in reports)
        return self.trained() is not None and answered


@dataclass(frozen=True)
class Result:
    """What came of a run.

    Attributes:
        done: whether it is trained and has answered everything.
        failed: why it failed, None where it did not.
        trained: the training's figures, None before its end.
        answers: those that there are.
        seconds: that the questions took.
    """

    arm: str
    seed: int
    done: bool
    failed: str | None
    trained: dict[str, Any] | None
    answers: list[Answer]
    seconds: float


@dataclass(frozen=True)
class StudyReport:
    """All that `infini study` shows; `interrupted` where it was cut off by Ctrl-C or SIGTERM."""

    study: Study
    arms: list[Arm]
    provenance: Provenance
    results: list[Result]
    interrupted: bool = False

    def results_of(self, arm: Arm) -> list[Result]:
        """Those of an arm, by seed."""
        return [result for result in self.results if result.arm == arm.name]

    def answers(self, arm: Arm, question: str, cell: Cell) -> list[Answer]:
        """Those of an arm's seeds that have answered."""
        answers = [answer for result in self.results_of(arm) for answer in result.answers]
        return [each for each in answers if (each.question, each.cell) == (question, cell)]

    def to_json(self) -> str:
        """The whole report in one line of JSON."""
        return json.dumps(plain(asdict(self)), default=str)


def read_study(path: Path) -> Study:
    """Read a study's file; ValueError for what it lacks, what it has too much, and values of a wrong type."""
    if not path.is_file():
        raise ValueError(f"there is no study {path}; give a YAML file, such as recipes/studies/gate.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, as_group=False)
    try:
        settings = parser.instantiate(parser.parse_string(path.read_text()))
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{path} is no study: {' '.join(str(error).split())}") from None
    study = Study(**vars(settings))
    for name in study.ask:
        if "/" in name:
            raise ValueError(f"the question {name!r} of {path} is to name a file; leave the / out")
    for name, values in (("seeds", study.seeds), ("ask", [*study.ask])):
        if not values or len({*values}) < len(values):
            raise ValueError(f"{name} of {path} is {values}; give at least one, and each once")
    return replace(study, recipe=path.parent / study.recipe)


def arms_of(study: Study) -> list[Arm]:
    """The arms of a study; ValueError where there are none, two alike, or one to leave out is not there."""
    arms, left_out = [], []
    for name, own in (study.arms or {"": {}}).items():
        for values in product(*study.vary.values()):
            varied = dict(zip(study.vary, values, strict=True))
            shown = zip(_short(study.vary), map(_text, values), strict=True)
            factors = ({"arm": name} if study.arms else {}) | dict(shown)
            settings = study.set | own | varied
            fitting = [partial for partial in study.leave_out if partial.items() <= settings.items()]
            left_out += fitting
            if not fitting:
                arms.append(Arm(_folder_name(factors), factors, settings))
    if strange := [partial for partial in study.leave_out if partial not in left_out]:
        raise ValueError(f"leave_out has {strange[0]}, which is no arm's; leave it out")
    names = [arm.name for arm in arms]
    if not arms or len({*names}) < len(names):
        raise ValueError(f"arms are {names}; give at least one, and each another name")
    return arms


def plan(study: Study, output: Path) -> list[Run]:
    """The runs of a study, all arms of the first seed first, in folders below `output`.

    Raises ValueError where the recipe does not take an arm's values, its models could not be asked a
    question, or a folder has a run of another recipe.
    """
    runs = [_run(study, arm, seed, output) for seed in study.seeds for arm in arms_of(study)]
    for run in runs:
        kept = run.folder / RECIPE
        if not kept.exists() and run.seed != study.seeds[0]:
            continue
        reading = run.read()
        for question in study.ask.values():
            question.check(reading.recipe)
        if kept.exists() and _without_folder(kept.read_text()) != _without_folder(reading.text):
            raise ValueError(f"{run.folder} has a run of another recipe; name another output, or delete it")
    return runs


def run_study(
    study: Study, output: Path, *, jobs: int = 1, devices: Sequence[int] | None = None
) -> StudyReport:
    """Do what is left of a study, `jobs` runs at a time; one that fails does not stop the others.

    Ctrl-C and SIGTERM end it after each training's step that is under way. The report is also written to
    study.json in `output`.

    Args:
        study: what is to be done.
        output: the folder of all runs, each in ARM/seed-SEED.
        jobs: processes at a time.
        devices: GPUs that they are dealt to, by number among the visible ones; by default all of these.

    Raises:
        ValueError: fewer than 1 job, a GPU that is not there, or what `plan` raises.
    """
    if jobs < 1:
        raise ValueError(f"jobs is {jobs}; give at least 1")
    places, runs, interrupted = _places(devices), plan(study, output), False
    failed: dict[Path, str] = {}
    try:
        with _sigterm_interrupts():
            _run_all(runs, jobs, places, failed)
    except KeyboardInterrupt:
        interrupted = True
    results = [_result(run, failed.get(run.folder)) for run in runs]
    report = StudyReport(study, arms_of(study), provenance(), results, interrupted)
    output.mkdir(parents=True, exist_ok=True)
    (output / REPORT).write_text(report.to_json() + "\n")
    return report


def perform(run: Run) -> None:
    """Train, unless that is done, and ask what has not been asked yet, in this process."""
    logging.disable_progress_bar()
    if run.trained() is None or not run.has_weights():
        for name in run.ask:
            if run.report(name) is not None:  # of weights that are no more; new ones may differ in a bit
                (run.folder / f"{name}.json").unlink()
        reading = run.read()
        figures = train(reading.recipe, reading.text)
        if "stopped_by" in figures:
            sys.exit(f"stopped by {figures['stopped_by']} after step {figures['steps']:,}")
    folder = str(run.folder / MODEL)
    dtype = "bfloat16" if choose_device("auto").type == "cuda" else "float32"
    model, _ = load_system(folder, {}, dtype=dtype)
    for name, question in run.ask.items():
        question.ask(model, folder, run.folder / f"{name}.json")


def _short(names: Iterable[str]) -> list[str]:
    """The last parts of dotted names, or the whole ones where these would be the same."""
    whole = [*names]
    last = [name.rpartition(".")[2] for name in whole]
    return last if len({*last}) == len(last) else whole


def _text(value: Any) -> str:
    """A value as a recipe's text has it; an option's value too."""
    return value if isinstance(value, str) else json.dumps(value)


def _folder_name(factors: dict[str, str]) -> str:
    parts = [value if name == "arm" else f"{name}={value}" for name, value in factors.items()]
    return re.sub(r"[^\w.,=+-]+", "_", ",".join(parts)) or "recipe"


def _run(study: Study, arm: Arm, seed: int, output: Path) -> Run:
    folder = output / arm.name / f"seed-{seed}"
    ours = {"training.seed": seed, "training.output_dir": str(folder), "training.save_total_limit": 1}
    overrides = [f"--{_known(name)}={_text(value)}" for name, value in (arm.settings | ours).items()]
    return Run(arm.name, seed, folder, study.recipe, overrides, study.ask)


def _known(name: str) -> str:
    """The name of a recipe's setting; on a command line its beginning would do."""
    group, _, rest = name.partition(".")
    settings = get_type_hints(Recipe).get(group)
    if settings is None or rest.partition(".")[0] not in {each.name for each in fields(settings)}:
        raise ValueError(f"{name} is no setting of a recipe; `infini train RECIPE --help` lists them")
    return name


def _without_folder(text: str) -> str:
    """A recipe but for where it writes: folders may have been moved."""
    return re.sub(r"(?m)^  output_dir: .*$", "", text)


def _places(devices: Sequence[int] | None) -> list[str | None]:
    """What makes each GPU the only visible one; None alone where there are no GPUs."""
    count = torch.cuda.device_count()
    chosen = range(count) if devices is None else devices
    if strange := [number for number in chosen if not 0 <= number < count]:
        raise ValueError(
            f"devices has {strange[0]}, and there are {count} GPUs; count from 0, or leave it out"
        )
    visible = os.environ.get(VISIBLE, ",".join(map(str, range(count)))).split(",")
    return [visible[number] for number in chosen] or [None]


@contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""
    if threading.current_thread() is not threading.main_thread():  # where signals are not heard
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_all(runs: list[Run], jobs: int, places: list[str | None], failed: dict[Path, str]) -> None:
    """Do the runs that are not done, and say how it goes; `failed` gets the reasons by folder."""
    waiting, free = [run for run in runs if not run.done()], [*range(jobs)]
    running: dict[Any, tuple[BaseProcess, Run, int, float]] = {}
    print(f"{len(runs)} runs, {len(waiting)} of them to do", file=sys.stderr)
    try:
        while waiting or running:
            while waiting and free:
                run, job = waiting.pop(0), free.pop(0)
                process = _started(run, places[job % len(places)])
                running[process.sentinel] = process, run, job, time.monotonic()
            for sentinel in wait([*running]):
                process, run, job, began = running.pop(sentinel)
                free.append(job)
                process.join()
                if process.exitcode:
                    failed[run.folder] = _reason(run, process.exitcode)
                said = f"failed: {failed[run.folder]}" if process.exitcode else "finished"
                left = f"{len(running)} running, {len(waiting)} waiting"
                seconds = time.monotonic() - began
                print(f"{run.arm}, seed {run.seed}, {seconds:,.0f} s: {said} ({left})", file=sys.stderr)
    finally:
        _end([process for process, *_ in running.values()])


def _started(run: Run, place: str | None) -> BaseProcess:
    """The process of a run, which sees one GPU only: CUDA looks at the variable once."""
    before = os.environ.get(VISIBLE)
    process = get_context("spawn").Process(target=_in_process, args=(run,))
    try:
        if place is not None:
            os.environ[VISIBLE] = place
        process.start()
    finally:
        if before is not None:
            os.environ[VISIBLE] = before
        elif place is not None:
            del os.environ[VISIBLE]
    return process


def _in_process(run: Run) -> None:
    os.setpgrp()  # Ctrl-C is for the parent, which ends its processes once
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / LOG).open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    perform(run)


def _reason(run: Run, exitcode: int) -> str:
    """The last line that a process said, and the signal where one ended it."""
    lines = (run.folder / LOG).read_text(errors="replace").split("\n") if run.folder.exists() else []
    said = next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
    return said if exitcode > 0 else f"{signal.Signals(-exitcode).name} after: {said}"


def _end(processes: list[BaseProcess]) -> None:
    """Let each save a checkpoint and end; who does not, or all at a second Ctrl-C, are killed."""
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            process.join(GRACE)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _result(run: Run, failed: str | None) -> Result:
    reports = {name: report for name in run.ask if (report := run.report(name)) is not None}
    answers = [each for name, report in reports.items() for each in run.ask[name].answers(name, report)]
    seconds = sum(report["seconds"] for report in reports.values())
    return Result(run.arm, run.seed, run.done(), failed, run.trained(), answers, seconds)
