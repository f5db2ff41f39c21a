"""Pass keys hidden in long prompts: made as they are read, at any length, for training and for measuring.

A prompt is a background of tokens, repeated without end, with a heading, sentences that tell pass keys, and
a question put into it. Each of these pieces is tokenised by itself, so that lengths are exact in tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle
from operator import itemgetter
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from infini_attention.data.shards import TokenStore
from infini_attention.data.texts import require_fast
from infini_attention.models.loss import IGNORED

TRIED = 16  # prompts whose room is looked at beforehand: keys differ in their number of tokens
BATCH, ITEM = 1, 2  # what is drawn for a batch and for an item of it, beside the prompt itself

BACKGROUND, HEADING, KEY, QUESTION, DIGITS, ECHO, ANSWER = range(7)
"""Kinds of tokens: `DIGITS` are those of a value where it is told, `ECHO` those of the same value later in
the same sentences, `ANSWER` those that are asked for. A token is of the greatest kind of its characters."""

TOLD = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
# fmt: off
NAMES = (
    "anchor", "apple", "bridge", "button", "candle", "castle", "copper", "dragon",
    "engine", "feather", "forest", "garden", "harbour", "island", "jacket", "kettle",
    "ladder", "mirror", "mountain", "needle", "orange", "pencil", "rabbit", "river",
    "saddle", "tunnel", "umbrella", "valley", "violin", "wagon", "window", "yellow",
)
# fmt: on
WORDS = ("pass", "key", "Remember", *NAMES)  # that tokenizers of small models do well to keep whole
COUNTED = ("day", "house", "page", "room", "street", "ticket", "train", "year")
NUMBERED = (  # how numbers are said that are no keys
    "{number}",
    "{number}.",
    "{number} is",
    "is {number}",
    "of {number}.",
    "No. {number}",
    "the number of the {name} is {number}.",
)
DISTRACTORS = 2048  # other numbers, after which the same ones come again


@dataclass(frozen=True)
class Variant:
    """What sets a kind of prompt apart.

    Attributes:
        joint: what the question and the sentences that tell a key begin with.
        ending: what the heading and the sentences that tell a key end with.
        numbers: whether the filler says other numbers.
        smallest: value of a key.
        largest: value of a key.
        shifts: whether the background begins at a random place.
    """

    joint: str = " "
    ending: str = ""
    numbers: bool = False
    smallest: int = 1000
    largest: int = 9999
    shifts: bool = False


VARIANTS = {
    "paper": Variant(),
    "landmark": Variant(joint="\n", ending="\n", smallest=1, largest=50_000),
    "varied": Variant(shifts=True),
    "numbers": Variant(numbers=True, shifts=True),
}
"""`paper`: appendix B of arXiv 2404.07143. `landmark`: the prompt of Mohtashami and Jaggi, arXiv 2305.16300,
in lines, its keys from 1 to 50,000. `varied`: the paper's sentences in real prose. `numbers`: the paper's,
but every sentence of the filler is followed by one that says a number like a key's."""


Marked = Sequence[tuple[str, int]]  # a text in parts, each with the kind of its characters


@dataclass(frozen=True)
class Piece:
    """Some tokens of a prompt and their kinds, (tokens,) int64 and int8."""

    ids: np.ndarray
    kinds: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class Prompt:
    """A prompt of `length` tokens and its answer, any part of which is made when it is asked for.

    Attributes:
        length: tokens up to and including the question.
        answer: what is to come next, (tokens,) int64.
        question_start: where the question begins.
        key_end: where the sentence ends that tells the answer, the last of them if it is told anew.
        pieces: what stands in the background, and where each begins; the question and the answer are last.
        background: ids that come again and again, from `offset` on.
    """

    length: int
    answer: np.ndarray
    question_start: int
    key_end: int
    pieces: Sequence[tuple[int, Piece]]
    background: np.ndarray
    offset: int

    @property
    def whole(self) -> int:
        """Tokens with the answer."""
        return self.length + len(self.answer)

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """The ids from `start` up to `stop`, or to the end of the answer; (tokens,) int64."""
        places = np.arange(start, min(stop, self.whole))
        starts = np.array([first for first, _ in self.pieces])
        inserted = np.cumsum([0, *(len(piece) for _, piece in self.pieces)])
        before = inserted[np.searchsorted(starts, places, side="right")]
        ids = self.background[(self.offset + places - before) % len(self.background)].astype(np.int64)
        for first, piece in self.pieces:
            _put(piece.ids, first, ids, start)
        return ids

    def kinds(self, start: int, stop: int) -> np.ndarray:
        """The kinds of the same tokens, (tokens,) int8: `BACKGROUND` to `ANSWER`."""
        kinds = np.full(min(stop, self.whole) - start, BACKGROUND, np.int8)
        for first, piece in self.pieces:
            _put(piece.kinds, first, kinds, start)
        return kinds


