"""Facts about people, places and things, told in order, and a question that needs one, two or three of them.

The five kinds of question are those of bAbI's first tasks (arXiv 1502.05698) that BABILong hides in books
(arXiv 2406.10149). Worlds, words and sentences are made here; nothing is taken from either.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

import numpy as np
from transformers import PreTrainedTokenizerBase

from infini_attention.data.haystack import hidden, most_units, rotated

PEOPLE = ("Aisha", "Bruno", "Carmen", "Dmitri", "Elsa", "Farid", "Greta", "Hugo")
PLACES = ("attic", "bakery", "cellar", "garden", "kitchen", "library", "market", "stable")
THINGS = ("basket", "candle", "hammer", "lantern", "pillow", "violin")
DIRECTIONS = {"north": "south", "south": "north", "east": "west", "west": "east"}

MOVED = ("{who} went to the {where}.", "{who} walked to the {where}.", "{who} hurried to the {where}.")
TAKEN = ("{who} picked up the {what}.", "{who} took the {what}.")
DROPPED = ("{who} put down the {what}.", "{who} left the {what} there.")
GIVEN = ("{who} gave the {what} to {whom}.", "{who} handed the {what} to {whom}.")
RELATED = "The {one} is {direction} of the {other}."
ASKED = "\nQuestion: {question}\nAnswer:"

Asked = list[tuple[str, str]]  # questions that can be asked, each with its answer
Option = TypeVar("Option")


@dataclass(frozen=True)
class Example:
    """Facts in the order in which they happened, a question about them, and its answer, one word."""

    facts: tuple[str, ...]
    question: str
    answer: str


def example(kind: str, *, seed: int = 0, index: int = 0) -> Example:
    """Facts with a question of one of `KINDS`, decided by kind, seed and index alone.

    - `qa1`, one supporting fact: where a person is.
    - `qa2`, two: where a thing is that a person carried.
    - `qa3`, three: where a thing was before it came to a place.
    - `qa4`, relations of two: what lies north of a place, or which place it lies north of.
    - `qa5`, relations of three: who gave what to whom.

    Raises ValueError for another kind.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    random = np.random.default_rng((seed, index, [*KINDS].index(kind)))
    return KINDS[kind].make(random)


def candidates(kind: str) -> tuple[str, ...]:
    """The words that answers to questions of this kind are taken from; none is part of another."""
    return KINDS[kind].candidates


