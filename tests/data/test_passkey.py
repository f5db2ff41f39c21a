import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from infini_attention.data.documents import Documents
from infini_attention.data.passkey import (
    ANSWER,
    BACKGROUND,
    DIGITS,
    ECHO,
    FILLER,
    HEADING,
    KEY,
    QUESTION,
    TOLD,
    VARIANTS,
    PasskeyPrompts,
    PasskeyTask,
    Prompt,
)
from infini_attention.data.shards import tokenized
from infini_attention.data.tokenizers import byte_tokenizer

BYTES = byte_tokenizer()
PROSE = np.frombuffer(b"It was the best of times, it was the worst of times; " * 40, np.uint8)
TELLING = re.compile(r"The pass key( of \w+|) is (\d+)\. Remember it\. \2 is the pass key\1\.")
ASKING = re.compile(r"What is the pass key( of \w+|)\? The pass key\1 is (\d+)$")


def prompts(variant: str = "paper", **settings: Any) -> PasskeyPrompts:
    return PasskeyPrompts(BYTES, variant, prose=PROSE if variant == "varied" else None, **settings)


def text(prompt: Prompt) -> str:
    return str(BYTES.decode(prompt.tokens(0, prompt.whole)))


@pytest.fixture(scope="module")
def merging() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are one or two bytes, such as " 9" and "05"."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [(first, second) for first in ["Ġ", *"0123456789"] for second in "0123456789"]
    vocabulary = {token: number for number, token in enumerate([*alphabet, *map("".join, pairs)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_paper_s_prompt_is_word_for_word() -> None:
    draft = prompts().draft(0)
    filler = "".join(f" {sentence}" for sentence in FILLER)
    key = str(BYTES.decode(draft.answer.ids))
    assert 1000 <= int(key) <= 9999
    prompt = draft.prompt(length=draft.shortest + 5 * len(filler), depth=0.4)
    assert text(prompt) == (
        f"{TOLD}{filler * 2} The pass key is {key}. Remember it. {key} is the pass key.{filler * 3} "
        f"What is the pass key? The pass key is {key}"
    )


def test_the_landmark_prompt_stands_in_lines_and_has_keys_of_every_length() -> None:
    written = prompts("landmark")
    lines = text(written.draft(0).prompt(length=600, depth=0.5)).split("\n")
    assert lines[0] == TOLD and len(lines) == 5
    assert TELLING.fullmatch(lines[2]) and lines[4].startswith("What is the pass key? The pass key is ")
    keys = [int(BYTES.decode(written.draft(index).answer.ids)) for index in range(300)]
    assert 1 <= min(keys) < 3000 and 47_000 < max(keys) <= 50_000


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
def test_the_length_is_exact_and_so_is_the_place(variant: str, depth: float) -> None:
    prompt = prompts(variant).draft(7).prompt(length=999, depth=depth)
    kinds = prompt.kinds(0, prompt.whole)
    assert prompt.length == 999 == prompt.whole - len(prompt.answer)
    assert (kinds[:999] != ANSWER).all() and (kinds[999:] == ANSWER).all()
    assert prompt.question_start == (kinds == QUESTION).argmax()
    told = np.isin(kinds, (KEY, DIGITS, ECHO))
    before = (kinds[: told.argmax()] == BACKGROUND).sum()
    assert before == round(depth * (kinds == BACKGROUND).sum())
    assert prompt.key_end == np.flatnonzero(told)[-1] + 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_any_part_is_the_same_part_of_the_whole(variant: str) -> None:
    prompt = prompts(variant).draft(3, keys=3, rewrites=2).prompt(length=1500, depth=0.6)
    whole, kinds = prompt.tokens(0, prompt.whole), prompt.kinds(0, prompt.whole)
    assert whole.dtype == np.int64
    cuts = np.unique(np.random.default_rng(0).integers(0, prompt.whole, 60))
    for start, stop in zip([0, *cuts], [*cuts, prompt.whole + 9], strict=True):
        np.testing.assert_array_equal(prompt.tokens(start, stop), whole[start:stop])
        np.testing.assert_array_equal(prompt.kinds(start, stop), kinds[start:stop])


def test_the_middle_of_a_prompt_of_any_length_costs_only_itself() -> None:
    prompt = prompts().draft(0).prompt(length=10**12, depth=0.5)
    middle = prompt.key_end - 3
    assert str(BYTES.decode(prompt.tokens(middle - 9, middle + 4))).startswith("he pass key.")
    assert (prompt.tokens(10**12, 10**12 + 9) == prompt.answer).all()


def test_of_several_keys_the_last_value_of_the_one_that_is_asked_for_is_the_answer() -> None:
    written = prompts("numbers")
    for index in range(40):
        prompt = written.draft(index, keys=4, rewrites=2).prompt(length=2000, depth=index / 39)
        asking = ASKING.search(text(prompt))
        assert asking is not None
        name, answer = asking.groups()
        told = TELLING.findall(text(prompt))
        assert len(told) == 6 and len({value for _, value in told}) == 6 and len(dict(told)) == 4
        assert [told_name for told_name, _ in told].count(name) == 3
        assert dict(told)[name] == answer  # of several, the last


def test_every_key_may_be_asked_for_wherever_it_stands() -> None:
    places = []
    for index in range(200):
        told = TELLING.findall(text(prompt := prompts().draft(index, keys=4).prompt(length=2000, depth=0.5)))
        name = ASKING.search(text(prompt))
        assert name is not None
        places.append([told_name for told_name, _ in told].index(name[1]))
    assert min(np.bincount(places, minlength=4)) > 10


def test_numbers_are_told_all_around_and_none_of_them_is_a_pass_key() -> None:
    prompt = prompts("numbers").draft(0).prompt(length=3000, depth=0.5)
    said = re.findall(r"The number of the \w+ is (\d{4})\.", text(prompt))
    assert len(set(said)) > 40
    assert not (prompt.kinds(0, 3000)[: prompt.key_end - 60] == DIGITS).any()


def test_prose_begins_anywhere_and_begins_again() -> None:
    texts = [text(prompts("varied").draft(index).prompt(length=3000, depth=0.5)) for index in range(8)]
    assert len({each[len(TOLD) : len(TOLD) + 30] for each in texts}) > 4
    assert all(each.count("the best of times") > 40 for each in texts)


def test_a_store_gives_a_part_of_one_document(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="needs datasets: pip install 'infini-attention[train]'")
    for letter in "ab":
        (tmp_path / f"{letter}.txt").write_text(letter * 500)
    store = tokenized(Documents(f"{tmp_path}/*.txt"), BYTES, tmp_path / "tokens")
    written, seen = PasskeyPrompts(BYTES, "varied", prose=store), set()
    for index in range(20):
        prompt = written.draft(index).prompt(length=400, depth=0.5)
        background = prompt.tokens(0, 400)[prompt.kinds(0, 400) == BACKGROUND]
        seen |= {str(BYTES.decode(background))[:1]}
        assert len(set(background)) == 1
    assert seen == {"a", "b"}


def test_a_tokenizer_may_join_a_space_and_digits(merging: PreTrainedTokenizerFast) -> None:
    draft = PasskeyPrompts(merging).draft(0)
    prompt = draft.prompt(length=400, depth=0.5)
    assert prompt.length == 400 and len(prompt.answer) < 4
    assert re.fullmatch(r" ?\d{4}", str(merging.decode(prompt.answer)))
    kinds = prompt.kinds(0, 400)
    digits = merging.convert_ids_to_tokens(prompt.tokens(0, 400)[np.isin(kinds, (DIGITS, ECHO))])
    assert len(digits) == 2 * len(prompt.answer) and all(re.search(r"\d", token) for token in digits)
    assert (kinds[: len(draft.heading)] == HEADING).all()


def test_a_prompt_depends_on_seed_and_index_alone() -> None:
    def drawn(index: int, seed: int) -> str:
        return text(prompts("numbers", seed=seed).draft(index, keys=2).prompt(length=900, depth=0.5))

    assert drawn(5, 1) == drawn(5, 1)
    assert len({drawn(5, 1), drawn(6, 1), drawn(5, 2)}) == 3


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: prompts("papyrus"), "variant is 'papyrus'; choose one of paper, landmark, varied, numbers"),
        (lambda: PasskeyPrompts(BYTES, "varied"), "prose is missing"),
        (lambda: PasskeyPrompts(BYTES, "paper", prose=PROSE), "'paper', which has no prose"),
        (lambda: prompts().draft(0, keys=0), "keys is 0 and rewrites 0; give 1 to 32 keys"),
        (lambda: prompts().draft(0, keys=33), "keys is 33"),
        (lambda: prompts().draft(0).prompt(length=100, depth=0.5), "a prompt of 100 tokens has no room"),
        (lambda: prompts().draft(0).prompt(length=1000, depth=1.5), "depth is 1.5; give a share"),
        (lambda: task(variants={}), "give at least one, with weights above 0"),
        (lambda: task(variants={"paper": -1.0}), "weights above 0"),
        (lambda: task(prose=PROSE), "without varied"),
        (lambda: task(split_answers=1.5), "split_answers is 1.5; give a share from 0 to 1"),
        (lambda: task(edges=2), "edges is 2; give a share from 0 to 1"),
        (lambda: task(lone_keys=-1), "lone_keys is -1; give a share from 0 to 1"),
        (lambda: task(distractors=-0.1), "distractors is -0.1; give a share from 0 to 1"),
        (lambda: task(least_segments=9, most_segments=8), "least no more than most"),
        (
            lambda: task(least_segments=1),
            "least_segments is 1, 128 tokens, and a prompt with one key takes 247",
        ),
    ],
)
def test_mistakes_are_named_with_a_remedy(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def task(**settings: Any) -> PasskeyTask:
    return PasskeyTask(BYTES, 64, **({"segment_length": 128} | settings))


MIXED = task(
    variants={"paper": 2, "varied": 1, "landmark": 1},
    prose=PROSE,
    most_keys=3,
    most_rewrites=1,
    most_segments=6,
)


def test_the_labels_are_the_answer_where_it_is_predicted() -> None:
    for item in MIXED:
        inputs, labels = item["input_ids"], item["shift_labels"]
        places = torch.nonzero(labels != -100).flatten()
        assert places.diff().eq(1).all()
        assert inputs[places[1:]].equal(labels[places[:-1]])  # all of the answer is there but its last token
        assert (inputs[places[-1] + 1 :] == 0).all()
        whole = str(BYTES.decode([*inputs[: places[-1] + 1], labels[places[-1]]]))
        told = dict(TELLING.findall(whole))
        asking = ASKING.search(whole)
        assert asking is not None and told[asking[1]] == asking[2]


def test_a_batch_has_one_length_and_batches_have_several() -> None:
    lengths = set()
    for batch in DataLoader(MIXED, batch_size=8):
        assert batch["input_ids"].shape == batch["shift_labels"].shape
        lengths.add(batch["input_ids"].shape[1])
    assert len(lengths) > 2
    assert all(length % 128 == 0 and 256 <= length <= 768 for length in lengths)


def test_a_batch_depends_on_its_indices_alone() -> None:
    batch, again = MIXED.__getitems__([9, 4, 33]), MIXED.__getitems__([9, 4, 33])
    for item, same in zip(batch, again, strict=True):
        assert item["input_ids"].equal(same["input_ids"])
    alone = MIXED[9]
    assert alone["input_ids"].equal(batch[0]["input_ids"])


def test_the_question_ends_anywhere_in_the_last_segment() -> None:
    places = torch.tensor(
        [int((item["shift_labels"] != -100).nonzero()[0]) % 128 for item in task(least_segments=4)]
    )
    assert len(places.unique()) > 30
    assert places.min() < 20 and places.max() > 108


def test_keys_are_fewer_where_there_is_no_room_for_more() -> None:
    short = task(least_segments=2, most_segments=2, most_keys=4, most_rewrites=3)
    for item in short:
        assert len(TELLING.findall(str(BYTES.decode(item["input_ids"])))) == 1
    longer = task(least_segments=6, most_segments=6, most_keys=4)
    assert {len(TELLING.findall(str(BYTES.decode(item["input_ids"])))) for item in longer} == {1, 2, 3, 4}


def test_all_keys_are_asked_for_once_with_what_they_were_told_last() -> None:
    asked_all = task(most_keys=3, most_rewrites=1, least_segments=8, most_segments=8, all_asked=True)
    several = 0
    for item in asked_all:
        places = torch.nonzero(item["shift_labels"] != -100).flatten()
        whole = str(BYTES.decode([*item["input_ids"][: places[-1] + 1], item["shift_labels"][places[-1]]]))
        told = dict(TELLING.findall(whole))
        asked = re.findall(ASKING.pattern.removesuffix("$") + r"(?=\.|$)", whole)
        assert {name: told[name] for name, _ in asked} == dict(asked) == told
        assert len(asked) == len(told) == len(places) / 4
        several += len(asked) > 1
    assert several > 20


def test_segments_that_tell_or_ask_something_do_not_repeat() -> None:
    repeatable = 0
    for item in task(least_segments=4, most_keys=2):
        segments = item["input_ids"].reshape(-1, 128)
        assert item["repeatable"].shape == (len(segments),)
        for segment, plain in zip(segments, item["repeatable"], strict=True):
            words = str(BYTES.decode(segment[segment != 0]))
            told = any(part in words for part in ("pass key", "Remember it", "irrelevant", "memorize"))
            assert not (plain and told)
            repeatable += int(plain)
        assert not item["repeatable"][[0, -1]].any()
    assert repeatable > 30


def test_answers_are_split_by_the_end_of_a_segment() -> None:
    places = set()
    for item in task(least_segments=4, split_answers=1.0):
        asked = (item["shift_labels"] != -100).nonzero().flatten()
        places.add((int(asked[0]) % 128, int(asked[-1]) % 128))
    assert places == {(127, 2), (126, 1), (125, 0)}


def test_some_prompts_have_a_lone_key() -> None:
    def lone(**settings: Any) -> int:
        items = task(least_segments=8, most_keys=8, **settings)
        return sum("pass key of" not in str(BYTES.decode(item["input_ids"])) for item in items)

    assert lone(lone_keys=1.0) == len(task()) > lone(lone_keys=0.5) > lone()


def test_at_an_edge_one_key_is_asked_for_less_than_a_segment_from_the_heading_or_the_question() -> None:
    ends = set()
    for item in task(least_segments=16, most_segments=16, most_keys=3, all_asked=True, edges=1.0):
        words = str(BYTES.decode(item["input_ids"][item["input_ids"] != 0]))
        first_question = words.index(" What is the pass key")
        assert words.count("What is the pass key") == 1
        asked = re.match(r" What is the pass key( of \w+|)\?", words[first_question:])
        assert asked is not None
        sentences = [told for told in TELLING.finditer(words) if told[1] == asked[1]]
        between = "".join(TELLING.split(words[sentences[0].end() : first_question])[::3])
        before = "".join(TELLING.split(words[len(TOLD) : sentences[0].start()])[::3])
        assert min(len(between), len(before)) <= 128 + len(sentences)
        ends.add(len(between) < len(before))
    assert ends == {True, False}


def test_distractors_are_other_numbers_in_the_background_and_up_to_their_share() -> None:
    shares = []
    for item in task(least_segments=16, distractors=0.3):
        words = str(BYTES.decode(item["input_ids"][item["input_ids"] != 0]))
        told, background = TELLING.findall(words), re.sub(r"The pass key is .* is the pass key\.", "", words)
        background = background[: background.index("What is the pass key")]
        assert len(told) == 1 and not re.search("pass key", background)
        shares.append(sum(map(len, re.findall(r"\d+", background))) / len(background))
    assert min(shares) < 0.02 and 0.06 < max(shares) < 0.25


def test_distractors_leave_a_prompt_s_length_and_answer() -> None:
    for plain, item in zip(task(), task(distractors=1.0), strict=True):
        (places,), (others,) = (
            torch.nonzero(each["shift_labels"] != -100, as_tuple=True) for each in (plain, item)
        )
        assert plain["input_ids"].shape == item["input_ids"].shape and places.equal(others)
        assert plain["shift_labels"].equal(item["shift_labels"])


def test_echoes_are_learnt_where_a_value_is_said_again() -> None:
    for item in task(echoes=True, least_segments=4):
        labels = item["shift_labels"]
        learnt = str(BYTES.decode(labels[labels != -100]))
        assert len(learnt) == 8 and learnt[:4] == learnt[4:] and learnt.isdigit()
        first = int((labels != -100).nonzero()[0])
        assert str(BYTES.decode(item["input_ids"][: first + 1])).endswith(f"{learnt[:4]}. Remember it. ")
