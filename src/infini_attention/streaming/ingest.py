"""`infini ingest`: a text of any length becomes a state file, and an interrupted reading goes on."""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from infini_attention.data.texts import TokenBlock, first_tokens, open_text, token_blocks
from infini_attention.evaluation.progress import ResidentMemory, StreamProgress
from infini_attention.streaming.history import History
from infini_attention.streaming.session import Session
from infini_attention.streaming.state_file import check_target

WARM_CHUNKS = 20
SAVE_SECONDS = 120.0  # a reading that is killed loses at most so much


@dataclass(frozen=True)
class IngestReport:
    """What `ingest` did.

    Attributes:
        text: its name.
        ending: "end of text", "max_tokens" or "interrupted".
        tokens: in the state, whatever was in it before included.
        read_tokens: of the text, in this reading.
        processed_tokens: of those in the state, that have gone through the model in this reading; the others
            wait for the rest of their chunk, or for a question.
        skipped_tokens: of the text, which the state file held already.
        seconds: of reading.
        file_bytes: of the state file.
        peak_resident_bytes: most memory the process held while reading.
        warm_resident_bytes: after so many chunks, when the ring of snapshots is full too.
    """

    text: str
    ending: str
    tokens: int
    read_tokens: int
    processed_tokens: int
    skipped_tokens: int
    seconds: float
    file_bytes: int
    peak_resident_bytes: int
    warm_resident_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Tokens that went through the model a second."""
        return self.processed_tokens / self.seconds


def ingest(
    text: str,
    output: Path,
    session: Session,
    *,
    resumed: Session | None = None,
    max_tokens: int | None = None,
    exact: bool = False,
    snapshots: bool = False,
) -> IngestReport:
    """Read `text` on from `session` into the state file `output`; Ctrl-C saves what has been read.

    The file is also written every two minutes.

    Args:
        text: a file, - for standard input, or an alias such as hamlet.
        output: the state file.
        session: what to read on from, fresh or loaded.
        resumed: the state of an earlier reading of the same text from the same start, which was not finished.
        max_tokens: stop after so many tokens of the text, those skipped included; default the whole.
        exact: as in `Session.save`, and so is `snapshots`.
        snapshots: see there.

    Raises:
        ValueError: `resumed` does not begin with `session` and this text, or there is nothing to read.
    """
    if max_tokens is not None and max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}; give at least 1, or leave it out")
    check_target(output)  # before the reading, not after it
    opened, memory = open_text(text), ResidentMemory()
    blocks = first_tokens(token_blocks(opened.pieces(), session.tokenizer), max_tokens)
    skipped = 0
    if resumed is not None:
        skipped = resumed.tokens - session.tokens
        blocks = _after(blocks, session.history, resumed, skipped, output)
        session = resumed
    processed = _processed(session)
    began = saved = time.perf_counter()
    read = read_bytes = warm = 0
    ending = "end of text" if max_tokens is None else "max_tokens"
    with memory, StreamProgress(opened, max_tokens) as progress:
        try:
            for block in blocks:
                read += session.feed(block.ids)
                read_bytes += int(block.bytes.sum())
                now, resident = time.perf_counter(), memory.now()
                warm = warm or (resident if read > WARM_CHUNKS * session.chunk_length else 0)
                progress.show(
                    tokens=read,
                    seconds=now - began,
                    read_bytes=read_bytes,
                    state_bytes=session.info().state_bytes,
                    resident_bytes=resident,
                )
                if now - saved > SAVE_SECONDS:
                    session.save(output, exact=exact, snapshots=snapshots)
                    saved = now
        except KeyboardInterrupt:
            ending = "interrupted"
        except BaseException:
            if session.tokens:  # what was read before a text breaks is kept
                session.save(output, exact=exact, snapshots=snapshots)
            raise
    if not session.tokens and ending == "interrupted":
        raise KeyboardInterrupt
    if not session.tokens:
        raise ValueError(f"{opened.name} has no tokens; give a text that is not empty")
    return IngestReport(
        text=opened.name,
        ending=ending,
        tokens=session.tokens,
        read_tokens=read,
        processed_tokens=_processed(session) - processed,
        skipped_tokens=skipped,
        seconds=time.perf_counter() - began,
        file_bytes=session.save(output, exact=exact, snapshots=snapshots),
        peak_resident_bytes=memory.peak,
        warm_resident_bytes=warm or memory.peak,
    )


def _processed(session: Session) -> int:
    info = session.info()
    return info.tokens - info.waiting_tokens


def _after(
    blocks: Iterable[TokenBlock], history: History, resumed: Session, skipped: int, output: Path
) -> Iterator[TokenBlock]:
    """The blocks after those that `resumed` has seen; ValueError if it saw others."""
    left, history = skipped, history.copy()
    if left <= 0:
        _check_same(history, resumed, output)
    for block in blocks:
        if left > 0:
            seen, block = block.split_at(left)
            history.add(seen.ids.tolist())
            left -= len(seen)
            if left == 0:
                _check_same(history, resumed, output)
        if len(block):
            yield block
    if left > 0:
        _check_same(history, resumed, output)


def _check_same(history: History, resumed: Session, output: Path) -> None:
    if history != resumed.history:
        raise ValueError(
            f"{output} exists and holds another text or start, or more than is asked for; "
            "give another output, or remove it to read anew"
        )
