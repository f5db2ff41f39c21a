"""What a long reading shows while it runs: a bar on standard error, and the process's memory."""

import threading
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from infini_attention.data.texts import Text

MEMORY_INTERVAL = 0.05  # seconds between two looks at resident memory


class ResidentMemory:
    """Bytes of this process in memory; inside a `with`, a thread watches for their peak.

    Raises ValueError with the pip command when psutil is missing.
    """

    def __init__(self) -> None:
        try:
            import psutil
        except ImportError as error:
            raise ValueError(
                "resident memory needs psutil; install it with: pip install 'infini-attention[demo]'"
            ) from error
        self.peak = 0
        self._process = psutil.Process()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def now(self) -> int:
        """Bytes at this moment."""
        resident = int(self._process.memory_info().rss)
        self.peak = max(self.peak, resident)
        return resident

    def __enter__(self) -> "ResidentMemory":
        self.peak = 0
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._over.wait(MEMORY_INTERVAL):
            self.now()


class StreamProgress:
    """A bar with tokens read, their speed, resident memory and state; without a terminal it shows nothing.

    The bar's length is the file's size or the number of tokens asked for, whichever is reached first; where
    neither is known it only moves.
    """

    def __init__(self, text: Text, max_tokens: int | None) -> None:
        self._total_bytes, self._max_tokens = text.total_bytes, max_tokens
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[status]}", markup=False),
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
        )
        known = bool(self._total_bytes or max_tokens)
        self._task = self._bar.add_task(text.name, total=1.0 if known else None, status="starting")

    def __enter__(self) -> "StreamProgress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def show(
        self, *, tokens: int, seconds: float, read_bytes: int, state_bytes: int, resident_bytes: int
    ) -> None:
        """Say how far the reading is; sizes in bytes."""
        of_bytes = read_bytes / self._total_bytes if self._total_bytes else 0.0
        of_tokens = tokens / self._max_tokens if self._max_tokens else 0.0
        status = (
            f"{tokens:,} tokens, {tokens / seconds:,.0f} a second, "
            f"{resident_bytes / 1e6:,.0f} MB resident, state {state_bytes / 1e6:.1f} MB"
        )
        self._bar.update(self._task, completed=max(of_bytes, of_tokens), status=status)


class ReadingProgress:
    """A bar over the tokens of all texts of a measurement; `tokens` in sum, None where that is not known.

    `peak_resident_bytes` is the most that the process held whenever it moved.
    """

    def __init__(self, name: str, tokens: int | None) -> None:
        self._bar, self._memory = StreamProgress(Text(name), tokens), ResidentMemory()
        self._tokens, self._began = 0, time.perf_counter()

    @property
    def peak_resident_bytes(self) -> int:
        """Bytes of the process in memory."""
        return self._memory.peak

    def __enter__(self) -> "ReadingProgress":
        self._bar.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.__exit__(*exception)

    def advance(self, tokens: int, cache: Any) -> None:
        """So many more tokens have been read into the cache, an InfiniCache or a baseline's."""
        self._tokens += tokens
        seconds, resident = time.perf_counter() - self._began, self._memory.now()
        self._bar.show(
            tokens=self._tokens,
            seconds=seconds,
            read_bytes=0,
            state_bytes=cache.nbytes,
            resident_bytes=resident,
        )
