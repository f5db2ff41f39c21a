"""The `infini` command: parses, calls, prints. What a subcommand needs is imported when it runs."""

import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table


def main(arguments: Sequence[str] | None = None) -> None:
    """Run `infini` with `arguments`, by default the command line's.

    A user's mistake is one line and exit code 2.
    """
    parsed = _parser().parse_args(arguments)
    settings = vars(parsed[parsed.subcommand])
    try:
        SUBCOMMANDS[parsed.subcommand](**settings)
    except ValueError as error:
        print(f"infini: {error}", file=sys.stderr)
        sys.exit(2)


def stream(
    text: str,
    *,
    model: str = "smollm2",
    segment_length: int | None = None,
    update_rule: str | None = None,
    feature_map: str | None = None,
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
        model: A model's name, folder or GGUF file, or an alias such as smollm2. A model without memories is
            retrofitted, untrained; one with memories is read with as it is.
        segment_length: Tokens a segment when retrofitting; by default 512.
        update_rule: linear or delta, when retrofitting; by default linear.
        feature_map: Feature map of the memory, when retrofitting; by default elu1.
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


def doctor(*, json: bool = False) -> None:
    """Show versions, devices, the backend each device gets and why, and check that it is right.

    Exit code 1 when a check fails.
    """
    from infini_attention.doctor import diagnose

    diagnosis = diagnose()
    _print(diagnosis.to_json() if json else diagnosis.tables())
    if not diagnosis.sound:
        sys.exit(1)


SUBCOMMANDS: dict[str, Callable[..., None]] = {"stream": stream, "bindings": bindings, "doctor": doctor}


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
        subparser.add_function_arguments(function, as_group=False, as_positional=True, skip={"json"})
        subparser.add_argument(
            "--json", action="store_true", help="Print one line of JSON instead of tables."
        )
        subcommands.add_subcommand(name, subparser, help=summary)
    return parser


def _print(shown: str | Iterable[Table]) -> None:
    """A line as it is, tables through rich."""
    if isinstance(shown, str):
        print(shown)
        return
    console = Console(markup=False)  # pip's brackets are no markup
    for table in shown:
        console.print(table)
