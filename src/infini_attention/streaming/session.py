"""Session: one text of any length behind one small state, to feed, ask, fork, rewind, save and load."""

import threading
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from infini_attention.data.prompts import question_turn
from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.decoder import Committed, Decoder
from infini_attention.models.interrupts import uninterrupted
from infini_attention.streaming.fingerprint import fingerprint
from infini_attention.streaming.history import History
from infini_attention.streaming.sampling import Sampler, SamplingOptions
from infini_attention.streaming.snapshots import Snapshots
from infini_attention.streaming.sources import Source, token_ids
from infini_attention.streaming.state_file import (
    Snapshot,
    StateContents,
    read_state,
    write_state,
)
from infini_attention.streaming.states import (
    MOST_SNAPSHOTS,
    MOST_TAIL,
    cache_of,
    check_model,
    committed,
    committed_of,
    open_segment_of,
    shapes_of,
    states_of,
)

CHUNK_TOKENS = {"cuda": 65_536, "cpu": 2_048}  # tokens that go through the model at once, about


@dataclass(frozen=True)
class SessionInfo:
    """What a session holds.

    Attributes:
        tokens: fed so far.
        segments: whole ones, which are in memory.
        open_tokens: tokens after the last whole segment.
        waiting_tokens: those of them that have not gone through the model yet.
        state_bytes: of the state, wherever it is.
        snapshots: tokens to which `rewind` can go back, beside those of the open segment.
        segment_length: N.
        device: where the state is.
        digest: of all tokens up to the last whole segment.
    """

    tokens: int
    segments: int
    open_tokens: int
    waiting_tokens: int
    state_bytes: int
    snapshots: list[int]
    segment_length: int
    device: str
    digest: str


