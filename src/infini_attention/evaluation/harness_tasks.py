"""Documents of the tasks that lie in `tasks/`: made here, from the settings of a task and nothing else.

lm-eval calls each function with a task's metadata, over which go those of the command line and the model's
arguments; what means nothing to a function is left aside.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from datasets import Dataset

from infini_attention.data.documents import Documents, open_documents
from infini_attention.data.passkey import FILLER, NAMES, PasskeyPrompts
from infini_attention.data.texts import SHAKESPEARE
from infini_attention.evaluation.passkey import GOLDEN, even_depths
from infini_attention.models import load_tokenizer

WORD = re.compile(r"\S+")
CHOICES = 4
SHORTER = 512  # tokens by which prompts of a length differ, so that questions end all over a segment

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
    named = pretrained if tokenizer is None else tokenizer
    if named is None:
        raise ValueError("lengths are counted in tokens, and no tokenizer is given; name one in the metadata")
    counting = load_tokenizer(named)
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


def _texts(data_files: str | Sequence[str] | None) -> list[str]:
    if data_files is None:
        sources = [Documents(SHAKESPEARE, split="validation")]
    else:
        sources = [Documents(each) for each in ([data_files] if isinstance(data_files, str) else data_files)]
    texts = ["".join(document.pieces) for source in sources for document in open_documents(source)]
    return [text for text in texts if text.strip()]


def _part(text: str, words: list[re.Match[str]], start: int, count: int) -> str:
    return text[words[start].start() : words[start + count - 1].end()]


def _shuffled(choices: list[str], random: np.random.Generator) -> dict[str, Any]:
    """The choices in random order, and where the first of them is then."""
    order = random.permutation(len(choices)).tolist()
    return {"choices": [choices[place] for place in order], "answer": order.index(0)}