@dataclass(frozen=True)
class Draft:
    """A prompt whose length and depth are not decided yet; places are shares from 0 to 1.

    Attributes:
        heading: what comes first.
        told: the sentence that tells the answer.
        earlier: those that tell other values of the same key, each with its place before `told`.
        others: those that tell other keys, or numbers that are no keys, each with its place in the whole
            background.
        asked_before: questions after other keys, each with its answer, that come before the last one.
        question: what is asked.
        answer: what is to come next.
        source: where the background comes from.
        offset: how far into it the background begins, as a share.
    """

    heading: Piece
    told: Piece
    earlier: Sequence[tuple[float, Piece]]
    others: Sequence[tuple[float, Piece]]
    asked_before: Sequence[Piece]
    question: Piece
    answer: Piece
    source: np.ndarray | TokenStore
    offset: float

    @property
    def shortest(self) -> int:
        """Tokens without any background, up to and including the question."""
        sentences = [piece for _, piece in (*self.earlier, *self.others)]
        return sum(map(len, (self.heading, self.told, *sentences, *self.asked_before, self.question)))

    def prompt(self, *, length: int, depth: float) -> Prompt:
        """The prompt of exactly `length` tokens, question included, answer not.

        `depth` is the share of the background that stands before the sentence with the answer, to a whole
        token: at 0 it follows the heading, at 1 the question follows it. Raises ValueError for a length that
        has no room for the pieces, or a depth outside 0 to 1.
        """
        if not 0 <= depth <= 1:
            raise ValueError(f"depth is {depth}; give a share from 0 (first) to 1 (last)")
        room = length - self.shortest
        if room < 0:
            raise ValueError(
                f"a prompt of {length} tokens has no room: heading, keys and question alone take "
                f"{self.shortest}; give a longer length, or fewer keys and rewrites"
            )
        earlier = [(round(place * depth * room), piece) for place, piece in self.earlier]
        others = [(round(place * room), piece) for place, piece in self.others]
        sentences = [*earlier, *others, (round(depth * room), self.told)]
        pieces, inserted, key_end = [(0, self.heading)], len(self.heading), 0
        for cut, piece in sorted(sentences, key=itemgetter(0)):  # stable: the last is last among equals
            pieces.append((cut + inserted, piece))
            inserted += len(piece)
            if piece is self.told:
                key_end = cut + inserted
        question_start = length - len(self.question)
        start = question_start - sum(map(len, self.asked_before))
        for piece in self.asked_before:
            pieces.append((start, piece))
            start += len(piece)
        pieces += [(question_start, self.question), (length, self.answer)]
        background, offset = _background(self.source, self.offset, length)
        return Prompt(length, self.answer.ids, question_start, key_end, pieces, background, offset)


