"""Documents of the tasks that lie in `tasks/`: made here, from the settings of a task and nothing else.

lm-eval calls each function with a task's metadata, over which go those of the command line and the model's
arguments; what means nothing to a function is left aside.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np
from datasets import Dataset

from infini_attention.data.documents import Documents, open_documents
from infini_attention.data.facts import FactPrompts, candidates
from infini_attention.data.haystack import first_sentences
from infini_attention.data.passkey import FILLER, NAMES, PasskeyPrompts
from infini_attention.data.ruler import Ruler
from infini_attention.data.texts import SHAKESPEARE, open_text
from infini_attention.evaluation.passkey import GOLDEN, even_depths
from infini_attention.models import load_tokenizer

WORD = re.compile(r"\S+")
CHOICES = 4
SHORTER = 512  # tokens by which prompts of a length differ, so that questions end all over a segment
SHOWN = 8  # examples before a question, at most
VARIETY = 4  # texts to hide facts in are so many times as long as a prompt, where there are such; in words

Splits = dict[str, Dataset]


def passkey(
    *,
    length: int,
    samples: int,
    depths: int = 11,
    variant: str = "paper",
    keys: int = 1,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **others: Any,
) -> Splits:
    """Prompts that hide a pass key, and their answers; `samples` of them at each of `depths` depths.

    A prompt has at most `length` tokens, and up to 512 fewer, of the tokenizer that `tokenizer`, or else
    `pretrained`, names. They are the prompts of `infini passkey`, as text.
    """
    counting = _counting(tokenizer, pretrained)
    prompts = PasskeyPrompts(counting, variant, seed=seed)
    rows = []
    for number in range(samples * depths):
        draft = prompts.draft(number, keys=keys)
        room = max(1, min(SHORTER, length - draft.shortest + 1))
        unused = int((number + 0.5) * GOLDEN % 1 * room)
        prompt = draft.prompt(length=length - unused, depth=even_depths(depths)[number % depths])
        ids = prompt.tokens(0, prompt.whole)
        rows.append(
            {
                "prompt": counting.decode(ids[: prompt.length]),
                "answer": counting.decode(ids[prompt.length :]),
            }
        )
    return {"test": Dataset.from_list(rows)}


def passkey_result(row: dict[str, Any], generated: list[str]) -> dict[str, float]:
    """Exact match: whether what was generated begins with the key."""
    return {"exact_match": float(generated[0].strip().startswith(row["answer"].strip()))}


def books(*, data_files: str | Sequence[str] | None = None, **others: Any) -> Splits:
    """Whole texts: files, or patterns of some; by default the plays that no model here was trained on."""
    return {"test": Dataset.from_list([{"text": text} for text in _texts(data_files)])}


def continuation(
    *,
    data_files: str | Sequence[str] | None = None,
    samples: int = 300,
    context_words: int = 150,
    passage_words: int = 40,
    seed: int = 0,
    **others: Any,
) -> Splits:
    """Contexts from texts, the passage that comes next, and three from elsewhere in the same text.

    All passages have as many words, and each begins where a word does. Texts of too few words are left out;
    ValueError where there is no other.
    """
    distance = context_words + passage_words
    texts = [(text, list(WORD.finditer(text))) for text in _texts(data_files)]
    texts = [(text, words) for text, words in texts if len(words) >= CHOICES * 2 * distance]
    if not texts:
        raise ValueError(
            f"no text has {CHOICES * 2 * distance:,} words, as a choice of passages needs; give longer ones"
        )
    rows = []
    for number in range(samples):
        random = np.random.default_rng((seed, number))
        text, words = texts[number % len(texts)]
        place = int(random.integers(context_words, len(words) - passage_words))
        elsewhere = [start for start in range(len(words) - passage_words) if abs(start - place) > distance]
        starts = [place, *random.choice(elsewhere, CHOICES - 1, replace=False).tolist()]
        passages = [_part(text, words, start, passage_words) for start in starts]
        context = _part(text, words, place - context_words, context_words)
        rows.append({"context": context, **_shuffled(passages, random)})
    return {"test": Dataset.from_list(rows)}


def bindings(
    *,
    pairs: int = 16,
    sentences: int = 20,
    texts: int = 25,
    questions: int = 4,
    seed: int = 0,
    **others: Any,
) -> Splits:
    """Names with a number each, told in a text; a question after one of them, with four told numbers.

    Args:
        pairs: of a name and a number, from 4 to 32.
        sentences: of filler before each pair, and before the question.
        texts: how many.
        questions: about each text, which is then one context, read once.
        seed: of all that is random.
    """
    if not max(CHOICES, questions) <= pairs <= len(NAMES):
        raise ValueError(
            f"pairs is {pairs} and questions {questions}; give {CHOICES} to {len(NAMES)} pairs, and no more "
            "questions than pairs"
        )
    rows = []
    for number in range(texts):
        random = np.random.default_rng((seed, number))
        names = random.permutation(NAMES)[:pairs]
        values = random.choice(np.arange(1000, 10_000), pairs, replace=False)
        filler = " ".join(FILLER[place % len(FILLER)] for place in range(sentences))
        told = [f"The pass key of {name} is {value}." for name, value in zip(names, values, strict=True)]
        text = " ".join(part for sentence in (*told, "") for part in (filler, sentence)).strip()
        for asked in random.permutation(pairs)[:questions]:
            others_told = random.choice(np.delete(values, asked), CHOICES - 1, replace=False)
            choices = [str(value) for value in (values[asked], *others_told)]
            rows.append({"text": text, "name": str(names[asked]), **_shuffled(choices, random)})
    return {"test": Dataset.from_list(rows)}


def babi(
    *,
    kind: str,
    length: int,
    samples: int,
    data_files: str | Sequence[str] | None = None,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **others: Any,
) -> Splits:
    """Facts hidden in texts, a question about them, and its answer; the split `examples` has facts alone.

    A prompt has at most `length` tokens of the tokenizer that `tokenizer`, or else `pretrained`, names; at 0
    it has no text but the facts. Texts are files, or patterns of some; by default all plays.
    """
    counting = _counting(tokenizer, pretrained)
    background = first_sentences(_pieces(data_files), words=VARIETY * length)
    prompts = FactPrompts(counting, kind, background=background, seed=seed)
    shown = FactPrompts(counting, kind, seed=seed + 1)

    def row(prompts: FactPrompts, number: int, length: int) -> dict[str, str]:
        pieces, told = prompts.prompt(number, length=length)
        prompt = "".join(pieces)
        return {"prompt": prompt, "kind": kind, "question": told.question, "answer": told.answer}

    return {
        "test": _when_asked_for(lambda number: row(prompts, number, length), samples),
        "examples": Dataset.from_list([row(shown, number, 0) for number in range(SHOWN)]),
    }


def babi_result(row: dict[str, Any], generated: list[str]) -> dict[str, float]:
    """BABILong's score: whether the first sentence names the answer and no other word that could be one.

    Case does not count, nor do words that the question names. The rule is that of `compare_answers` in
    babilong/metrics.py of github.com/booydar/babilong.
    """
    said, question = generated[0].lower().partition(".")[0], row["question"].lower()
    possible = {word.lower() for word in candidates(row["kind"])}
    named = {word for word in possible if word in said and word not in question}
    return {"acc": float(named == {row["answer"].lower()})}


def ruler(
    *,
    kind: str,
    length: int,
    samples: int,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **others: Any,
) -> Splits:
    """Prompts of RULER's task `kind` and the answers.

    A prompt and the room for its answer have at most `length` tokens of the tokenizer that `tokenizer`, or
    else `pretrained`, names.
    """
    made = Ruler(_counting(tokenizer, pretrained), kind, length=length, seed=seed)
    return {"test": _when_asked_for(lambda number: {**vars(made.sample(number)), "kind": kind}, samples)}


def ruler_result(row: dict[str, Any], generated: list[str]) -> dict[str, float]:
    """RULER's score: the share of the answers that are part of what was generated, in whatever case.

    Of a question with documents, whose answers mean the same, one is enough.
    """
    found = [answer.lower() in generated[0].lower() for answer in row["answers"]]
    return {"string_match": float(any(found)) if row["kind"].startswith("qa") else sum(found) / len(found)}


def _counting(tokenizer: str | None, pretrained: str | None) -> Any:
    """The tokenizer that lengths are counted by."""
    named = pretrained if tokenizer is None else tokenizer
    if named is None:
        raise ValueError("lengths are counted in tokens, and no tokenizer is given; name one in the metadata")
    return load_tokenizer(named)


def _when_asked_for(make: Callable[[int], dict[str, Any]], samples: int) -> Dataset:
    """Rows that are made when they are read, and then kept: a limit saves making the others."""
    made = cache(make)

    def rows(numbers: dict[str, list[int]]) -> dict[str, list[Any]]:
        found = [made(number) for number in numbers["number"]]
        return {name: [row[name] for row in found] for name in found[0]}

    return Dataset.from_dict({"number": range(samples)}).with_transform(rows)


def _pieces(data_files: str | Sequence[str] | None) -> Iterator[str]:
    """All texts one after the other, as they are read; by default all plays."""
    if data_files is None:
        yield from open_text(SHAKESPEARE).pieces()
        return
    for source in _named(data_files):
        for document in open_documents(source):
            yield from (*document.pieces, "\n")


def _texts(data_files: str | Sequence[str] | None) -> list[str]:
    plays = [Documents(SHAKESPEARE, split="validation")]
    sources = plays if data_files is None else _named(data_files)
    texts = ["".join(document.pieces) for source in sources for document in open_documents(source)]
    return [text for text in texts if text.strip()]


def _named(data_files: str | Sequence[str]) -> list[Documents]:
    return [Documents(each) for each in ([data_files] if isinstance(data_files, str) else data_files)]


def _part(text: str, words: list[re.Match[str]], start: int, count: int) -> str:
    return text[words[start].start() : words[start + count - 1].end()]


def _shuffled(choices: list[str], random: np.random.Generator) -> dict[str, Any]:
    """The choices in random order, and where the first of them is then."""
    order = random.permutation(len(choices)).tolist()
    return {"choices": [choices[place] for place in order], "answer": order.index(0)}
