"""The `infini` command: parses, calls, prints. What a subcommand needs is imported when it runs."""

import argparse
import gc
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from infini_attention.devices import choose_device


@dataclass
class Reader:
    """The model that reads.

    Args:
        model: A model's name, folder or GGUF file, or an alias: passkey, smollm2, or one that is trained
            to use its memory, smollm2-books or smollm2-ask. A model without memories is retrofitted,
            untrained; one with memories, or a baseline where it can read, is taken as it is.
        segment_length: Tokens a segment when retrofitting; by default 512.
        update_rule: linear or delta, when retrofitting; by default linear.
        feature_map: Feature map of the memory, when retrofitting; by default elu1.
        normalization: sum, root, none or unit, when retrofitting; by default sum.
        local_attention: segment, sliding or sink, when retrofitting; by default segment.
        sink_tokens: How many of the first tokens sink keeps in sight, when retrofitting; by default 4.
        gate_init: Logit of every gate, when retrofitting; by default -4.
        dtype: float32, bfloat16 or auto, which takes bfloat16 on a GPU and float32 on a CPU.
        device: A device of torch, or auto, which takes the first GPU, else the CPU.
    """

    model: str = "smollm2"
    segment_length: int | None = None
    update_rule: str | None = None
    feature_map: str | None = None
    normalization: str | None = None
    local_attention: str | None = None
    sink_tokens: int | None = None
    gate_init: float | None = None
    dtype: str = "auto"
    device: str = "auto"


@dataclass
class Window:
    """What a model without memories is given in place of one.

    Args:
        window: Read through a sliding window of so many tokens, untrained, in place of a retrofit. Tables
            then call so many a segment, unless segment_length says otherwise.
        sinks: How many of the window are the text's first tokens, attention sinks, such as 4; by default 0.
    """

    window: int | None = None
    sinks: int | None = None


@dataclass
class Generation:
    """How tokens are chosen; what is left out comes from the model.

    Args:
        max_new_tokens: Stop after so many tokens; by default 256.
        do_sample: Draw tokens, instead of taking the likeliest.
        temperature: Of the draw.
        top_k: Draw from the likeliest so many.
        top_p: Draw from the likeliest that together have this probability.
        min_p: Draw from those with at least this part of the likeliest one's probability.
        repetition_penalty: Divides the scores of tokens that were there lately.
        seed: Of the draw.
    """

    max_new_tokens: int | None = None
    do_sample: bool | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def options(self) -> dict[str, Any]:
        """Those that were given."""
        return {name: value for name, value in vars(self).items() if value is not None}


