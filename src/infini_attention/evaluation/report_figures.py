"""What of a file of results can be drawn as a table, kind by kind, told apart by what its JSON holds.

Files are old and new, so this reads plain JSON: what a kind need not have may be missing.
"""

import math
import re
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

NOTHING = "-"
GRID = re.compile(
    r"(?P<title>pass key,[^:]*):\s+exact\s+match\s+by\s+depth,\s+%[ \t]*\n"
    r"\s*tokens(?P<depths>(?:\s+\d+%)+)\s*\n"
    r"(?P<rows>(?:\s*[\d,]+(?:[ \t]+\d+)+[ \t]*(?:\n|$))+)"
)  # as `infini passkey` prints it


@dataclass(frozen=True)
class Cell:
    """A text in a table; `share`, from 0 to 1, is how strongly it is coloured, None for not at all."""

    text: str
    share: float | None = None


@dataclass(frozen=True)
class Drawing:
    """A table: headings, and rows of as many cells."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    remark: str = ""


def drawings(text: str, objects: Sequence[dict[str, Any]]) -> list[Drawing]:
    """All that can be drawn of a file: `text` is what it says to people, `objects` its JSON.

    Of text these are grids of pass keys; of an object of a kind that is not known, its plain figures.
    """
    drawn = [drawing for each in objects for drawing in _kind(each)(each) if drawing.rows]
    if not any("cells" in each for each in objects):  # which are the same grids
        runs = [run for each in objects for run in each.get("runs", [])]
        drawn = [*_printed(text, runs), *drawn]
    plain = [_plain(each) for each in objects if _kind(each) is _nothing]
    return [*drawn, *_as_they_are("Figures", [figures for figures in plain if figures])]


def _kind(found: dict[str, Any]) -> Callable[[dict[str, Any]], Iterable[Drawing]]:
    return next((draw for keys, draw in KINDS if keys <= found.keys()), _nothing)


def _nothing(found: dict[str, Any]) -> Iterable[Drawing]:
    return ()


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    """Figures that stand by themselves, without what says where they are from."""
    origin = ("command", "commit", "card", "device", "processor")
    names = [name for name, value in found.items() if not isinstance(value, dict | list)]
    return {name: found[name] for name in names if name not in origin}


def _printed(text: str, runs: list[dict[str, Any]]) -> Iterator[Drawing]:
    """Grids as `infini passkey` prints them, and a file's runs over all depths, a run a grid."""
    grids = list(GRID.finditer(text))
    said = [run.get("what") or run["command"] for run in runs]
    if len(grids) == len(runs):
        said = [_label(grid, of_run) for grid, of_run in zip(grids, said, strict=True)]
        labels = said
    else:
        labels = [_label(grid, "") for grid in grids]
    yield from _by_depth(labels, grids)
    if runs:
        yield _by_length(zip(said, (run["by_length"] for run in runs), strict=True))


def _label(grid: re.Match[str], said: str) -> str:
    """What was asked, after the seed of the model where its run names one."""
    seed = re.search(r"seed[ -](\d+)", said)
    task = " ".join(grid["title"].removeprefix("pass key, ").split())
    return f"seed {seed[1]}: {task}" if seed else task


def _by_depth(labels: list[str], grids: list[re.Match[str]]) -> Iterator[Drawing]:
    """A table for all grids of the same depths, a row for each grid and length."""
    rows: dict[tuple[str, ...], list[list[Cell]]] = {}
    for label, grid in zip(labels, grids, strict=True):
        for line in grid["rows"].splitlines():
            length, *shares = line.split()
            row = [Cell(label), Cell(length), *map(_percent, shares)]
            rows.setdefault(tuple(grid["depths"].split()), []).append(row)
    for depths, of_depths in rows.items():
        yield Drawing("Exact match by depth of the key, %", ["", "tokens", *depths], of_depths)


