"""`infini report`: a folder of results, read by its index, for one page.

The index, index.yaml, says what belongs where and what was found. What a file says itself, its command, card,
versions and commit, is taken from there.
"""

import json
import re
from argparse import ArgumentError
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from infini_attention.evaluation.report_figures import Drawing, drawings

INDEX = "index.yaml"
BESIDE = {INDEX, "README.md"}  # files of the folder that are no results
DATED = re.compile(r"\d{4}-\d{2}-\d{2}-")
PICTURES = (".png", ".svg")
PACKAGES = ("torch", "triton", "transformers")  # whose versions are shown


@dataclass(frozen=True)
class Entry:
    """Results that belong together, as the index has them.

    Attributes:
        title: what they are of.
        finding: what they say, in a sentence or two.
        files: names in the folder, each beginning with its date: text, JSON, pictures.
        command: that printed them, where no file says so; in the same way `where`, the machine and versions,
            and `commit`.
    """

    title: str
    finding: str
    files: list[str]
    command: str | None = None
    where: str | None = None
    commit: str | None = None


@dataclass(frozen=True)
class Section:
    """A topic, and what was measured of it."""

    title: str
    about: str
    results: list[Entry]


@dataclass(frozen=True)
class Highlight:
    """A table of a file, by its title, that the page shows first; `rows` at most, by default all."""

    title: str
    finding: str
    file: str
    table: str
    rows: int | None = None


@dataclass(frozen=True)
class Index:
    """What is in a folder of results."""

    title: str
    about: str
    headline: list[Highlight] = field(default_factory=list)
    sections: list[Section] = field(default_factory=list)


@dataclass(frozen=True)
class Origin:
    """Where figures come from: commands, machines with versions, commits; empty where it is not known."""

    commands: list[str]
    where: list[str]
    commits: list[str]


@dataclass(frozen=True)
class File:
    """A file of results: its text for people, the JSON in it, and what is drawn of both.

    `problem` says why nothing is drawn of JSON that looks like a kind that is known; it is empty elsewhere.
    """

    name: str
    text: str
    objects: list[dict[str, Any]]
    drawings: list[Drawing]
    problem: str


@dataclass(frozen=True)
class Result:
    """An entry with what its files hold."""

    entry: Entry
    files: list[File]
    pictures: list[Path]
    origin: Origin

    @property
    def is_coloured(self) -> bool:
        """Whether tables show by colour what a picture would."""
        drawings = [drawing for file in self.files for drawing in file.drawings]
        return any(cell.share is not None for each in drawings for row in each.rows for cell in row)


@dataclass(frozen=True)
class Report:
    """All that the page shows: highlights with their tables, then every section's results, newest first."""

    index: Index
    headline: list[tuple[Highlight, Drawing, Result]]
    sections: list[tuple[Section, list[Result]]]


def report(folder: Path) -> Report:
    """Read a folder of results.

    Raises:
        ValueError: no index, or one that is not as `Index` has it; a file that is missing, that the index
            does not name or names twice, or that is no text; broken JSON; a headline of a table that is not
            there.
    """
    index = _index(folder)
    _check_files(folder, index)
    sections = [(section, _newest_first(folder, section)) for section in index.sections]
    results = [result for _, of_section in sections for result in of_section]
    return Report(index, [_highlighted(shown, results) for shown in index.headline], sections)


def _index(folder: Path) -> Index:
    path = folder / INDEX
    if not path.is_file():
        raise ValueError(f"{folder} has no {INDEX}; name a folder of results, or write an index of this one")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Index, as_group=False)
    try:
        return Index(**vars(parser.instantiate(parser.parse_string(path.read_text(encoding="utf-8")))))
    except (ArgumentError, TypeError) as error:
        raise ValueError(f"{path} is no index: {' '.join(str(error).split())}") from None