OURS = Reader(model="passkey")  # the model that was trained here
TALKER = Reader(model="smollm2-ask")  # of commands that read a text, answer about it or go on with it
GROUPS = (Reader, Window, Generation)  # dataclasses whose fields are options by their own names
WIDE = 240  # characters of a table where there is no terminal to fit


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `infini` with `arguments`, by default the command line's.

    A user's mistake is one line and exit code 2, a training that diverges one line and exit code 1.
    """
    parsed = _parser().parse_args(arguments)
    function = SUBCOMMANDS[parsed.subcommand]
    try:
        function(**_grouped(function, parsed[parsed.subcommand].as_dict()))
    except ValueError as error:
        print(f"infini: {error}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as error:
        print(f"infini: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("infini: interrupted", file=sys.stderr)
        sys.exit(130)


def stream(
    text: str,
    *,
    model: str = "smollm2",
    segment_length: int | None = None,
    update_rule: str | None = None,
    feature_map: str | None = None,
    normalization: str | None = None,
    local_attention: str | None = None,
    sink_tokens: int | None = None,
    gate_init: float | None = None,
    chunk_length: int | None = None,
    max_tokens: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
    json: bool = False,
    plot: Path | None = None,
) -> None:
    """Read a text of any length through a model at constant memory: perplexity with the memory on and off.

    Ctrl-C ends the reading early; what was measured until then is shown.

    Args:
        text: A file, - for standard input, or an alias such as hamlet.
        model: A model's name, folder or GGUF file, or an alias: passkey, smollm2, or one that is trained
            to use its memory, smollm2-books or smollm2-ask. A model without memories is retrofitted,
            untrained; one with memories is read with as it is.
        segment_length: Tokens a segment when retrofitting; by default 512.
        update_rule: linear or delta, when retrofitting; by default linear.
        feature_map: Feature map of the memory, when retrofitting; by default elu1.
        normalization: sum, root, none or unit, when retrofitting; by default sum.
        local_attention: segment, sliding or sink, when retrofitting; by default segment.
        sink_tokens: How many of the first tokens sink keeps in sight, when retrofitting; by default 4.
        gate_init: Logit of every gate, when retrofitting; by default -4, which gives the memory 1.8 percent.
        chunk_length: Tokens that go through the model at once; default whole segments of at least 1024
            tokens. Changes speed and working memory, no figure.
        max_tokens: Stop after so many tokens; by default at the end of the text.
        dtype: float32, bfloat16 or auto, which takes bfloat16 on a GPU and where a CPU is quicker with it.
        device: A device of torch, or auto, which takes the first GPU, else the CPU.
        plot: Where to draw the picture, a file such as out/stream.png.
    """
    from transformers.utils import logging

    from infini_attention.evaluation import stream_report as show
    from infini_attention.evaluation.stream import stream as read

    logging.disable_progress_bar()  # of loading; reading has its own
    if plot is not None:
        show.require_matplotlib()  # before the reading, not after it
    report = read(
        text,
        model=model,
        segment_length=segment_length,
        update_rule=update_rule,
        feature_map=feature_map,
        normalization=normalization,
        local_attention=local_attention,
        sink_tokens=sink_tokens,
        gate_init=gate_init,
        chunk_length=chunk_length,
        max_tokens=max_tokens,
        dtype=dtype,
        device=device,
    )
    _print(show.to_json(report) if json else show.tables(report))
    if plot is not None:
        show.plot(report, plot)


def bindings(
    *,
    bindings: list[int] = [1, 4, 16, 64, 256, 1024, 4096],  # noqa: B006 (never changed; shown in --help)
    head_dim: int = 64,
    segments: int = 16,
    trials: int = 8,
    seed: int = 0,
    json: bool = False,
    plot: Path | None = None,
) -> None:
    """Write random key/value pairs into the memory alone and read them back: error and exact recall.

    Args:
        bindings: Numbers of bindings to try, each a multiple of segments or smaller than it.
        head_dim: Width of keys and values.
        segments: Number of segments the bindings are written in.
        trials: Independent draws a setting.
        seed: Seed of the draws.
        plot: Where to draw the picture, a file such as out/bindings.png.
    """
    from infini_attention.evaluation import bindings_report as show
    from infini_attention.evaluation.bindings import bindings_report

    report = bindings_report(
        bindings=bindings, head_dim=head_dim, segments=segments, trials=trials, seed=seed
    )
    _print(show.to_json(report) if json else show.tables(report))
    if plot is not None:
        show.plot(report, plot)


def passkey(
    *,
    variant: str = "paper",
    lengths: list[int] = [32_768],  # noqa: B006 (never changed; shown in --help)
    depths: int = 11,
    samples: int = 10,
    exact_lengths: bool = False,
    keys: int = 1,
    rewrites: int = 0,
    prose: str | None = None,
    seed: int = 0,
    batch_rows: int = 32,
    chunk_tokens: int | None = None,
    output: Path | None = None,
    plot: Path | None = None,
    reader: Reader = OURS,
    json: bool = False,
) -> None:
    """Ask a model for a pass key that stands in a prompt of any length: exact match by length and depth.

    Args:
        variant: paper or landmark, after the papers; varied, in real prose; numbers, among other numbers.
        lengths: Tokens of a prompt, question included, such as '[32768, 131072]'.
        depths: Number of places for the key, at equal distances from first to last.
        samples: Prompts for each length and depth.
        exact_lengths: Every prompt has exactly its length; else each is shorter by another part of a segment,
            so that questions end at all places of a segment.
        keys: Keys in a prompt, one of which is asked for.
        rewrites: How often that one is told before with another value.
        prose: The text around the keys of varied; a file, - for standard input, or an alias such as hamlet.
        seed: Seed of all that is random.
        batch_rows: Prompts that are read side by side.
        chunk_tokens: Tokens of each that go through the model at once; by default whole segments, together
            some 8,192, and on a GPU the more the narrower the model is. Changes speed and working memory.
        output: A JSON file, written after every batch; the same command goes on where it was cut off.
        plot: Where to draw the heat map, a file such as out/passkey.png.
    """
    from infini_attention.data.texts import open_text
    from infini_attention.evaluation import passkey_report as show
    from infini_attention.evaluation.passkey import even_depths
    from infini_attention.evaluation.passkey import passkey as measure
    from infini_attention.evaluation.stream_report import require_matplotlib

    if plot is not None:
        require_matplotlib()  # before the reading, not after it
    text = None if prose is None else open_text(prose)
    model, tokenizer = _loaded(reader)
    report = measure(
        model,
        tokenizer,
        variant=variant,
        lengths=lengths,
        depths=even_depths(depths),
        samples=samples,
        exact_lengths=exact_lengths,
        keys=keys,
        rewrites=rewrites,
        prose=text,
        seed=seed,
        batch_rows=batch_rows,
        chunk_tokens=chunk_tokens,
        output=output,
    )
    _print(report.to_json() if json else show.tables(report))
    if plot is not None:
        show.plot(report, plot)


def perplexity(
    documents: str,
    *,
    split: str | None = None,
    name: str | None = None,
    system: str | None = None,
    max_documents: int | None = None,
    max_tokens: int | None = None,
    memory_off: bool = True,
    data_files: list[str] | None = None,
    column: str = "text",
    batch_rows: int = 8,
    chunk_tokens: int | None = None,
    output: Path | None = None,
    reader: Reader,
    sliding: Window,
    json: bool = False,
) -> None:
    """Stream whole documents through any system: token, word and byte perplexity by position.

    Args:
        documents: A file, a pattern, shakespeare, or a corpus such as pg19; what data.documents.source is in
            a recipe.
        split: Of a corpus; by default test.
        name: What the documents are called in tables; by default what was given.
        system: What the model is called in tables; by default by its kind, such as Infini delta.
        max_documents: How many are read at most.
        max_tokens: Read of each at most.
        memory_off: Read everything also with every gate shut, where there are open ones.
        data_files: Local files to be read in a corpus's place.
        column: That holds the text.
        batch_rows: Documents that are read side by side.
        chunk_tokens: Tokens of each that go through the model at once; by default whole segments, as many as
            keep the device busy. Changes speed and working memory.
        output: A JSON file, written after every document; the same command goes on where it was cut off.
    """
    from infini_attention.evaluation import document_perplexity_report as show
    from infini_attention.evaluation.document_perplexity import document_perplexity, evaluation_documents

    chosen = evaluation_documents(
        documents, split, data_files=data_files, column=column, max_documents=max_documents
    )
    model, tokenizer = _loaded(reader, sliding)
    report = document_perplexity(
        model,
        tokenizer,
        chosen,
        name=name,
        system=system,
        max_tokens=max_tokens,
        memory_off=memory_off,
        batch_rows=batch_rows,
        chunk_tokens=chunk_tokens,
        output=output,
    )
    _print(report.to_json() if json else show.tables(report))


def summaries(
    documents: str,
    *,
    split: str | None = None,
    max_documents: int | None = None,
    data_files: list[str] | None = None,
    column: str = "text",
    query_column: str | None = None,
    summary_column: str | None = None,
    query: str = "Summarize the whole text.",
    chat: bool = False,
    greedy: bool = False,
    temperature: float = 0.5,
    top_p: float = 0.95,
    max_new_tokens: int = 1024,
    seed: int = 0,
    window: int | None = None,
    window_at: Literal["start", "end"] = "end",
    chunk_tokens: int | None = None,
    output: Path | None = None,
    reader: Reader,
    json: bool = False,
) -> None:
    """Have long documents summarised in answer to queries: ROUGE by length, beside a window of each document.

    Args:
        documents: A file, a pattern, or a corpus such as booksum, whose rows have text, queries and
            summaries; what data.summaries.documents.source is in a recipe.
        split: Of a corpus; by default test.
        max_documents: How many are read at most.
        data_files: Local files to be read in a corpus's place.
        column: That holds the text; of a corpus, by default its own.
        query_column: Of the queries; by default queries where a row has a list of summaries, else none.
        summary_column: Of the summaries; by default a corpus's own, else summaries.
        query: What is asked where rows have one summary and no query.
        chat: Put queries as infini ask does, as turns of the tokenizer's chat template.
        greedy: Always take the likeliest token, instead of drawing.
        temperature: Of the draw.
        top_p: Draw from the likeliest that together have this probability.
        max_new_tokens: Tokens of a summary at most.
        seed: Of the draws.
        window: Tokens of a document that the control sees; by default half a segment, which leaves the other
            half to query and summary.
        window_at: Whether those are at the start or the end of the document.
        chunk_tokens: Tokens that go through the model at once; by default whole segments, as many as keep the
            device busy. Changes speed and working memory.
        output: A JSON file with all texts, written after every document; the same command goes on where it
            was cut off.
    """
    from infini_attention.evaluation import summaries_report as show
    from infini_attention.evaluation.document_perplexity import evaluation_documents
    from infini_attention.evaluation.summaries import Decoding
    from infini_attention.evaluation.summaries import summaries as measure

    decoding = Decoding(greedy, temperature, top_p, max_new_tokens, seed)
    chosen = evaluation_documents(
        documents, split, data_files=data_files, column=column, max_documents=max_documents
    )
    model, tokenizer = _loaded(reader)
    report = measure(
        model,
        tokenizer,
        chosen,
        query_column=query_column,
        summary_column=summary_column,
        query=query,
        chat=chat,
        decoding=decoding,
        window=window,
        window_at=window_at,
        chunk_tokens=chunk_tokens,
        output=output,
    )
    _print(report.to_json() if json else show.tables(report))


def answers(
    documents: str,
    output: Path,
    *,
    model: str = "smollm2",
    split: str = "train",
    column: str = "text",
    max_documents: int | None = None,
    data_files: list[str] | None = None,
    each: int = 2,
    least_tokens: int = 256,
    most_tokens: int = 6000,
    told: float = 0.5,
    told_tokens: int | None = None,
    questions: int = 3,
    temperature: float = 0.7,
    top_p: float = 0.9,
    max_new_tokens: int = 160,
    batch_rows: int = 16,
    seed: int = 0,
    dtype: str = "auto",
    device: str = "auto",
) -> None:
    """Ask a model about passages of documents that it sees whole, for its retrofit to learn from.

    Beside its answers stand those to questions for notes and facts that were hidden in passages. Training
    takes the file as data.summaries.documents.source, with data.summaries.chat; see
    recipes/retrofit/answers.yaml.

    Args:
        documents: A file, a pattern, or a corpus such as pg19; what data.documents.source is in a recipe.
        output: A new .jsonl file, a passage a line: text, queries and summaries.
        model: That answers: a model's name, folder or GGUF file, or an alias such as smollm2.
        split: Of a corpus.
        column: That holds the text; of a corpus, by default its own.
        max_documents: How many are read at most.
        data_files: Local files to be read in a corpus's place.
        each: Passages of a document.
        least_tokens: Of a passage.
        most_tokens: Of a passage that the model answers about.
        told: Share of passages that hide what they are asked for, from 0 to 1.
        told_tokens: The most of these; by default most_tokens.
        questions: That a passage is asked.
        temperature: Of the draw of answers.
        top_p: Draw from the likeliest that together have this probability.
        max_new_tokens: Of an answer; one that does not end within them is left out.
        batch_rows: Questions that are answered side by side.
        seed: Of all that is random.
        dtype: float32, bfloat16 or auto, which takes bfloat16 where that is faster.
        device: A device of torch, or auto, which takes the first GPU, else the CPU.
    """
    from rich.progress import track
    from transformers.utils import logging

    from infini_attention.data.answers import Passages, Sampling, answered, written
    from infini_attention.data.documents import Documents
    from infini_attention.devices import choose_dtype
    from infini_attention.models import load_model, load_tokenizer

    passages = Passages(each, least_tokens, most_tokens, told, told_tokens, questions, seed)
    sampling = Sampling(temperature, top_p, max_new_tokens, batch_rows)
    chosen = Documents(
        documents, split=split, column=column, data_files=data_files, max_documents=max_documents
    )
    logging.disable_progress_bar()
    place = choose_device(device)
    answerer = load_model(model, dtype=choose_dtype(dtype, place)).to(place)
    found = answered(answerer, load_tokenizer(model), chosen, passages, sampling)
    console = Console(stderr=True)
    asked = [len(each.queries) for each in track(written(found, output), "passages", console=console)]
    print(f"{output}: {len(asked):,} passages with {sum(asked):,} questions and answers")


def evaluate(
    *,
    tasks: str = "infini_continuation",
    include_path: Path | None = None,
    limit: float | None = None,
    num_fewshot: int | None = None,
    data_files: list[str] | None = None,
    batch_size: int = 8,
    memory_reset: bool = False,
    chat: bool = False,
    output: Path | None = None,
    reader: Reader,
    sliding: Window,
    json: bool = False,
) -> None:
    """Ask tasks of EleutherAI's lm-evaluation-harness, each request streamed whole, whatever its length.

    Args:
        tasks: Names of tasks, groups or tags, or patterns, with commas between; GROUP::TASK for one of a
            group. Those that come with it begin with infini_ and need no network.
        include_path: A folder with more task files.
        limit: Documents of each task at most, or below 1 their share.
        num_fewshot: Examples before each question; by default what a task has.
        data_files: Text files, or patterns, that infini_books and infini_continuation are made from, and
            that infini_babi hides facts in, such as '[mine.txt]'; by default plays.
        batch_size: Rows that are read side by side. Changes speed and working memory.
        memory_reset: The control, which empties the memory before every continuation.
        chat: Put questions into the tokenizer's chat template.
        output: A JSON file with settings, versions and figures.
    """
    from infini_attention.evaluation import harness_report as show
    from infini_attention.evaluation.harness import harness, require_lm_eval

    require_lm_eval()
    model, tokenizer = _loaded(reader, sliding)
    report = harness(
        model,
        tokenizer,
        tasks.split(","),
        include_path=include_path,
        limit=limit,
        num_fewshot=num_fewshot,
        data_files=data_files,
        batch_size=batch_size,
        memory_reset=memory_reset,
        chat=chat,
        output=output,
    )
    _print(report.to_json() if json else show.tables(report))


def table(
    kind: Literal["lm"],
    results: list[str],
    *,
    reference: str = "local only",
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Set results of several systems side by side, in Markdown.

    Args:
        kind: lm, of files of infini perplexity.
        results: The files, of any systems, documents and seeds; NAME=FILE calls its system NAME.
        reference: The system that the others are compared with, document by document.
        plot: Where to draw perplexity by position, a file such as out/lm.png.
    """
    from infini_attention.evaluation import lm_table_report as show
    from infini_attention.evaluation.lm_table import lm_table
    from infini_attention.evaluation.stream_report import require_matplotlib

    if plot is not None:
        require_matplotlib()
    named = [_named(result) for result in results]
    names = {path: name for name, path in named if name is not None}
    made = lm_table([path for _, path in named], reference=reference, names=names)
    _print(made.to_json() if json else show.markdown(made))
    if plot is not None:
        show.plot(made, plot)


