"""`infini chat`: a conversation in the terminal whose memory outlives it."""

from collections.abc import Generator, Iterable, Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

from infini_attention.streaming.session import Session

HELP = "/info what it holds   /save [FILE]   /rewind TOKEN   /reset   /quit"


def text_pieces(tokenizer: PreTrainedTokenizerBase, ids: Iterable[int]) -> Iterator[str]:
    """The text of `ids` as they come, piece by piece, without special tokens."""
    stream = DecodeStream(skip_special_tokens=True)
    for token in ids:
        piece = stream.step(tokenizer.backend_tokenizer, token)
        if piece:
            yield piece


def chat(session: Session, state: Path | None, console: Console, **options: Any) -> None:
    """Talk until /quit or the end of input; with `state`, what was said is saved there.

    Ctrl-C ends an answer, not the conversation. `options` are those of `Session.generate`.
    """
    console.print(f"{session.tokens:,} tokens in memory. {HELP}", style="dim", markup=False)
    while (line := _line(console)) is not None:
        command, _, argument = line.partition(" ")
        if command == "/quit":
            break
        if command.startswith("/"):
            _command(session, command, argument.strip(), state, console)
        elif line:
            _answer(session, line, console, options)
        if line and state is not None and session.tokens:
            session.save(state, snapshots=True)


def _line(console: Console) -> str | None:
    try:
        return console.input("[bold]> ").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _answer(session: Session, question: str, console: Console, options: dict[str, Any]) -> None:
    answer: Generator[int, None, None] | None = None
    try:
        answer = session.answer(question, remember=True, **options)
        for piece in text_pieces(session.tokenizer, answer):
            console.print(piece, end="", markup=False, highlight=False)
    except KeyboardInterrupt:
        console.print(" ...", end="", style="dim")
    finally:
        if answer is not None:
            answer.close()
    console.print()


def _command(session: Session, command: str, argument: str, state: Path | None, console: Console) -> None:
    try:
        if command == "/info":
            console.print(vars(session.info()), markup=False)
        elif command == "/reset":
            session.reset()
        elif command == "/rewind":
            session.rewind(_number(argument))
            console.print(f"back at token {session.tokens:,}", style="dim")
        elif command == "/save":
            path = Path(argument) if argument else state
            if path is None:
                raise ValueError("/save needs a file")
            console.print(f"{path}: {session.save(path, snapshots=True):,} bytes", style="dim", markup=False)
        else:
            raise ValueError(f"{command} is not known; {HELP}")
    except ValueError as error:
        console.print(str(error), style="red", markup=False)


def _number(text: str) -> int:
    if not text.isdecimal():
        raise ValueError(f"{text or 'nothing'} is no token number; /rewind takes one of /info")
    return int(text)