def _passkey(found: dict[str, Any]) -> Iterator[Drawing]:
    depths = list(dict.fromkeys(cell["depth"] for cell in found["cells"]))
    rows = [
        [Cell(f"{length:,}"), *(_share(cell["exact_match"]) for cell in cells)]
        for length, cells in groupby(found["cells"], key=lambda cell: cell["length"])
    ]
    headings = ["tokens", *(f"{depth:.0%}" for depth in depths)]
    yield Drawing("Exact match by depth of the key, %", headings, rows)
    yield _by_length([("", found["by_length"])])


def _by_length(runs: Iterable[tuple[str, list[dict[str, Any]]]]) -> Drawing:
    rows = [
        [
            Cell(name),
            Cell(f"{each['length']:,}"),
            Cell(f"{each['exact_match']['trials']:,}"),
            *(_interval(each[measure]) for measure in ("exact_match", "token_accuracy", "control")),
        ]
        for name, by_length in runs
        for each in by_length
    ]
    columns = ["", "tokens", "prompts", "exact match, %", "token accuracy, %", "memory reset, %"]
    remark = (
        "In brackets: Wilson's 95 % intervals over prompts. Memory reset: exact match, before the question."
    )
    return Drawing("All depths", columns, rows, remark)


def _study(found: dict[str, Any]) -> Iterator[Drawing]:
    scored = [(arm, answer) for arm, answer in _answers(found) if "score" in answer]
    read = [(arm, answer) for arm, answer in _answers(found) if "shown" in answer]
    if read:
        yield _study_table(found, read, "By arm, of whole documents", _of_documents)
    if scored or not read:
        yield from _scored(found, scored)


def _scored(found: dict[str, Any], answers: list[tuple[str, dict[str, Any]]]) -> Iterator[Drawing]:
    yield _study_table(found, answers, "By arm, %", _right)
    with_depths = any("by_depth" in answer for _, answer in answers)
    if found["study"].get("published") and with_depths:
        drawing = _study_table(found, answers, "Token accuracy at start, middle and end, %", _depths)
        remark = "The last rows are published: the paper's table 3, arXiv 2404.07143."
        yield replace(drawing, rows=[*drawing.rows, *_published(found, drawing)], remark=remark)


def _study_table(
    found: dict[str, Any],
    answers: list[tuple[str, dict[str, Any]]],
    title: str,
    shown: Callable[[list[dict[str, Any]]], Cell],
) -> Drawing:
    places = list(dict.fromkeys(_place(answer) for _, answer in answers))
    factors = list(found["arms"][0]["factors"])
    rows = [
        [Cell(value) for value in arm["factors"].values()]
        + [
            shown([answer for name, answer in answers if (name, _place(answer)) == (arm["name"], place)])
            for place in places
        ]
        for arm in found["arms"]
    ]
    headings = [
        ", ".join([question, *([" / ".join(f"{each:,}" for each in cell)] if cell else [])])
        for question, cell in places
    ]
    seeds = max(Counter((arm, _place(answer)) for arm, answer in answers).values(), default=1)
    remark = f"Means of {seeds} seeds, in brackets the lowest and the highest." if seeds > 1 else "One seed."
    if any("shown" in answer for _, answer in answers):
        remark += " In parentheses, of one seed: 95 % intervals over documents."
    return Drawing(title, [*(name.replace("_", " ") for name in factors), *headings], rows, remark)


def _of_documents(answers: list[dict[str, Any]]) -> Cell:
    """The mean of seeds with the lowest and the highest; of one seed, its interval over documents."""
    shown = [answer["shown"] for answer in answers]
    if not shown:
        return Cell(NOTHING)
    values = [each["value"] for each in shown]
    if len(values) > 1:
        return Cell(f"{statistics.fmean(values):.2f} [{min(values):.2f}, {max(values):.2f}]")
    return Cell(f"{values[0]:.2f} ({shown[0]['low']:.2f} to {shown[0]['high']:.2f})")