def report(folder: Path = Path("results"), *, output: Path) -> None:
    """Gather a folder of results into one HTML page, which needs neither network nor scripts.

    Args:
        folder: With an index, index.yaml, that says what each file is; by default results.
        output: The page to write, such as report.html.
    """
    from infini_attention.evaluation.report import report as gather
    from infini_attention.evaluation.report_page import page

    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(gather(folder)), encoding="utf-8")
    print(f"{output}, {output.stat().st_size / 1e6:.1f} MB")


def demo(
    text: str = "shakespeare",
    *,
    tokens: int = 1 << 20,
    depth: float = 0.0,
    seed: int = 0,
    reader: Reader = OURS,
    json: bool = False,
) -> None:
    """Hide a pass key in a text, read on for a million tokens at constant memory, and ask for it.

    Args:
        text: A file, - for standard input, or an alias: shakespeare for all plays, or one such as hamlet.
        tokens: Up to and including the question; a shorter text is read again from its beginning.
        depth: Where the key is hidden, from 0 (first) to 1 (last).
        seed: Of the key, and of where in the text reading begins.
    """
    from infini_attention.data.texts import open_text
    from infini_attention.streaming import demo_report as show
    from infini_attention.streaming.demo import demo as run

    opened = open_text(text)
    model, tokenizer = _loaded(reader)
    shown = run(model, tokenizer, opened, tokens=tokens, depth=depth, seed=seed)
    _print(shown.to_json() if json else show.tables(shown))