class FactPrompts:
    """Prompts that hide the facts of examples in a text, each decided by the seed and its index alone.

    Args:
        tokenizer: that lengths are counted by; no special tokens are added.
        kind: of question, one of `KINDS`.
        background: the text's sentences. Each prompt begins to read them at a place of its own, and goes on
            from the first after the last.
        seed: of all that is random.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        kind: str,
        *,
        background: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        self.tokenizer, self.kind, self.background, self.seed = tokenizer, kind, background, seed

    def prompt(self, index: int, *, length: int) -> tuple[Iterator[str], Example]:
        """The pieces of a prompt, made as they are read, and the example whose facts it hides.

        The facts stand in their order between sentences of the background, the question at the end; what is
        to come next is the answer, after a space. A prompt has at most `length` tokens; at 0 it has the facts
        and the question alone, whatever they take. Raises ValueError where a greater length has no room for
        them, or where there is no background to fill it with.
        """
        told = example(self.kind, seed=self.seed, index=index)
        random = np.random.default_rng((self.seed, index))
        start, shares = random.random(), sorted(random.random(len(told.facts)))
        needles = [*zip(shares, told.facts, strict=True)]

        def pieces(units: int) -> Iterator[str]:
            yield from hidden(needles, rotated(self.background, start, units), units)
            yield ASKED.format(question=told.question)

        return pieces(most_units(pieces, length, self.tokenizer) if length else 0), told


@dataclass(frozen=True)
class Kind:
    """A kind of question: what makes an example, and the words that can be its answer."""

    make: Callable[[np.random.Generator], Example]
    candidates: tuple[str, ...]


class _World:
    """What happens to people and things, and what has been told of it.

    `visited` has the places of each thing in order, from where it was first picked up to where it is.
    """

    def __init__(self, random: np.random.Generator) -> None:
        self.random = random
        self.people, self.places, self.things = (
            [options[number] for number in random.permutation(len(options))[:count]]
            for options, count in ((PEOPLE, 4), (PLACES, 6), (THINGS, 3))
        )
        self.place_of: dict[str, str] = {}
        self.holder_of: dict[str, str] = {}
        self.visited: dict[str, list[str]] = {what: [] for what in self.things}
        self.given: list[tuple[str, str, str]] = []
        self.facts: list[str] = []

    def move(self) -> None:
        who = _one(self.random, self.people)
        self.go(who, _one(self.random, [where for where in self.places if where != self.place_of.get(who)]))

    def go(self, who: str, where: str) -> None:
        self.place_of[who] = where
        for what in self.held_by(who):
            self.visited[what].append(where)
        self.tell(MOVED, who=who, where=where)

    def take(self) -> None:
        within_reach = [
            (who, what)
            for who, where in self.place_of.items()
            for what, visited in self.visited.items()
            if what not in self.holder_of and visited[-1:] in ([], [where])
        ]
        if within_reach:
            who, what = _one(self.random, within_reach)
            self.holder_of[what] = who
            self.visited[what] = self.visited[what] or [self.place_of[who]]
            self.tell(TAKEN, who=who, what=what)

    def drop(self) -> None:
        if self.holder_of:
            what = _one(self.random, [*self.holder_of])
            self.tell(DROPPED, who=self.holder_of.pop(what), what=what)

    def give(self) -> None:
        """One gives to another, who has to come first."""
        if self.holder_of:
            what, who = _one(self.random, [*self.holder_of.items()])
            whom = _one(self.random, [other for other in self.people if other != who])
            if self.place_of.get(whom) != self.place_of[who]:
                self.go(whom, self.place_of[who])
            self.holder_of[what] = whom
            self.given.append((who, what, whom))
            self.tell(GIVEN, who=who, what=what, whom=whom)

    def held_by(self, who: str) -> list[str]:
        return [what for what, holder in self.holder_of.items() if holder == who]

    def tell(self, forms: Sequence[str], **parts: str) -> None:
        self.facts.append(_one(self.random, forms).format(**parts))


Action = Callable[[_World], None]


def _story(
    ask: Callable[[_World], Asked], actions: Sequence[Action], least: int, most: int
) -> Callable[[np.random.Generator], Example]:
    """What makes examples in which actions happen, `least` to `most` of them, and on until one can ask."""

    def make(random: np.random.Generator) -> Example:
        world = _World(random)
        count = int(random.integers(least, most + 1))
        while len(world.facts) < count or not ask(world):
            _one(random, actions)(world)
        question, answer = _one(random, ask(world))
        return Example(tuple(world.facts), question, answer)

    return make


def _people_now(world: _World) -> Asked:
    return [(f"Where is {who} now?", where) for who, where in world.place_of.items()]


def _things_now(world: _World) -> Asked:
    return [(f"Where is the {what} now?", places[-1]) for what, places in world.visited.items() if places]


def _things_before(world: _World) -> Asked:
    """Only of places where the thing has been once."""
    return [
        (f"Where was the {what} before it came to the {where}?", before)
        for what, places in world.visited.items()
        for before, where in pairwise(places)
        if places.count(where) == 1
    ]


def _gifts(world: _World) -> Asked:
    """Who, what or whom; only where what was told has one answer."""
    forms = ("Who gave the {1} to {2}?", "What did {0} give to {2}?", "To whom did {0} give the {1}?")
    return [
        (form.format(*gift), gift[asked])
        for asked, form in enumerate(forms)
        for gift in world.given
        if len({other[asked] for other in world.given if form.format(*other) == form.format(*gift)}) == 1
    ]


def _map(random: np.random.Generator) -> Example:
    """Three places, and what lies on either side of the one in the middle."""
    middle, *sides = (PLACES[number] for number in random.permutation(len(PLACES))[:3])
    directions = random.permutation([*DIRECTIONS])[:2].tolist()
    facts, asked = [], []
    for side, direction in zip(sides, directions, strict=True):  # the side lies there, seen from the middle
        if random.random() < 0.5:
            facts.append(RELATED.format(one=side, direction=direction, other=middle))
            asked.append((f"What is {direction} of the {middle}?", side))
        else:
            opposite = DIRECTIONS[direction]
            facts.append(RELATED.format(one=middle, direction=opposite, other=side))
            asked.append((f"What is the {middle} {opposite} of?", side))
    question, answer = _one(random, asked)
    return Example(tuple(facts), question, answer)


def _one(random: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[int(random.integers(len(options)))]


_CARRYING = (_World.move, _World.move, _World.take, _World.drop)
_GIVING = (_World.move, _World.take, _World.give, _World.give)

KINDS = {
    "qa1": Kind(_story(_people_now, (_World.move,), 2, 10), PLACES),
    "qa2": Kind(_story(_things_now, _CARRYING, 6, 20), PLACES),
    "qa3": Kind(_story(_things_before, _CARRYING, 10, 30), PLACES),
    "qa4": Kind(_map, PLACES),
    "qa5": Kind(_story(_gifts, _GIVING, 6, 20), PEOPLE + THINGS),
}