class PasskeyPrompts:
    """The prompts of one variant, each decided by `seed` and its index alone.

    Args:
        tokenizer: a fast one; no special tokens are added.
        variant: a name of `VARIANTS`.
        prose: tokens of real text, for the background of `varied`: ids (tokens,), read from a random place on
            and from the beginning again after the end, or a store, of which a part of one document is taken.
        seed: of all that is random.

    Raises:
        ValueError: an unknown variant, `varied` without prose or another one with it, or a slow tokenizer.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        variant: str = "paper",
        *,
        prose: np.ndarray | TokenStore | None = None,
        seed: int = 0,
    ) -> None:
        if variant not in VARIANTS:
            raise ValueError(f"variant is {variant!r}; choose one of {', '.join(VARIANTS)}")
        if (prose is None) == (variant == "varied"):
            raise ValueError(
                "variant is 'varied' and prose is missing; name a text"
                if prose is None
                else f"variant is {variant!r}, which has no prose; choose varied, or leave prose out"
            )
        require_fast(tokenizer)
        self.variant, self.seed = VARIANTS[variant], seed
        self._tokenizer: Any = tokenizer
        [self._heading] = self._pieces([[(TOLD + self.variant.ending, HEADING)]])
        self._source = self._filler() if prose is None else prose

    def draft(self, index: int, *, keys: int = 1, rewrites: int = 0, questions: int = 1) -> Draft:
        """The prompt number `index`, before its length and depth are decided.

        Args:
            index: which one.
            keys: how many keys are told; several have names.
            rewrites: how often the key that the last question is after is told before with another value.
            questions: how many of the keys are asked for; those before the last one are answered.

        Raises:
            ValueError: fewer than 1 key or more than there are names, negative rewrites, or not 1 to `keys`
                questions.
        """
        if not 1 <= keys <= len(NAMES) or rewrites < 0:
            raise ValueError(
                f"keys is {keys} and rewrites {rewrites}; give 1 to {len(NAMES)} keys and at least 0 rewrites"
            )
        if not 1 <= questions <= keys:
            raise ValueError(f"questions is {questions}; give 1 to {keys}, as many as there are keys")
        random = np.random.default_rng((self.seed, index))
        asked, *names = [f" of {name}" for name in random.permutation(NAMES)[:keys]] if keys > 1 else [""]
        answer, *values = map(int, self._values(random, rewrites + keys))
        told = [(asked, answer), *zip([asked] * rewrites + names, values, strict=True)]
        questioned = [*told[rewrites + 1 :][: questions - 1], told[0]]
        *before, (question, number) = [self._asked(name, value) for name, value in questioned]
        ending = [(f".{self.variant.ending}", QUESTION)]
        answered = [[*words, *digits, *ending] for words, digits in before]
        sentences = [self._told(name, value) for name, value in told]
        pieces = self._pieces([question, number, *sentences, *answered])
        question_piece, answer_piece = _moved(*pieces[:2])
        told_pieces, asked_before = pieces[2:][: len(told)], pieces[2:][len(told) :]
        placed = list(zip(map(float, random.random(len(values))), told_pieces[1:], strict=True))
        return Draft(
            heading=self._heading,
            told=told_pieces[0],
            earlier=placed[:rewrites],
            others=placed[rewrites:],
            asked_before=asked_before,
            question=question_piece,
            answer=answer_piece,
            source=self._source,
            offset=float(random.random()) if self.variant.shifts else 0.0,
        )

    def distracted(self, draft: Draft, tokens: int, random: np.random.Generator) -> Draft:
        """The draft with other numbers at random places of its background, `tokens` of them at most."""
        drawn = random.integers(len(self._distractors), size=tokens)
        lengths = np.cumsum([len(self._distractors[number]) for number in drawn])
        fitting = drawn[lengths <= tokens]
        placed = zip(random.random(len(fitting)), fitting, strict=True)
        numbers = [(float(place), self._distractors[number]) for place, number in placed]
        return replace(draft, others=[*draft.others, *numbers])

    @cached_property
    def _distractors(self) -> list[Piece]:
        """Numbers, and the words before or after them, that are no keys."""
        random = np.random.default_rng(self.seed)
        numbers = (10 ** random.uniform(0, 5, DISTRACTORS)).astype(int)
        named = random.choice((*COUNTED, *NAMES), DISTRACTORS)
        said = zip(random.choice(NUMBERED, DISTRACTORS), named, numbers, strict=True)
        texts = [f" {form.format(name=name, number=number)}" for form, name, number in said]
        return self._pieces([[(text, BACKGROUND)] for text in texts])

    def _values(self, random: np.random.Generator, count: int) -> np.ndarray:
        """Pass keys, no two alike."""
        smallest, largest = self.variant.smallest, self.variant.largest
        return smallest + random.choice(largest + 1 - smallest, count, replace=False)

    def _told(self, name: str, value: int) -> Marked:
        return [
            (f"{self.variant.joint}The pass key{name} is ", KEY),
            (str(value), DIGITS),
            (". Remember it. ", KEY),
            (str(value), ECHO),
            (f" is the pass key{name}.{self.variant.ending}", KEY),
        ]

    def _asked(self, name: str, value: int) -> tuple[Marked, Marked]:
        """Question and answer."""
        question = f"{self.variant.joint}What is the pass key{name}? The pass key{name} is"
        return [(question, QUESTION)], [(" ", QUESTION), (str(value), ANSWER)]

    def _filler(self) -> np.ndarray:
        """The ids that stand around the pieces, once."""
        text = "".join(f" {sentence}" for sentence in FILLER)
        if self.variant.numbers:
            random = np.random.default_rng(self.seed)
            numbers = random.integers(self.variant.smallest, self.variant.largest + 1, DISTRACTORS)
            text = "".join(
                f" {sentence} The number of the {counted} is {number}."
                for sentence, counted, number in zip(
                    cycle(FILLER), random.choice(COUNTED, DISTRACTORS), numbers
                )
            )
        return self._pieces([[(text, BACKGROUND)]])[0].ids

    def _pieces(self, texts: Sequence[Marked]) -> list[Piece]:
        """The tokens of each text, all in one call."""
        plain = ["".join(part for part, _ in text) for text in texts]
        encoded = self._tokenizer(plain, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        of_texts = zip(texts, encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [_piece(*of_text) for of_text in of_texts]


class PasskeyTask(Dataset[dict[str, Tensor]]):
    """Prompts with a pass key, to train on.

    Items are `input_ids` and `shift_labels`, each (length,) int64; shift_labels[t] is the token expected
    after input_ids[t] where that is to be learnt, else -100; and `repeatable`, (segments,) bool: those that
    hold background alone, which can repeat without a key's being told, or asked for, more than once.

    The items of a batch have a common length, some whole segments, drawn for the batch: torch's DataLoader
    asks for a batch at once, by `__getitems__`. The last question ends at a random place of the last segment,
    so that no place is learnt by heart; id 0 fills up what comes after its answer. All depends on the
    settings, `seed` and the batch's indices alone.

    Args:
        tokenizer: a fast one.
        examples: how many items there are.
        segment_length: of the model, in tokens.
        least_segments: of a batch.
        most_segments: of a batch; the number is drawn with a uniform logarithm, so that most are short.
        variants: names of `VARIANTS`, each with its weight in the draw.
        most_keys: keys in a prompt, drawn uniformly from 1 up, and fewer where a prompt has no room for them.
        lone_keys: share of the prompts that have one key alone, whatever is drawn. Else few of the answers to
            learn are those of a key without a name.
        most_rewrites: of the key that is asked for, drawn uniformly from 0 up; likewise.
        all_asked: every key in a prompt is asked for, not one alone.
        edges: share of the prompts that ask for one key, told with less than a segment of background between
            it and the heading, or the question. By chance alone a key is seldom told in the segment that asks
            for it, where memory cannot help, or two values of a key in one segment.
        echoes: a value is learnt where its sentences say it again, too: attention alone can copy it there,
            and what looks it up there looks it up in memory soon after.
        split_answers: share of the prompts, at most, whose answer is cut by the end of a segment, the hardest
            place: the rest of it sees nothing of the question. By chance alone they are few.
        distractors: share of a prompt's background, at most, that is other numbers, drawn uniformly; they
            repeat with it.
        prose: real text, for `varied`; see `PasskeyPrompts`.
        seed: of all that is random.

    Raises:
        ValueError: a number below 1, a share outside 0 to 1, weights that are not positive, segments that
            have no room for one key, and what PasskeyPrompts raises.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        examples: int,
        *,
        segment_length: int,
        least_segments: int = 2,
        most_segments: int = 16,
        variants: Mapping[str, float] = MappingProxyType({"paper": 1.0}),
        most_keys: int = 1,
        lone_keys: float = 0.0,
        most_rewrites: int = 0,
        all_asked: bool = False,
        edges: float = 0.0,
        echoes: bool = False,
        split_answers: float = 0.0,
        distractors: float = 0.0,
        prose: np.ndarray | TokenStore | None = None,
        seed: int = 0,
    ) -> None:
        if min(examples, segment_length, least_segments) < 1 or most_segments < least_segments:
            raise ValueError(
                f"examples, segment_length, least_segments, most_segments are {examples}, {segment_length}, "
                f"{least_segments}, {most_segments}; give at least 1 of each, and least no more than most"
            )
        if not variants or min(variants.values()) <= 0:
            raise ValueError(f"variants are {dict(variants)}; give at least one, with weights above 0")
        if prose is not None and "varied" not in variants:
            raise ValueError(f"variants are {dict(variants)}, without varied; add it, or leave prose out")
        shares = {"lone_keys": lone_keys, "edges": edges, "split_answers": split_answers}
        for name, share in (shares | {"distractors": distractors}).items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} is {share}; give a share from 0 to 1")
        self.examples, self.segment_length = examples, segment_length
        self.least_segments, self.most_segments = least_segments, most_segments
        self.most_keys, self.most_rewrites, self.seed = most_keys, most_rewrites, seed
        self.lone_keys, self.edges = lone_keys, edges
        self.all_asked, self._learnt = all_asked, (ECHO, ANSWER) if echoes else (ANSWER,)
        self.split_answers, self.distractors = split_answers, distractors
        self._chances = np.array([*variants.values()]) / sum(variants.values())
        self._prompts = [
            PasskeyPrompts(tokenizer, name, prose=prose if name == "varied" else None, seed=seed)
            for name in variants
        ]
        named = min(2, most_keys)
        self._first_drafts = {prompts: prompts.draft(0, keys=named) for prompts in self._prompts}
        self._check()

    def __len__(self) -> int:
        return self.examples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """The example number `index`, as a batch of its own."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """The examples of a batch, all of the same length."""
        numbers = [range(len(self))[index] for index in indices]
        random = np.random.default_rng((self.seed, numbers[0], BATCH))
        segments = np.exp(random.uniform(*np.log((self.least_segments, self.most_segments + 1))))
        length = self.segment_length * int(segments)
        return [self._item(number, length) for number in numbers]

    def _item(self, number: int, length: int) -> dict[str, Tensor]:
        prompt = self._prompt(number, length)
        ids, kinds = prompt.tokens(0, prompt.whole), prompt.kinds(0, prompt.whole)
        inputs, labels = np.zeros(length, np.int64), np.full(length, IGNORED)
        inputs[: len(ids) - 1] = ids[:-1]
        labels[: len(ids) - 1] = np.where(np.isin(kinds, self._learnt), ids, IGNORED)[1:]
        plain = np.zeros(length, bool)
        plain[: len(ids)] = (kinds == BACKGROUND)[:length]
        item = {
            "input_ids": inputs,
            "shift_labels": labels,
            "repeatable": plain.reshape(-1, self.segment_length).all(axis=1),
        }
        return {name: torch.from_numpy(column) for name, column in item.items()}

    def _prompt(self, number: int, length: int) -> Prompt:
        """What the example `number` holds, for a row of `length` tokens."""
        random = np.random.default_rng((self.seed, number, ITEM))
        prompts = self._prompts[random.choice(len(self._prompts), p=self._chances)]
        keys, rewrites = random.integers((1, 0), (self.most_keys + 1, self.most_rewrites + 1)).tolist()
        if _by_chance(random, self.lone_keys):
            keys = 1
        edge = _by_chance(random, self.edges)
        draft = self._fitting(prompts, number, keys, rewrites, length, all_asked=self.all_asked and not edge)
        room = _room(draft, length)
        unused = int(random.integers(min(self.segment_length, room + 1)))
        if _by_chance(random, self.split_answers):
            unused = self._split(random, draft, unused, room)
        whole = draft.shortest + room - unused
        if self.distractors:
            numbers = int(random.uniform(0, self.distractors) * (room - unused))
            draft = prompts.distracted(draft, numbers, random)
        return draft.prompt(length=whole, depth=self._depth(random, edge, room - unused))

    def _fitting(
        self,
        prompts: PasskeyPrompts,
        number: int,
        keys: int,
        rewrites: int,
        length: int,
        *,
        all_asked: bool,
    ) -> Draft:
        """A draft with so many keys and rewrites, or with as many as a row has room for."""

        def needed() -> int:  # about: as if all had the first draft's names
            one = self._first_drafts[prompts]
            question = len(one.question) + len(one.answer)
            questions = keys if all_asked else 1
            return len(one.heading) + (keys + rewrites) * len(one.told) + questions * question

        def drafted() -> Draft:
            questions = keys if all_asked else 1
            return prompts.draft(number, keys=keys, rewrites=rewrites, questions=questions)

        while keys + rewrites > 1 and needed() > length:
            keys, rewrites = max(1, keys - 1), max(0, rewrites - 1)
        draft = drafted()
        while keys + rewrites > 1 and _room(draft, length) < 0:  # longer names than usual
            keys, rewrites = max(1, keys - 1), max(0, rewrites - 1)
            draft = drafted()
        return draft

    def _depth(self, random: np.random.Generator, edge: bool, background: int) -> float:
        """A share of so many tokens of background, at an edge less than a segment from either end."""
        depth = float(random.random())
        if not edge:
            return depth
        near = depth * min(1.0, self.segment_length / max(1, background))
        return near if _by_chance(random, 0.5) else 1 - near

    def _split(self, random: np.random.Generator, draft: Draft, unused: int, room: int) -> int:
        """Places to leave at a row's end for its last segment to begin within the answer."""
        kept = int(random.integers(1, max(2, len(draft.answer))))  # the last token of an answer is not read
        split = self.segment_length - kept
        return split if 0 <= split <= room else unused

    def _check(self) -> None:
        """Raise ValueError where the shortest rows have no room for the plainest prompts."""
        length = self.least_segments * self.segment_length
        drafts = (prompts.draft(index) for prompts in self._prompts for index in range(TRIED))
        if (room := min(_room(draft, length) for draft in drafts)) < 0:
            raise ValueError(
                f"least_segments is {self.least_segments}, {length} tokens, and a prompt with one key takes "
                f"{length - room}; set more segments, or longer ones"
            )


