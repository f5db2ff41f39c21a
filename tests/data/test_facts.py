"""Facts, questions and answers: another reading of the sentences comes to the same answers."""

import re
from collections import Counter

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from infini_attention.data.facts import KINDS, FactPrompts, candidates, example

STEPS = {"north": (0, 1), "south": (0, -1), "east": (1, 0), "west": (-1, 0)}


def solved(facts: list[str] | tuple[str, ...], question: str) -> set[str]:
    """All answers to a question that the facts allow, read sentence by sentence."""
    if " of the " in " ".join(facts):
        return _on_the_map([*facts], question)
    place: dict[str, str] = {}
    held: dict[str, str] = {}
    history: dict[str, list[str]] = {}
    gifts: list[tuple[str, str, str]] = []
    for fact in facts:
        who, rest = fact.rstrip(".").split(" ", 1)
        if moved := re.fullmatch(r"(?:went|walked|hurried) to the (\w+)", rest):
            assert place.get(who) != moved[1]
            place[who] = moved[1]
            for what in (what for what, holder in held.items() if holder == who):
                history[what].append(moved[1])
        elif taken := re.fullmatch(r"(?:picked up|took) the (\w+)", rest):
            assert taken[1] not in held
            assert history.setdefault(taken[1], [place[who]])[-1] == place[who]
            held[taken[1]] = who
        elif left := re.fullmatch(r"put down the (\w+)|left the (\w+) there", rest):
            assert held.pop(left[1] or left[2]) == who
        elif given := re.fullmatch(r"(?:gave|handed) the (\w+) to (\w+)", rest):
            assert held[given[1]] == who and place[who] == place[given[2]]
            held[given[1]] = given[2]
            gifts.append((who, given[1], given[2]))
        else:
            raise AssertionError(fact)
    if asked := re.fullmatch(r"Where is (?:the )?(\w+) now\?", question):
        return {place[asked[1]] if asked[1] in place else history[asked[1]][-1]}
    if asked := re.fullmatch(r"Where was the (\w+) before it came to the (\w+)\?", question):
        path = history[asked[1]]
        return {path[at - 1] for at in range(1, len(path)) if path[at] == asked[2]}
    if asked := re.fullmatch(r"Who gave the (\w+) to (\w+)\?", question):
        return {who for who, what, whom in gifts if (what, whom) == asked.groups()}
    if asked := re.fullmatch(r"What did (\w+) give to (\w+)\?", question):
        return {what for who, what, whom in gifts if (who, whom) == asked.groups()}
    asked = re.fullmatch(r"To whom did (\w+) give the (\w+)\?", question)
    assert asked
    return {whom for who, what, whom in gifts if (who, what) == asked.groups()}


def _on_the_map(facts: list[str], question: str) -> set[str]:
    """Places that lie a step away, with the place asked about at the origin."""
    forward = re.fullmatch(r"What is (\w+) of the (\w+)\?", question)
    backward = re.fullmatch(r"What is the (\w+) (\w+) of\?", question)
    origin = forward[2] if forward else backward[1]  # type: ignore[index]
    east, north = STEPS[forward[1] if forward else backward[2]]  # type: ignore[index]
    wanted = (east, north) if forward else (-east, -north)
    found = {origin: (0, 0)}
    for _ in facts:
        for fact in facts:
            one, direction, other = re.fullmatch(r"The (\w+) is (\w+) of the (\w+)\.", fact).groups()  # type: ignore[union-attr]
            east, north = STEPS[direction]
            if other in found:
                found[one] = (found[other][0] + east, found[other][1] + north)
            if one in found:
                found[other] = (found[one][0] - east, found[one][1] - north)
    return {name for name, at in found.items() if at == wanted}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token a word."""
    words = Tokenizer(models.WordLevel({"?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words)


@pytest.mark.parametrize("kind", KINDS)
def test_the_facts_allow_one_answer_and_it_is_the_one_given(kind: str) -> None:
    for index in range(200):
        told = example(kind, index=index)
        assert solved(told.facts, told.question) == {told.answer}, told
        assert told.answer in candidates(kind)
        assert told.answer not in told.question


@pytest.mark.parametrize("kind", KINDS)
def test_most_answers_need_more_than_the_last_fact(kind: str) -> None:
    """Answers vary, and are not simply the place or the name that stands last."""
    told = [example(kind, index=index) for index in range(200)]
    answers = Counter(each.answer for each in told)
    assert len(answers) >= 6
    assert max(answers.values()) < 60
    assert sum(each.answer in each.facts[-1] for each in told) < 140


@pytest.mark.parametrize("kind", KINDS)
def test_seed_and_index_alone_decide_an_example(kind: str) -> None:
    assert example(kind, seed=3, index=7) == example(kind, seed=3, index=7)
    assert len({example(kind, seed=seed, index=index) for seed in range(3) for index in range(3)}) == 9


def test_no_candidate_is_part_of_another() -> None:
    words = [word.lower() for word in (*candidates("qa1"), *candidates("qa5"))]
    assert not [(one, other) for one in words for other in words if one != other and one in other]


def test_an_unknown_kind_is_refused_with_those_there_are() -> None:
    with pytest.raises(ValueError, match="kind is 'qa6'; choose one of qa1, qa2, qa3, qa4, qa5"):
        example("qa6")


@pytest.mark.parametrize("length", [0, 300, 5000])
def test_facts_stand_in_order_between_whole_sentences(
    length: int, tokenizer: PreTrainedTokenizerFast
) -> None:
    background = [f"Sentence {number} of a book." for number in range(100)]
    prompts = FactPrompts(tokenizer, "qa2", background=background, seed=1)
    pieces, told = prompts.prompt(4, length=length)
    text = "".join(pieces)
    assert told == example("qa2", seed=1, index=4)
    assert text.endswith(f"\nQuestion: {told.question}\nAnswer:")
    found = re.findall(r"[^.]+\.", text.partition("\n")[0])
    assert tuple(each.strip() for each in found if "book" not in each) == told.facts
    numbers = [int(each.split()[1]) for each in found if "book" in each]
    assert numbers == [(numbers[0] + place) % 100 for place in range(len(numbers))] if numbers else not length
    if length:
        assert length - 10 <= len(text.split()) <= length
        assert found[0].strip() not in told.facts or found[-1].strip() not in told.facts
    assert text == "".join(prompts.prompt(4, length=length)[0])


def test_a_length_without_room_or_text_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="a prompt of 20 tokens has no room"):
        FactPrompts(tokenizer, "qa3", background=["A book."]).prompt(0, length=20)
    with pytest.raises(ValueError, match="there is no text to hide anything in"):
        FactPrompts(tokenizer, "qa1").prompt(0, length=1000)
