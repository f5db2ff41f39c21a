"""`infini demo`: a pass key is hidden in a real text and asked for when a million tokens have gone by."""

import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from infini_attention.data.passkey import PasskeyPrompts, Prompt
from infini_attention.data.texts import Text
from infini_attention.evaluation.passkey import tokens_of
from infini_attention.evaluation.progress import ResidentMemory, StreamProgress
from infini_attention.evaluation.stream import Sample, cache_bytes_per_token
from infini_attention.provenance import Provenance, provenance
from infini_attention.streaming.session import Session

FIRST_SAMPLE = 4096  # tokens after which memory is looked at first, and then whenever they have doubled


@dataclass(frozen=True)
class Demo:
    """What was hidden, what was asked, and what reading in between took.

    Attributes:
        model: its name or folder.
        text: the name of the text.
        told: the sentence that tells the key.
        told_at: how many tokens come before that sentence.
        asked: the question.
        asked_at: how many tokens come before the answer.
        key: the right answer.
        answer: the model's.
        samples: bytes of the state and of the process after so many tokens, doubled from one to the next.
        cache_bytes_per_token: what an ordinary key/value cache of the same model would take a token.
    """

    model: str
    text: str
    told: str
    told_at: int
    asked: str
    asked_at: int
    key: str
    answer: str
    samples: list[Sample]
    cache_bytes_per_token: int
    provenance: Provenance

    @property
    def found(self) -> bool:
        """Whether the answer is the key."""
        return self.answer == self.key

    def to_json(self) -> str:
        """All of it in one line of JSON."""
        return json.dumps(asdict(self) | {"found": self.found})


def demo(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    text: Text,
    *,
    tokens: int = 1 << 20,
    depth: float = 0.0,
    seed: int = 0,
) -> Demo:
    """Hide a pass key in a text, read that to the end in a session, and ask.

    Args:
        model: an `infini_*` language model in evaluation mode, with a memory in every layer.
        tokenizer: the model's, a fast one.
        text: what is read; from its beginning again after its end.
        tokens: up to and including the question.
        depth: where the key is hidden, from 0 (first) to 1 (last).
        seed: of the key, and of where in the text reading begins.

    Raises:
        ValueError: what `Session` and `data.passkey` raise.
    """
    session = Session(model, tokenizer, snapshots=0)
    prompts = PasskeyPrompts(tokenizer, "varied", prose=tokens_of(text, tokenizer), seed=seed)
    draft = prompts.draft(0)
    prompt = draft.prompt(length=tokens, depth=depth)
    samples = _read(session, prompt, text.name)
    answer = [*session.generate(max_new_tokens=len(prompt.answer), do_sample=False)]
    return Demo(
        model=model.name_or_path,
        text=text.name,
        told=_text(tokenizer, draft.told.ids),
        told_at=prompt.key_end - len(draft.told),
        asked=_text(tokenizer, draft.question.ids),
        asked_at=prompt.length,
        key=_text(tokenizer, prompt.answer),
        answer=_text(tokenizer, answer),
        samples=samples,
        cache_bytes_per_token=cache_bytes_per_token(model),
        provenance=provenance(),
    )


def _read(session: Session, prompt: Prompt, name: str) -> list[Sample]:
    """Read all of the prompt; what the session and the process took on the way."""
    memory, samples, due = ResidentMemory(), [], FIRST_SAMPLE
    began = time.perf_counter()
    with StreamProgress(Text(name), prompt.length) as progress:
        for start in range(0, prompt.length, session.chunk_length):
            stop = min(start + session.chunk_length, prompt.length)
            session.feed(torch.from_numpy(prompt.tokens(start, stop)))
            seconds, state = time.perf_counter() - began, session.info().state_bytes
            sample = Sample(stop, seconds, state_bytes=state, resident_bytes=memory.now())
            progress.show(**vars(sample), read_bytes=0)
            if stop >= due or stop == prompt.length:
                samples.append(sample)
                due = 2 * stop
    return samples


def _text(tokenizer: Any, ids: Any) -> str:
    return str(tokenizer.decode(ids)).strip()