class Session:
    """A text of any length, read once, behind a state of fixed size.

    Tokens go through the model in chunks that end at fixed multiples of `chunk_length` from the start, so how
    a text was cut into `feed` calls changes nothing, to the last bit. Tokens after the last such place wait
    until more come, or until something is generated.

    A session is for one thread at a time; a second one is refused with RuntimeError.

    Args:
        model: an `infini_*` language model with a memory in every layer, in evaluation mode.
        tokenizer: the model's, a fast one.
        chunk_length: tokens that go through the model at once, rounded up to whole segments; default about
            2,048 on a CPU and 65,536 on a GPU. Part of what a bitwise repetition has to repeat.
        snapshots: how many earlier states to keep for `rewind`, in the host's memory, log-spaced.
        decoder: where tokens are generated; default one of a single row that all sessions of the model share.

    Raises:
        ValueError: a model, tokenizer or number that cannot be right.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chunk_length: int | None = None,
        snapshots: int = 16,
        decoder: Decoder | None = None,
    ) -> None:
        check_model(model)
        size: int = model.config.segment_length
        wanted = CHUNK_TOKENS.get(model.device.type, 2_048) if chunk_length is None else chunk_length
        if not 1 <= wanted <= MOST_TAIL // 2:
            raise ValueError(f"chunk_length is {chunk_length}; give from 1 to {MOST_TAIL // 2:,}")
        if snapshots > MOST_SNAPSHOTS:
            raise ValueError(f"snapshots is {snapshots}; keep at most {MOST_SNAPSHOTS:,}")
        if decoder is not None:
            check_decoder(decoder, model)
        self.model, self.tokenizer = model, tokenizer
        self.chunk_length = -(-wanted // size) * size
        self._decoder = decoder
        self._lock = threading.Lock()
        self._kept = Snapshots(snapshots)
        self._cache: InfiniCache | None = None  # the state is here, or in a decoder:
        self._seat: tuple[Decoder, int] | None = None
        self._logits: Tensor | None = None  # after the last token that has gone through the model
        self._read = 0  # tokens that have
        self._history = History(size)  # of those
        self._waiting = torch.empty(0, dtype=torch.int64)  # ids that have not
        self._recent: list[int] = []  # what repetition is judged by while tokens are generated

    # --- feeding -----------------------------------------------------------------------------------------

    def feed(self, source: Source, *, progress: Callable[[int], None] | None = None) -> int:
        """Read on: any length, constant memory.

        Args:
            source: text, the Path of a UTF-8 file, token ids (list, tensor or any iterable of int), an open
                text or binary file, or an iterable of pieces of text, which are read as one text. Texts of
                separate calls are tokenised separately. No special tokens are added.
            progress: called after every chunk with the tokens fed so far in this call.

        Returns:
            How many tokens were fed. What was read before an exception (Ctrl-C, a broken file) has been fed.

        Raises:
            ValueError: ids outside the vocabulary, text that is not UTF-8, an unsupported source.
            RuntimeError: the session is in use by another thread or a generation.
        """
        fed = 0
        with self._in_use():
            for ids in token_ids(source, self.tokenizer, self.chunk_length):
                self._check_ids(ids)
                self._waiting = torch.cat([self._waiting, ids])
                fed += len(ids)
                self._read_whole_chunks()
                if progress is not None:
                    progress(fed)
        return fed

    def _check_ids(self, ids: Tensor) -> None:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < self.model.config.vocab_size:
            wrong = next(i for i in ids.tolist() if not 0 <= i < self.model.config.vocab_size)
            raise ValueError(
                f"token id {wrong} is outside the vocabulary of {self.model.config.vocab_size}; "
                "use the model's own tokenizer"
            )

    def _read_whole_chunks(self) -> None:
        while len(self._waiting) >= (room := self.chunk_length - self._read % self.chunk_length):
            self._read_on(room)

    def _read_all(self) -> None:
        """Let what waits go through the model too."""
        self._read_whole_chunks()
        if len(self._waiting):
            self._read_on(len(self._waiting))

    @torch.inference_mode()
    def _read_on(self, tokens: int) -> None:
        """Put the first `tokens` that wait through the model. Interrupted, it leaves everything as it was."""
        check_model(self.model)
        cache, ids = self._own_cache().copy(), self._waiting[:tokens]
        output = self.model(
            input_ids=ids[None].to(self.model.device),
            use_cache=True,
            logits_to_keep=1,
            **{CACHE_ARGUMENT: cache},
        )
        logits = output.logits[0, -1].clone()
        with uninterrupted():
            self._cache = cache
            self._count(tokens, logits)

    def _count(self, tokens: int, logits: Tensor) -> None:
        """Take note that the first `tokens` that waited have gone through the model."""
        ids, rest = self._waiting[:tokens].tolist(), self._waiting[tokens:].clone()
        self._read, self._waiting, self._logits = self._read + tokens, rest, logits
        self._history.add(ids)
        if not self._history.opened:
            self._take_snapshot()

    # --- generating --------------------------------------------------------------------------------------

    def generate(self, **options: Any) -> Generator[int, None, None]:
        """Yield token ids one by one; each is part of the session's text as soon as it is out.

        Options are transformers': max_new_tokens, do_sample, temperature, top_k, top_p, min_p, typical_p,
        repetition_penalty, no_repeat_ngram_size, eos_token_id, and `seed`; defaults are those of the model's
        `generation_config`, and 256 new tokens. An end-of-sequence token is yielded too, and is the last.
        While the generator is neither finished nor closed, the session refuses everything else.

        Raises:
            ValueError: unknown options, or nothing was fed yet.
            RuntimeError: the session is in use by another thread or a generation.
        """
        sampler = Sampler(SamplingOptions.of(self.model, options))
        if not self.tokens:
            raise ValueError("nothing was fed yet; feed a prompt first")
        return self._generate(sampler)

    def _generate(self, sampler: Sampler) -> Generator[int, None, None]:
        decoder = self._decoder or shared_decoder(self.model)
        token = 0
        with self.generation():
            for number in range(sampler.options.max_new_tokens):
                if number:
                    with decoder.lock, uninterrupted():
                        self.sit_down(decoder, 0)  # another session may have sat there meanwhile
                        self.decoded(decoder.step({0: token})[0].clone())
                token = self.pick(sampler)
                yield token
                if token in sampler.options.eos_token_id:
                    break

    @contextmanager
    def generation(self) -> Iterator[None]:
        """Hold the session while tokens are generated; what waits is read first.

        Inside, `pick` chooses a token, and `decoded` takes note that a decoder, in which the session sits,
        has put it through the model. Raises ValueError if nothing was fed.
        """
        with self._in_use():
            if not self.tokens:
                raise ValueError("nothing was fed yet; feed a prompt first")
            self._read_all()
            self._recent = list(self._history.opened)
            yield

    def pick(self, sampler: Sampler, likeliest: int | None = None) -> int:
        """Choose the token after the last one; it becomes part of the text, and waits.

        `likeliest` is the one with the largest logit, where that is known already.
        """
        assert self._logits is not None
        if likeliest is not None and sampler.is_greedy:
            token = likeliest
        else:
            token = sampler.pick(self._logits, self._recent)
        self._waiting = torch.tensor([token])
        self._recent.append(token)
        return token

    def decoded(self, logits: Tensor) -> None:
        """Take note that the token that waited went through the model and left `logits` (vocabulary,)."""
        self._count(1, logits)

    def sit_down(self, decoder: Decoder, row: int) -> None:
        """Put the state into the decoder's row, if it is not there, up to the last token that waits."""
        if self._seat == (decoder, row):
            return
        if len(self._waiting) > 1:  # after a step that failed
            self._read_on(len(self._waiting) - 1)
        decoder.seat(row, self, self._own_cache())
        self._seat, self._cache = (decoder, row), None

    def leave_decoder(self) -> None:
        """Take the state out of the decoder, if it is there."""
        seat = self._seat
        if seat is not None:
            seat[0].release(seat[1], self)

    def take_back(self, cache: InfiniCache) -> None:
        """Called by the decoder when it gives the session's state back."""
        self._cache, self._seat = cache, None
        if self._logits is not None:
            self._logits = self._logits.clone()  # they are the decoder's, and gone with its next step

    def fall_back(self, whole: Committed) -> None:
        """Called by the decoder when a step failed: the open segment will be read again."""
        self._seat = None
        self._go_back(self._read - len(self._history.opened), self._tail(), whole)

    def ask(self, question: str, *, remember: bool = False, **options: Any) -> str:
        """The model's answer to `question`, in the form of the tokenizer's chat template if it has one.

        The session stays as it was, so any number of questions can be asked about the same text; with
        `remember` question and answer become part of it. `options` are those of `generate`.
        """
        answer = list(self.answer(question, remember=remember, **options))
        text = self.tokenizer.decode(answer, skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip()

    def answer(self, question: str, *, remember: bool = False, **options: Any) -> Generator[int, None, None]:
        """The token ids of `ask`'s answer, one by one."""
        SamplingOptions.of(self.model, options)  # mistakes come before the question
        session = self if remember else self.fork()
        session.feed(question_turn(self.tokenizer, question, first=not self.tokens))
        return session.generate(**options)

    # --- going back and forth ----------------------------------------------------------------------------

    def fork(self) -> "Session":
        """An independent session that goes on from here; cheap, since states are shared until they change."""
        with self._in_use():
            return self._forked()

    def _forked(self) -> "Session":
        branch = Session(
            self.model, self.tokenizer, chunk_length=self.chunk_length, snapshots=self._kept.most
        )
        branch._decoder = self._decoder
        branch._cache, branch._logits = self._own_cache().copy(), self._logits
        branch._read, branch._history, branch._waiting = self._read, self._history.copy(), self._waiting
        branch._kept = self._kept.copy()
        return branch

    def rewind(self, to_token: int) -> None:
        """Go back to when `to_token` tokens had been fed.

        Possible within the open segment, and to the snapshots in `info().snapshots`: ends of segments, many
        of late and fewer of long ago.

        Raises:
            ValueError: a token that is ahead, or that nothing was kept of; the text lists what was.
        """
        with self._in_use():
            end = self._read - len(self._history.opened)
            snapshot = self._kept.at(to_token)
            if to_token == self.tokens:
                return
            if end < to_token < self.tokens:
                tail = self._tail()[: to_token - end]
                self._go_back(end, tail, committed(self.model, self._own_cache()))
            elif snapshot is not None:
                self._go_back_to(snapshot)
            elif to_token == 0:
                self._start_afresh()
            else:
                places = ", ".join(map(str, self._kept.places)) or "none"
                raise ValueError(
                    f"cannot rewind to token {to_token}; possible are those from "
                    f"{min(end + 1, self.tokens)} to {self.tokens}, 0, and the snapshots: {places}"
                )
            self._kept.forget_after(to_token)

    def _go_back(self, end: int, tail: list[int], whole: Committed) -> None:
        """To the `tail` after the last whole segment, which ended at token `end`; it is read again."""
        self._cache = cache_of(self.model, whole, tokens=end) if end else None
        self._read, self._waiting = end, torch.tensor(tail, dtype=torch.int64)
        self._history.opened, self._logits = [], None

    def _go_back_to(self, snapshot: Snapshot) -> None:
        self._start_afresh()
        whole = committed_of(snapshot)
        self._cache = cache_of(self.model, whole, tokens=snapshot.tokens)
        self._logits = snapshot.logits.to(self.model.device)
        self._read, self._history.digest = snapshot.tokens, snapshot.digest

    def reset(self) -> None:
        """Forget everything."""
        with self._in_use():
            self._start_afresh()
            self._kept.forget_after(0)

    def park(self) -> None:
        """Move the state to the host's memory; whatever is done next brings it back."""
        with self._in_use():
            self._own_cache().to("cpu")

    # --- files -------------------------------------------------------------------------------------------

    def save(self, path: str | PathLike[str], *, exact: bool = False, snapshots: bool = False) -> int:
        """Write the state to a safetensors file, whole or not at all; returns its size in bytes.

        Args:
            path: of the file; an older one is replaced.
            exact: keep the open segment as it was computed, so that the loaded session goes on bit for bit.
                Otherwise the file has the memory at the last segment's end and the ids of the tokens since,
                a few MB whatever the length of the text; these tokens are then read again.
            snapshots: keep those of `rewind` too.

        Raises:
            ValueError: a path that cannot be written, in words.
        """
        with self._in_use():
            return write_state(path, self._contents(exact, snapshots))

    def _contents(self, exact: bool, snapshots: bool) -> StateContents:
        cache, tail = self._own_cache(), self._tail()
        whole = committed(self.model, cache)
        opened = open_segment_of(cache) if exact and cache is not None and self._history.opened else None
        return StateContents(
            fingerprint=fingerprint(self.model, self.tokenizer),
            tokens=self.tokens,
            digest=self._history.digest,
            **whole._asdict(),
            tail=torch.tensor(tail, dtype=torch.int32),
            logits=self._logits if opened is not None or not tail else None,
            open_segment=opened,
            snapshots=self._kept.all() if snapshots else [],
        )

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        **settings: Any,
    ) -> "Session":
        """The session of a file that `save` wrote; `settings` are those of the constructor.

        Raises:
            ValueError: the file is of another model, tokenizer or setting (the text says what differs), or is
                damaged, too large, a link, or no state at all.
        """
        session = cls(model, tokenizer, **settings)
        contents = read_state(path, fingerprint(model, tokenizer), shapes_of(model))
        session._take_over(contents)
        return session

    def _take_over(self, contents: StateContents) -> None:
        tail, opened = contents.tail.tolist(), contents.open_segment
        read = 0 if opened is None else opened.local_key.shape[2]
        end = contents.tokens - len(tail)
        self._read, self._waiting = end + read, torch.tensor(tail[read:], dtype=torch.int64)
        self._history = History(self.model.config.segment_length, contents.digest, tail[:read])
        if self._read:
            whole = committed_of(contents)
            self._cache = cache_of(self.model, whole, tokens=self._read, opened=opened)
        if contents.logits is not None:
            self._logits = contents.logits.to(self.model.device)
        for snapshot in contents.snapshots:
            self._kept.add(snapshot)

    # --- looking -----------------------------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Tokens fed so far, those that wait included."""
        return self._read + len(self._waiting)

    @property
    def history(self) -> History:
        """All tokens fed so far, as a few bytes to compare."""
        history = self._history.copy()
        history.add(self._waiting.tolist())
        return history

    def info(self) -> SessionInfo:
        """What the session holds."""
        cache, end = self._cache, self._read - len(self._history.opened)
        place, size = self.model.device, 0
        if self._seat is not None:
            size = self._seat[0].row_nbytes
        elif cache is not None and (states := states_of(cache)):
            place, size = states[0].memory.device, cache.nbytes
        return SessionInfo(
            tokens=self.tokens,
            segments=end // self.model.config.segment_length,
            open_tokens=self.tokens - end,
            waiting_tokens=len(self._waiting),
            state_bytes=size,
            snapshots=self._kept.places,
            segment_length=self.model.config.segment_length,
            device=str(place),
            digest=self._history.digest,
        )

    # --- inside ------------------------------------------------------------------------------------------

    def _start_afresh(self) -> None:
        self.leave_decoder()
        self._cache, self._logits, self._read = None, None, 0
        self._history = History(self.model.config.segment_length)
        self._waiting = torch.empty(0, dtype=torch.int64)

    @contextmanager
    def _in_use(self) -> Iterator[None]:
        if not self._lock.acquire(blocking=False):
            raise RuntimeError(
                "the session is in use by another thread or by a generation that has not ended; "
                "finish or close it, or fork() beforehand"
            )
        try:
            yield
        finally:
            self._lock.release()

    def _tail(self) -> list[int]:
        """Ids of the tokens since the last segment that has gone through the model whole."""
        return self._history.opened + self._waiting.tolist()

    def _own_cache(self) -> InfiniCache:
        """The state, out of the decoder and on the model's device."""
        self.leave_decoder()
        if self._cache is None:
            self._cache = InfiniCache(self.model.config)
        self._cache.to(self.model.device)
        return self._cache

    def _take_snapshot(self) -> None:
        if not self._kept.most:
            return
        whole = (
            committed(self.model, self._cache)
            if self._seat is None
            else self._seat[0].committed(self._seat[1])
        )
        assert self._logits is not None
        kept = Snapshot(self._read, self._history.digest, logits=self._logits, **whole._asdict())
        self._kept.add(kept)


_DECODERS: "weakref.WeakKeyDictionary[PreTrainedModel, Decoder]" = weakref.WeakKeyDictionary()
_MAKING = threading.Lock()


def shared_decoder(model: PreTrainedModel) -> Decoder:
    """The decoder of one row that sessions of `model` share; one sits in it at a time."""
    with _MAKING:
        decoder = _DECODERS.get(model)
        if decoder is None or not decoder.fits(model):
            decoder = _DECODERS[model] = Decoder(model)
        return decoder


def check_decoder(decoder: Decoder, model: PreTrainedModel) -> None:
    """Raise ValueError for a decoder that is not for `model` as it is."""
    if not decoder.fits(model):
        raise ValueError(
            "the decoder is of another model, or the model has changed device or dtype since; make a new "
            "one: Decoder(model)"
        )