def _answers(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each with the name of its arm."""
    for result in found["results"]:
        for answer in result["answers"]:
            yield result["arm"], answer


def _place(answer: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    """What was asked, and where: a length, of associative recall a length and how many pairs, or nothing."""
    if "shown" in answer:
        return answer["question"], ()
    score = answer["score"]
    cell = (answer["length"],) if "length" in answer else (score["length"], score["pairs"])
    return answer["question"], cell


def _right(answers: list[dict[str, Any]]) -> Cell:
    scores = [each["score"].get("exact_match") or each["score"]["accuracy"] for each in answers]
    shares = [score["share"] for score in scores]
    if not shares:
        return Cell(NOTHING)
    mean, low, high = (f"{100 * end:.0f}" for end in (statistics.fmean(shares), min(shares), max(shares)))
    return Cell(mean if low == high else f"{mean} [{low}, {high}]", statistics.fmean(shares))


def _depths(answers: list[dict[str, Any]]) -> Cell:
    of_seeds = [[score["token_accuracy"]["share"] for score in each.get("by_depth", [])] for each in answers]
    means = [statistics.fmean(shares) for shares in zip(*of_seeds, strict=True)]
    if not means:
        return Cell(NOTHING)
    return Cell("/".join(f"{100 * mean:.0f}" for mean in means), statistics.fmean(means))


def _published(found: dict[str, Any], drawing: Drawing) -> Iterator[list[Cell]]:
    """Rows of others' figures, in the columns of `drawing`."""
    factors = len(found["arms"][0]["factors"])
    lengths = [heading.partition(", ")[2].replace(",", "") for heading in drawing.columns[factors:]]
    for name, figures in found["study"]["published"].items():
        texts = [figures.get(length, NOTHING) for length in lengths]
        empty = [Cell("")] * (factors - 1)
        yield [Cell(f"published: {name}"), *empty, *map(_published_cell, texts)]


def _published_cell(text: str) -> Cell:
    if text == NOTHING:
        return Cell(text)
    return Cell(text, statistics.fmean(float(each) for each in text.split("/")) / 100)


def _gates(found: dict[str, Any]) -> Iterator[Drawing]:
    heads = [f"head {number}" for number in range(len(found["gates"][0]))]
    maps = [("Gates: the memory's share of the output, by layer and head", found["gates"])]
    maps += [
        (f"Measured share of the memory, {kind['name']}", kind["share"])
        for kind in found["kinds"]
        if kind["share"]
    ]
    for title, shares in maps:
        rows = [
            [Cell(f"layer {layer}"), *(Cell(f"{share:.2f}", share) for share in by_head)]
            for layer, by_head in zip(found["layers"], shares, strict=True)
        ]
        yield Drawing(title, ["", *heads], rows)
    rows = [
        [Cell(kind["name"]), *map(_number, (kind["predicted"], kind["loss"], kind["loss_memory_off"]))]
        for kind in found["kinds"]
    ]
    yield Drawing("Loss by kind of token, nats", ["", "tokens", "memory on", "memory off"], rows)


def _stream(found: dict[str, Any]) -> Iterator[Drawing]:
    measures = {"token_perplexity": "token perplexity", "bits_per_byte": "bits a byte"}
    places = [(measure, memory) for measure in measures for memory in ("on", "off")]
    rows = [
        [
            Cell(f"{stretch['start']:,} to {stretch['end'] - 1:,}"),
            *(_number(stretch[memory][measure]) for measure, memory in places),
        ]
        for stretch in [*found["by_position"], found["total"]]
    ]
    columns = ["tokens", *(f"{measures[measure]}, {memory}" for measure, memory in places)]
    yield Drawing("By position, memory on and off", columns, rows, "The last row is the whole text.")


def _lm_table(found: dict[str, Any]) -> Iterator[Drawing]:
    for documents in found["documents"]:
        read = [row for row in found["rows"] if documents in row["cells"]]
        cells = {_system(row): row["cells"][documents] for row in read}
        rows = [
            [Cell(name), _ends(cell["figures"]["token_perplexity"]), _ends(cell["difference"])]
            for name, cell in cells.items()
        ]
        columns = ["", "token perplexity", f"to {found['reference']}, %"]
        yield Drawing(documents, columns, rows, "In brackets: 95 % intervals over documents.")
        stretches = [each for cell in cells.values() for each in cell["by_position"]]
        places = sorted({(each["start"], each["end"]) for each in stretches})
        rows = [[Cell(name), *_at(cell["by_position"], places)] for name, cell in cells.items()]
        columns = ["", *(f"{start:,} to {end - 1:,}" for start, end in places)]
        yield Drawing(f"{documents}: token perplexity by position", columns, rows)


def _system(row: dict[str, Any]) -> str:
    return str(row["system"]) + (", memory off" if row["memory"] == "off" else "")


def _at(stretches: list[dict[str, Any]], places: list[tuple[int, int]]) -> Iterator[Cell]:
    values = {(each["start"], each["end"]): each["perplexity"]["value"] for each in stretches}
    return (_number(values.get(place)) for place in places)


def _perplexity(found: dict[str, Any]) -> Iterator[Drawing]:
    measures = {"token_perplexity": "token perplexity", "bits_per_byte": "bits a byte"}
    rows = [
        [Cell(f"memory {memory}"), *(_ends(figures[measure]) for measure in measures)]
        for memory, figures in found["figures"].items()
    ]
    title = f"{found['setting']['system']} on {found['setting']['documents']}"
    yield Drawing(title, ["", *measures.values()], rows, "In brackets: 95 % intervals over documents.")
    stretches = [each for document in found["documents"] for each in document["by_position"]]
    starts = sorted({each["start"] for each in stretches})
    sums = {"on": "nats", "off": "nats_memory_off"}
    by_memory = [
        [_mean_perplexity(stretches, start, sums[memory]) for start in starts] for memory in found["figures"]
    ]
    rows = [
        [Cell(f"from {start:,}"), *map(_number, at)] for start, *at in zip(starts, *by_memory, strict=True)
    ]
    columns = ["tokens", *(f"memory {memory}" for memory in found["figures"])]
    yield Drawing("Token perplexity by position", columns, rows)


def _mean_perplexity(stretches: list[dict[str, Any]], start: int, nats: str) -> float:
    there = [each for each in stretches if each["start"] == start]
    return math.exp(sum(each[nats] for each in there) / sum(each["tokens"] for each in there))


def _efficiency(found: dict[str, Any]) -> Iterator[Drawing]:
    yield from _times(found)
    rows = [
        [
            Cell(f"{each['length']:,}"),
            *map(_bytes, (each["state_bytes"], each["cache_bytes"])),
            *(_number(each[f"op_flop_{name}"] / 1e12) for name in ("infini", "full")),
        ]
        for each in found["formulas"]
    ]
    headings = ["tokens", "memories and open segment", "key/value cache", "infini, TFLOP", "full, TFLOP"]
    yield Drawing("What is carried, and operations of one layer's attention, by formula", headings, rows)


def _times(found: dict[str, Any]) -> Iterator[Drawing]:
    """Milliseconds: a row for what ran, a column a length; what ran twice has both."""
    names = [name for name in ("pass", "heads", "system") if name in found["rows"][0]]
    lengths = list(dict.fromkeys(row["length"] for row in found["rows"]))
    times: dict[tuple[str, ...], dict[Any, str]] = {}
    for row in found["rows"]:
        of_system = times.setdefault(tuple(row[name] for name in names), {})
        of_system[row["length"]] = " and ".join(filter(None, [of_system.get(row["length"]), _time(row)]))
    order = list(dict.fromkeys(what[:-1] for what in times))
    rows = [
        [*map(Cell, what), *(Cell(times[what].get(length, NOTHING)) for length in lengths)]
        for what in sorted(times, key=lambda what: order.index(what[:-1]))
    ]
    columns = [*names, *(f"{_number(length).text} tokens" for length in lengths)]
    yield Drawing(
        "Milliseconds by length", columns, rows, "In brackets: peak memory beyond weights and inputs."
    )


def _time(row: dict[str, Any]) -> str:
    milliseconds = row["ms"] if "ms" in row else 1000 * row["seconds"] if "seconds" in row else None
    if milliseconds is None:
        return str(row.get("note", NOTHING))
    size = row.get("bytes") if "seconds" in row else row.get("extra_bytes")
    return _number(milliseconds).text + (f" ({_bytes(size).text})" if size is not None else "")


def _benchmark(found: dict[str, Any]) -> Iterator[Drawing]:
    rows = found["arms"] if "arms" in found else found["rows"]
    if all({"length", "pass", "system"} <= row.keys() for row in rows):
        return _times(found)
    return _as_they_are(f"Benchmark {found['benchmark']}", rows)


def _harness(found: dict[str, Any]) -> Iterator[Drawing]:
    setting = found["setting"]
    control = ", memory reset" if setting["memory_reset"] else ""
    read = f"segments of {setting['segment_length']:,}, {setting['dtype']}{control}"
    title = f"{setting['model']}, {setting['system']}, {read}, by lm-eval {found['lm_eval']}"
    return _as_they_are(title, found["figures"])


def _as_they_are(title: str, rows: list[dict[str, Any]]) -> Iterator[Drawing]:
    """A table for each part of a benchmark; where a row lacks what others have, its cell says so."""
    for part, group in groupby(map(_flat, rows), key=lambda row: row.pop("part", "")):
        of_part = list(group)
        names = list(dict.fromkeys(name for row in of_part for name in row))
        shown = [[_shown(name, row.get(name)) for name in names] for row in of_part]
        columns = [name.replace("_", " ") for name in names]
        yield Drawing(f"{title}, {part}" if part else title, columns, shown)


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """What stands in a dict by both names."""
    flat: dict[str, Any] = {}
    for name, value in row.items():
        inner = {f"{name}, {key}": each for key, each in value.items()} if isinstance(value, dict) else {}
        flat |= inner or {name: value}
    return flat


def _shown(name: str, value: Any) -> Cell:
    is_size = name.endswith("bytes") and isinstance(value, int | float)
    return _bytes(value) if is_size else _number(value)


def _number(value: Any) -> Cell:
    """Numbers with four digits or more, None as nothing, other things as they are."""
    if value is None:
        return Cell(NOTHING)
    if type(value) is int:
        return Cell(f"{value:,}")
    if isinstance(value, float):
        return Cell(f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}")
    return Cell(str(value))


def _bytes(value: float) -> Cell:
    unit, name = next((each for each in ((1e9, "GB"), (1e6, "MB")) if value >= each[0]), (1e3, "kB"))
    return Cell(f"{value / unit:.3g} {name}")


def _percent(printed: str) -> Cell:
    return Cell(printed, float(printed) / 100)


def _share(proportion: dict[str, Any]) -> Cell:
    return Cell(f"{100 * proportion['share']:.0f}", proportion["share"])


def _interval(proportion: dict[str, Any] | None) -> Cell:
    if proportion is None:
        return Cell(NOTHING)
    share, low, high = (100 * proportion[end] for end in ("share", "low", "high"))
    return Cell(f"{share:.1f} ({low:.1f} to {high:.1f})", proportion["share"])


def _ends(interval: dict[str, Any] | None) -> Cell:
    """A figure with its interval, where it has one."""
    if interval is None:
        return Cell(NOTHING)
    value, low, high = (interval[end] for end in ("value", "low", "high"))
    return Cell(f"{value:.2f}" if low is None else f"{value:.2f} ({low:.2f} to {high:.2f})")


KINDS: tuple[tuple[set[str], Callable[[dict[str, Any]], Iterable[Drawing]]], ...] = (
    ({"study", "arms", "results"}, _study),
    ({"by_length", "cells"}, _passkey),
    ({"gates", "kinds", "layers"}, _gates),
    ({"total", "by_position"}, _stream),
    ({"reference", "documents", "rows"}, _lm_table),
    ({"setting", "documents", "figures"}, _perplexity),
    ({"lm_eval", "figures"}, _harness),
    ({"benchmark", "rows", "formulas"}, _efficiency),
    ({"benchmark", "rows"}, _benchmark),
    ({"benchmark", "arms"}, _benchmark),
)