def gates(
    *,
    text: str | None = None,
    variant: str = "paper",
    length: int = 8192,
    samples: int = 4,
    keys: int = 1,
    rewrites: int = 0,
    prose: str | None = None,
    seed: int = 0,
    chunk_tokens: int | None = None,
    plot: Path | None = None,
    reader: Reader = OURS,
    json: bool = False,
) -> None:
    """Show how far every gate is open, and what the memory does for tokens of each kind.

    Args:
        text: What to read in place of pass key prompts; a file, - for standard input, or an alias such as
            hamlet.
        variant: paper or landmark, after the papers; varied, in real prose; numbers, among other numbers.
        length: Tokens of a prompt, question included; of a text, the first so many.
        samples: Prompts, their keys at even depths.
        keys: Keys in a prompt, one of which is asked for.
        rewrites: How often that one is told before with another value.
        prose: The text around the keys of varied; a file, - for standard input, or an alias such as hamlet.
        seed: Seed of all that is random.
        chunk_tokens: Tokens that go through the model at once; by default whole segments, together some
            8,192. Changes speed and working memory.
        plot: Where to draw the heat maps, a file such as out/gates.png.
    """
    from infini_attention.evaluation import gates_report as show
    from infini_attention.evaluation.gates import Prompts
    from infini_attention.evaluation.gates import gates as measure
    from infini_attention.evaluation.stream_report import require_matplotlib

    if plot is not None:
        require_matplotlib()  # before the reading, not after it
    prompts = Prompts(variant=variant, samples=samples, keys=keys, rewrites=rewrites, prose=prose, seed=seed)
    model, tokenizer = _loaded(reader)
    report = measure(model, tokenizer, text=text, prompts=prompts, length=length, chunk_tokens=chunk_tokens)
    _print(report.to_json() if json else show.tables(report))
    if plot is not None:
        show.plot(report, plot)


