"""SessionPool: many sessions generate side by side, each at its own place in its own text."""

from typing import Any

import torch

from infini_attention.models.decoder import Decoder
from infini_attention.models.interrupts import uninterrupted
from infini_attention.streaming.sampling import Sampler, SamplingOptions
from infini_attention.streaming.session import Session, check_decoder


class SessionPool:
    """A decoder of several rows, and the sessions that generate in them.

    Sessions come and go between steps, and their segments end whenever they end; none sees anything of
    another. A session in the pool refuses everything else until it is evicted or has finished.

    Args:
        decoder: where the sessions generate; as many at once as it has rows.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._members: dict[int, _Member] = {}
        self._picking = False  # whether tokens are still to be chosen after the last step of the decoder
        self._likeliest: dict[int, int] = {}
        self._made: list[tuple[Session, int]] = []

    def __len__(self) -> int:
        """Sessions that are generating."""
        return len(self._members)

    def admit(self, session: Session, **options: Any) -> None:
        """Let `session` generate from the next step on; `options` are those of `Session.generate`.

        Raises:
            ValueError: no row is free, nothing was fed yet, or unknown options.
            RuntimeError: the session is in use.
        """
        row = next((row for row in range(self.decoder.rows) if row not in self._members), None)
        if row is None:
            raise ValueError(f"all {self.decoder.rows} rows are taken; evict a session, or take more rows")
        check_decoder(self.decoder, session.model)
        sampler = Sampler(SamplingOptions.of(session.model, options))
        self._members[row] = _Member(session, sampler)

    def evict(self, session: Session) -> None:
        """Take `session` out, with its state and all tokens it has generated; it can be used again.

        Raises ValueError if it is not in the pool.
        """
        row = next((row for row, member in self._members.items() if member.session is session), None)
        if row is None:
            raise ValueError("the session is not in the pool; it may have finished")
        self._members.pop(row).leave()

    @torch.inference_mode()
    def step(self) -> list[tuple[Session, int]]:
        """One more token for every session in the pool, with the session it is for.

        A session that has had its last token is evicted. If one cannot go on, its error comes out of here;
        evict it, and the next step goes on where this one stopped, with nothing lost.
        """
        with self.decoder.lock:
            if not self._picking:
                self._likeliest = self._decode()
                self._picking = True
            for row, member in self._members.items():
                if member.token is None:
                    self._made.append((member.session, member.pick(self._likeliest.get(row))))
            self._picking = False
        for row in [row for row, member in self._members.items() if member.is_done]:
            self._members.pop(row).leave()
        made, self._made = self._made, []
        return made

    def _decode(self) -> dict[int, int]:
        """Put the tokens that wait through the model; the likeliest next ones, by row."""
        waiting = {row: member.token for row, member in self._members.items() if member.token is not None}
        if not waiting:
            return {}
        with uninterrupted():
            for row in waiting:
                self._members[row].session.sit_down(self.decoder, row)
            logits = self.decoder.step(waiting)
            for row in waiting:
                self._members[row].session.decoded(logits[row])
                self._members[row].token = None
        likeliest = logits.argmax(dim=-1).tolist()  # once for all: each would wait for the GPU
        return {row: likeliest[row] for row in waiting}


class _Member:
    """One session's generation in the pool: the token that waits for its step, and how many there were."""

    def __init__(self, session: Session, sampler: Sampler) -> None:
        self.session, self.sampler = session, sampler
        self.token: int | None = None
        self._made = 0
        self._use = session.generation()
        self._use.__enter__()

    @property
    def is_done(self) -> bool:
        options = self.sampler.options
        return self._made >= options.max_new_tokens or self.token in options.eos_token_id

    def pick(self, likeliest: int | None) -> int:
        self.token = self.session.pick(self.sampler, likeliest)
        self._made += 1
        return self.token

    def leave(self) -> None:
        self._use.__exit__(None, None, None)
        self.session.leave_decoder()