def _by_chance(random: np.random.Generator, share: float) -> bool:
    """Draws nothing for a share of 0, so that what is drawn next stays as it was without it."""
    return share > 0 and random.random() < share


def _room(draft: Draft, length: int) -> int:
    """Background tokens of a row of `length` tokens that ends with the answer, but for its last token."""
    return length - draft.shortest - (len(draft.answer) - 1)


def _piece(text: Marked, ids: Sequence[int], offsets: Sequence[tuple[int, int]]) -> Piece:
    characters = np.repeat([kind for _, kind in text], [len(part) for part, _ in text])
    starts = [start for start, _ in offsets]
    return Piece(np.array(ids), np.maximum.reduceat(characters, starts).astype(np.int8))


def _moved(question: Piece, answer: Piece) -> tuple[Piece, Piece]:
    """Question and answer; a space that is a token by itself belongs to the question."""
    first = int(np.argmax(answer.kinds == ANSWER))
    asked = np.concatenate([question.ids, answer.ids[:first]])
    return _alike(asked, QUESTION), _alike(answer.ids[first:], ANSWER)


def _alike(ids: np.ndarray, kind: int) -> Piece:
    return Piece(ids, np.full(len(ids), kind, np.int8))


def _background(source: np.ndarray | TokenStore, share: float, length: int) -> tuple[np.ndarray, int]:
    """Ids to go through again and again, and where to begin: so far into the source, as a share of it."""
    if isinstance(source, np.ndarray):
        return source, int(share * len(source))
    ends = np.cumsum(source.lengths)
    token = int(share * ends[-1])
    document = int(np.searchsorted(ends, token, side="right"))
    size = int(source.lengths[document])
    start = max(0, min(token - int(ends[document]) + size, size - length))
    return source.document(document, start, start + length).numpy(), 0


def _put(values: np.ndarray, start: int, target: np.ndarray, target_start: int) -> None:
    """Copy `values`, which stand from place `start` on, into what of them `target` covers."""
    first = max(start, target_start)
    last = min(start + len(values), target_start + len(target))
    if first < last:
        target[first - target_start : last - target_start] = values[first - start : last - start]