def _check_files(folder: Path, index: Index) -> None:
    named = [name for section in index.sections for entry in section.results for name in entry.files]
    files = [path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")]
    there = {*files} - BESIDE
    if missing := [name for name in named if name not in there]:
        raise ValueError(f"{folder} lacks {_all(missing)}; put it there, or take it out of {INDEX}")
    if unnamed := sorted(there - {*named}):
        raise ValueError(f"{folder / INDEX} does not name {_all(unnamed)}; add it there, or delete it")
    if twice := sorted({name for name in named if named.count(name) > 1}):
        raise ValueError(f"{folder / INDEX} names {_all(twice)} more than once; one entry is enough")
    if undated := [name for name in named if not DATED.match(name)]:
        raise ValueError(f"{_all(undated)} does not begin with a date, such as 2026-01-31-; rename it")
    empty = [entry.title for section in index.sections for entry in section.results if not entry.files]
    if empty or not named:
        raise ValueError(f"{folder / INDEX} names no files for {_all(empty) or 'anything'}; name some")


def _all(names: Iterable[str]) -> str:
    return ", ".join(names)


def _newest_first(folder: Path, section: Section) -> list[Result]:
    """By the date that file names begin with; those of a day in the index's order."""
    entries = sorted(section.results, key=lambda entry: max(name[:10] for name in entry.files), reverse=True)
    return [_result(folder, entry) for entry in entries]


def _result(folder: Path, entry: Entry) -> Result:
    paths = [folder / name for name in entry.files]
    files = [_file(path) for path in paths if path.suffix not in PICTURES]
    objects = [each for file in files for each in file.objects]
    pictures = [path for path in paths if path.suffix in PICTURES]
    return Result(entry, files, pictures, _origin(entry, objects))


def _file(path: Path) -> File:
    """Lines of JSON begin with a brace; a file that ends in .json is one object."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is neither text nor a picture ({', '.join(PICTURES)}); delete it") from None
    if path.suffix == ".json":
        objects, rest = [_object(path, 1, text)], ""
    else:
        lines = text.splitlines()
        numbered = enumerate(lines, start=1)
        objects = [_object(path, number, line) for number, line in numbered if line.startswith("{")]
        rest = "\n".join(line.rstrip() for line in lines if not line.startswith("{"))
    try:
        return File(path.name, rest, objects, drawings(rest, objects), "")
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        return File(path.name, rest, objects, [], f"{type(error).__name__}: {error}")


def _object(path: Path, line: int, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"line {line} of {path} is broken JSON ({error.msg}); put the line there that the command printed"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} and no object of JSON; put one there")
    return found


def _origin(entry: Entry, objects: list[dict[str, Any]]) -> Origin:
    made = [each.get("provenance", each) for each in objects]
    commands = [each["command"] for each in made if "command" in each]
    commits = [each["commit"] for each in made if each.get("commit")]
    where = [_where(each) for each in made if "versions" in each]
    return Origin(
        _once([*filter(None, [entry.command])] or commands),
        _once([*filter(None, [entry.where])] or where),
        _once([*filter(None, [entry.commit])] or [_short(commit) for commit in commits]),
    )


def _where(made: dict[str, Any]) -> str:
    machine = made.get("card") or made.get("device") or made.get("processor")
    versions = {name: made["versions"].get(name, "not installed") for name in PACKAGES}
    shown = [f"{name} {version}" for name, version in versions.items() if version != "not installed"]
    return ", ".join([*filter(None, [machine]), *shown])


def _short(commit: str) -> str:
    number, dash, mark = commit.partition("-")
    return number[:7] + dash + mark


def _once(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(texts))


def _highlighted(shown: Highlight, results: list[Result]) -> tuple[Highlight, Drawing, Result]:
    for result in results:
        for drawing in _drawings(result, shown.file):
            if drawing.title == shown.table:
                return shown, replace(drawing, rows=drawing.rows[: shown.rows]), result
    there = [drawing.title for result in results for drawing in _drawings(result, shown.file)]
    raise ValueError(
        f"the headline {shown.title!r} is to show the table {shown.table!r} of {shown.file}, which has "
        f"{_all(map(repr, there)) or 'none'}; name one of these"
    )


def _drawings(result: Result, name: str) -> Iterator[Drawing]:
    return (drawing for file in result.files if file.name == name for drawing in file.drawings)