def ingest(
    text: str,
    *,
    output: Path,
    onto: Path | None = None,
    max_tokens: int | None = None,
    exact: bool = False,
    snapshots: bool = False,
    reader: Reader = TALKER,
    json: bool = False,
) -> None:
    """Read a text of any length into a state file of a few MB.

    Ctrl-C saves what has been read; the same command goes on from there.

    Args:
        text: A file, - for standard input, or an alias such as hamlet.
        output: The state file to write. If it holds the beginning of this text, reading goes on from there.
        onto: A state file to read on from, which stays as it is.
        max_tokens: Stop after so many tokens of the text.
        exact: Keep the open segment as it was computed, for a continuation to the last bit.
        snapshots: Keep earlier states for `infini state rewind`.
    """
    from infini_attention.streaming.ingest import ingest as read

    load = _loader(reader)
    resumed = load(output) if output.exists() else None
    snapshots = snapshots or (resumed is not None and bool(resumed.info().snapshots))
    report = read(
        text,
        output,
        load(onto),
        resumed=resumed,
        max_tokens=max_tokens,
        exact=exact,
        snapshots=snapshots,
    )
    figures = asdict(report) | {"output": str(output), "tokens_per_second": report.tokens_per_second}
    _print_figures(figures, json)
    if report.ending == "interrupted":
        print(f"infini: interrupted; the same command goes on after token {report.tokens:,}", file=sys.stderr)
        sys.exit(130)


def ask(
    state: Path,
    question: str,
    *,
    reader: Reader = TALKER,
    generation: Generation,
    json: bool = False,
) -> None:
    """Ask a question about the text of a state file, which stays as it is.

    Args:
        state: The state file.
        question: The question.
    """
    session = _loader(reader)(state)
    _say_if_not_for_chat(session, reader.model)
    _say(session, session.answer(question, **generation.options()), json)


def generate(
    state: Path | None = None,
    *,
    prompt: str | None = None,
    output: Path | None = None,
    reader: Reader = TALKER,
    generation: Generation,
    json: bool = False,
) -> None:
    """Go on with the text of a state file, or with a prompt.

    Args:
        state: The state file; without one the prompt is all there is.
        prompt: Text to read first.
        output: A state file to write afterwards, with what was generated.
    """
    from infini_attention.streaming.state_file import check_target

    if output is not None:
        check_target(output)  # before the work, not after it
    session = _loader(reader)(state)
    had_snapshots = bool(session.info().snapshots)
    if prompt:
        session.feed(prompt)
    tokens = session.generate(**generation.options())
    try:
        _say(session, tokens, json)
    finally:
        tokens.close()
        if output is not None:
            session.save(output, snapshots=had_snapshots)


def chat(
    state: Path | None = None,
    *,
    reader: Reader = TALKER,
    generation: Generation,
    json: bool = False,
) -> None:
    """Talk with the model in the terminal.

    Args:
        state: A state file to go on from; what is said is saved there, and it need not exist yet.
    """
    from infini_attention.streaming.chat import chat as talk

    if json:
        raise ValueError("a chat has no JSON; leave --json out")
    session = _loader(reader)(state if state is not None and state.exists() else None)
    _say_if_not_for_chat(session, reader.model)
    talk(session, state, Console(), **generation.options())


def state(
    action: Literal["show", "fork", "rewind"],
    file: Path,
    target: str | None = None,
    *,
    output: Path | None = None,
    reader: Reader = TALKER,
    json: bool = False,
) -> None:
    """Show what a state file holds, copy it, or take it back to an earlier token.

    Args:
        action: show; fork, which writes a checked copy; or rewind.
        file: The state file.
        target: The copy's name for fork, the token for rewind.
        output: Where rewind writes; by default the file itself.
    """
    from infini_attention.streaming.state_file import copy_state, read_header

    if action == "show":
        _print_figures(read_header(file), json)
    elif target is None:
        raise ValueError(f"{action} needs a third argument: " + ("a file" if action == "fork" else "a token"))
    elif action == "fork":
        copy_state(file, target)
        _print_figures(read_header(target), json)
    else:
        if not target.isdecimal():
            raise ValueError(f"{target} is no token number; `infini state show {file}` lists the snapshots")
        session = _loader(reader)(file)
        session.rewind(int(target))
        session.save(output or file, snapshots=True)
        _print_figures(read_header(output or file), json)


def _loader(reader: Reader) -> Callable[[Path | None], Any]:
    """What makes a session out of a state file, or a fresh one."""
    from infini_attention.streaming import Session

    model, tokenizer = _loaded(reader)

    def load(path: Path | None) -> Any:
        return Session(model, tokenizer) if path is None else Session.load(path, model, tokenizer)

    return load


def _loaded(reader: Reader, sliding: Window | None = None) -> tuple[Any, Any]:
    """The model and its tokenizer; `sliding` where the command can do without a memory."""
    from transformers.utils import logging

    from infini_attention.baselines.loading import load_system
    from infini_attention.models import load_tokenizer

    logging.disable_progress_bar()
    settings = {name: getattr(reader, name) for name in RETROFIT} | vars(sliding or Window())
    dtype = reader.dtype
    if dtype == "auto":  # fixed by the device alone, since a state belongs to one dtype
        dtype = "bfloat16" if choose_device(reader.device).type == "cuda" else "float32"
    model, _ = load_system(reader.model, settings, device=reader.device, dtype=dtype)
    return model, load_tokenizer(reader.model)


def _say_if_not_for_chat(session: Any, model: str) -> None:
    """Say on stderr what to expect of a model without a chat template, such as passkey."""
    from infini_attention.data.prompts import has_chat_template

    if not has_chat_template(session.tokenizer):
        print(
            f"infini: {model} has no chat template, so it may not have learnt to answer questions: it goes on"
            " with the text after 'Question: ... Answer:', up to --max_new_tokens",
            file=sys.stderr,
        )


def _say(session: Any, ids: Iterable[int], json: bool) -> None:
    """Print a text as it is generated, or in one line of JSON with its tokens."""
    from infini_attention.streaming.chat import text_pieces

    if json:
        tokens = list(ids)
        _print_figures({"text": "".join(text_pieces(session.tokenizer, tokens)), "ids": tokens}, json)
        return
    for piece in text_pieces(session.tokenizer, ids):
        print(piece, end="", flush=True)
    print()


def _print_figures(figures: dict[str, Any], json: bool) -> None:
    if json:
        from json import dumps

        print(dumps(figures))
        return
    table = Table(show_header=False)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), _shown(value))
    _print([table])


def _shown(value: Any) -> str:
    if type(value) is int:
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"
    return str(value)


def retrofit(
    base: str,
    output: Path,
    *,
    segment_length: int = 2048,
    update_rule: str = "linear",
    feature_map: str = "elu1",
    normalization: str = "sum",
    empty_memory: str = "local",
    local_attention: str = "segment",
    sink_tokens: int = 4,
    short_convolution: int = 0,
    layers: list[int] | None = None,
    gate_init: float = -4.0,
    json: bool = False,
) -> None:
    """Give a pre-trained model a memory, still untrained, and save it: AutoModelForCausalLM loads it.

    Texts of at most one segment give the base's logits exactly.

    Args:
        base: A model's name, folder or GGUF file, or an alias: smollm2.
        output: A new folder to save it in, with the base's tokenizer.
        segment_length: Tokens a segment.
        update_rule: linear or delta.
        feature_map: Feature map of the memory.
        normalization: sum, root, none or unit.
        empty_memory: What a first segment, with nothing before it, gets: local or gated.
        local_attention: What a token attends to beside the memory: segment, its own; sliding, the one before
            it too; sink, the text's first tokens too.
        sink_tokens: How many those are.
        short_convolution: Tokens that every query and key is a mixture of; 0 for none.
        layers: That get a memory, such as '[4, 5, 6]'; by default all that can have one.
        gate_init: Logit of every gate; -4 gives the memory 1.8 % of each output.
    """
    from transformers.utils import logging

    from infini_attention.baselines import memory_floats
    from infini_attention.models import load_tokenizer
    from infini_attention.models import retrofit as retrofitted

    logging.disable_progress_bar()
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise ValueError(f"{output} holds something already; name a new folder")
    model = retrofitted(
        base,
        segment_length=segment_length,
        update_rule=update_rule,
        feature_map=feature_map,
        normalization=normalization,
        empty_memory=empty_memory,
        local_attention=local_attention,
        sink_tokens=sink_tokens,
        short_convolution=short_convolution,
        layers=layers,
        gate_init=gate_init,
    )
    tokenizer = load_tokenizer(base)
    for part in (model, tokenizer):
        part.save_pretrained(output)
    heads = model.config.num_attention_heads
    figures = {
        "model": type(model).__name__,
        "parameters": model.num_parameters(),
        "gates": len(model.config.infini_layers) * heads,
        "layers_with_memory": len(model.config.infini_layers),
        "layers": model.config.num_hidden_layers,
        "numbers_in_memory": memory_floats(model.config, segment_length),
        "output": str(output),
    }
    _print_figures(figures, json)


def train(recipe: Path, overrides: list[str]) -> None:
    """Train by a recipe; the same command goes on where it was cut off.

    SIGTERM and Ctrl-C end it after the step that is under way, with a checkpoint.

    Args:
        recipe: A YAML file; the folder recipes has some.
        overrides: Values to set anew, such as --training.max_steps 10; --help lists all. With --dry_run what
            would run and what it would need is shown, and nothing is trained; --json prints one line of JSON.
    """
    from transformers.utils import logging

    from infini_attention.training.recipe import read_recipe

    logging.disable_progress_bar()  # of loading and saving; training has its own
    read = read_recipe(recipe, overrides)
    if read.dry_run:
        from infini_attention.training.run import dry_run

        _print_figures(dry_run(read.recipe), read.json)
        return
    import torch.distributed as dist

    from infini_attention.training.run import train as run

    figures = run(read.recipe, read.text)
    if dist.is_initialized():
        gc.collect()  # the trainer, which holds the group, too
        dist.destroy_process_group()  # whose threads could otherwise abort a process that ends
    if read.recipe.training.should_save:
        _print_figures(figures, read.json)
    if "stopped_by" in figures:
        print(
            f"infini: stopped by {figures['stopped_by']} after step {figures['steps']:,}; the same command "
            "goes on from there",
            file=sys.stderr,
        )
        sys.exit(130 if figures["stopped_by"] == "SIGINT" else 0)


def study(
    study: Path,
    *,
    output: Path | None = None,
    jobs: int = 1,
    devices: list[int] | None = None,
    plot: Path | None = None,
    json: bool = False,
) -> None:
    """Train several arms of a recipe and ask each of them the same questions: one table, one plot over all.

    Ctrl-C saves what has been done; the same command goes on from there. Exit code 1 when a run fails.

    Args:
        study: A YAML file; the folder recipes/studies has some.
        output: The folder of all runs; by default out/studies and the name of the file.
        jobs: Runs at a time, each a process of its own.
        devices: GPUs that the runs are dealt to, such as '[0, 1]'; by default all.
        plot: Where to draw exact match by length, recall by bytes of state, perplexity and ROUGE by arm: a
            file such as out/study.png.
    """
    from infini_attention.evaluation import study_report as show
    from infini_attention.evaluation.stream_report import require_matplotlib
    from infini_attention.evaluation.study import read_study, run_study

    if plot is not None:
        require_matplotlib()  # before the work, not after it
    report = run_study(
        read_study(study), output or Path("out/studies", study.stem), jobs=jobs, devices=devices
    )
    _print(report.to_json() if json else show.tables(report))
    if plot is not None:
        show.plot(report, plot)
    if report.interrupted:
        sys.exit(130)
    if any(result.failed is not None for result in report.results):
        sys.exit(1)


def tokenizer(
    documents: str,
    output: Path,
    *,
    vocab_size: int = 2048,
    passkeys: bool = False,
    data_files: list[str] | None = None,
    column: str = "text",
    max_documents: int | None = None,
) -> None:
    """Train a byte-level BPE tokenizer on documents, with every digit a token by itself.

    Args:
        documents: A file, a pattern, shakespeare, or a corpus; what data.documents.source is in a recipe.
        output: The folder to save it in; a recipe's data.tokenizer can name it.
        vocab_size: Tokens, of which 256 are the bytes.
        passkeys: The words that tell of pass keys, and their names, are tokens by themselves, too.
        data_files: Local files to be read in a corpus's place.
        column: That holds the text.
        max_documents: How many are read at most.
    """
    from infini_attention.data.documents import Documents, open_documents
    from infini_attention.data.passkey import WORDS
    from infini_attention.data.tokenizers import train_tokenizer

    chosen = Documents(documents, data_files=data_files, column=column, max_documents=max_documents)
    pieces = (piece for document in open_documents(chosen) for piece in document.pieces)
    words = WORDS if passkeys else ()
    train_tokenizer(pieces, vocab_size=vocab_size, words=words).save_pretrained(output)
    print(f"{vocab_size:,} tokens in {output}")


def doctor(*, json: bool = False) -> None:
    """Show versions, devices, the backend each device gets and why, and check that it is right.

    Exit code 1 when a check fails.
    """
    from infini_attention.doctor import diagnose

    diagnosis = diagnose()
    _print(diagnosis.to_json() if json else diagnosis.tables())
    if not diagnosis.sound:
        sys.exit(1)


SUBCOMMANDS: dict[str, Callable[..., None]] = {
    "demo": demo,
    "stream": stream,
    "ingest": ingest,
    "ask": ask,
    "generate": generate,
    "chat": chat,
    "state": state,
    "retrofit": retrofit,
    "train": train,
    "tokenizer": tokenizer,
    "study": study,
    "perplexity": perplexity,
    "answers": answers,
    "summaries": summaries,
    "eval": evaluate,
    "table": table,
    "report": report,
    "bindings": bindings,
    "passkey": passkey,
    "gates": gates,
    "doctor": doctor,
}
RETROFIT = (
    "segment_length",
    "update_rule",
    "feature_map",
    "normalization",
    "local_attention",
    "sink_tokens",
    "gate_init",
)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="infini",
        description="Texts of any length, a memory of fixed size.",
        version=version("infini-attention"),
    )
    subcommands = parser.add_subcommands()
    for name, function in SUBCOMMANDS.items():
        summary = (function.__doc__ or "").splitlines()[0]
        subparser = ArgumentParser(description=summary)
        _add_arguments(subparser, function)
        if "json" in inspect.signature(function).parameters:
            subparser.add_argument(
                "--json", action="store_true", help="Print one line of JSON instead of tables."
            )
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def _add_arguments(parser: ArgumentParser, function: Callable[..., None]) -> None:
    """Those of `function`: required ones and optional ones before its `*` by place, -o, groups flat."""
    parameters = inspect.signature(function).parameters
    groups = _groups(function)
    by_place = [
        each
        for each in parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD and each.default is not each.empty
    ]
    skipped: set[str | int] = {
        "json",
        "output",
        "overrides",
        "results",
        *groups,
        *(each.name for each in by_place),
    }
    parser.add_function_arguments(function, as_group=False, as_positional=True, skip=skipped)
    for each in by_place:
        described = _help_of(function, each.name)
        parser.add_argument(each.name, nargs="?", type=each.annotation, default=each.default, help=described)
    if "results" in parameters:
        described = _help_of(function, "results")
        parser.add_argument("results", nargs="+", type=str, help=described)
    for group in groups.values():
        parser.add_class_arguments(group.annotation, as_group=False)
        if group.default is not group.empty:
            parser.set_defaults(vars(group.default))
    if "overrides" in parameters:
        described = _help_of(function, "overrides")
        parser.add_argument("overrides", nargs=argparse.REMAINDER, help=described)
    if "output" in parameters:
        required = parameters["output"].default is inspect.Parameter.empty
        kind: Any = Path if required else Path | None
        parser.add_argument("-o", "--output", type=kind, required=required, help=_help_of(function, "output"))


def _groups(function: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """The parameters of `function` that stand for a group of options."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each for each in parameters if each.annotation in GROUPS}


def _grouped(function: Callable[..., None], settings: dict[str, Any]) -> dict[str, Any]:
    """`settings` by name, with the fields of groups put into them."""
    for name, group in _groups(function).items():
        kind = group.annotation
        settings[name] = kind(**{field: settings.pop(field) for field in vars(kind())})
    return settings


def _help_of(function: Callable[..., None], name: str) -> str:
    lines = (function.__doc__ or "").splitlines()
    return next(line.split(": ", 1)[1] for line in lines if line.strip().startswith(f"{name}: "))


def _named(result: str) -> tuple[str | None, Path]:
    """NAME=FILE as a name and a file; None for the name of a file alone, which may have a = in its path."""
    name, _, file = result.partition("=")
    is_named = name and os.path.isfile(file) and not os.path.isfile(result)
    return (name, Path(file)) if is_named else (None, Path(result))


def _print(shown: str | Iterable[Table]) -> None:
    """A line as it is, tables through rich."""
    if isinstance(shown, str):
        print(shown)
        return
    console = Console(markup=False)  # pip's brackets are no markup
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE  # a file or a pipe cuts no figure short
    for table in shown:
        console.print(table)
