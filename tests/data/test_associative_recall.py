"""Associative recall: what is told, what is asked, where, and how often."""

import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from infini_attention.data.associative_recall import AssociativeRecall, RecallExample
from infini_attention.models.loss import IGNORED

LENGTH, PAIRS, VOCABULARY, SEGMENT = 96, 12, 200, 16
VARIANTS: list[dict[str, Any]] = [
    {},
    {"segment_length": SEGMENT},
    {"rewrites": 0.25},
    {"segment_length": SEGMENT, "rewrites": 0.25},
]


def make(**settings: Any) -> AssociativeRecall:
    fixed = {"examples": 40, "grid": [(LENGTH, PAIRS)], "vocab_size": VOCABULARY}
    return AssociativeRecall(**fixed | settings)


def rows(task: AssociativeRecall) -> list[RecallExample]:
    return [task.example(number, LENGTH, PAIRS) for number in range(len(task))]


def tellings(row: RecallExample) -> dict[int, list[tuple[int, int]]]:
    """By key, each place where it is told or asked, and the token after it."""
    keys = set(row.input_ids[: 2 * PAIRS : 2].tolist())
    found: dict[int, list[tuple[int, int]]] = {}
    for place, token in enumerate(row.input_ids.tolist()):
        if token in keys:
            following = row.input_ids[place + 1 : place + 2].tolist()
            found.setdefault(token, []).append((place, *following))
    return found


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_the_right_answer_is_the_value_that_was_told_last(settings: dict[str, Any]) -> None:
    for row in rows(make(**settings)):
        found = tellings(row)
        assert len(found) == PAIRS
        for *told, (asked, _) in found.values():
            assert row.shift_labels[asked] == told[-1][1] >= VOCABULARY // 2
            assert row.old_labels[asked] == (told[0][1] if len(told) > 1 else IGNORED)
        assert (row.shift_labels != IGNORED).sum() == PAIRS
        assert Counter(len(places) - 1 for places in found.values()) == (
            {1: 9, 2: 3} if settings.get("rewrites") else {1: 12}
        )


def test_no_two_keys_and_no_two_values_are_alike() -> None:
    for row in rows(make(rewrites=1.0, grid=[(LENGTH, PAIRS)])):
        keys, values = row.input_ids[: 4 * PAIRS : 2], row.input_ids[1 : 4 * PAIRS : 2]
        assert len(set(values.tolist())) == 2 * PAIRS and len(set(keys.tolist())) == PAIRS
        assert keys.min() >= 1 and keys.max() < VOCABULARY // 2 <= values.min()


def test_one_thing_follows_the_other_in_the_original() -> None:
    first = set()
    for row in rows(make()):
        asked = (row.shift_labels != IGNORED).nonzero()
        assert (asked >= 2 * PAIRS).all() and (asked % 2 == 0).all()
        first.add(int(asked[0]))
    assert 2 * PAIRS in first


def test_keys_are_asked_in_later_segments_than_they_were_told_in_and_told_anew() -> None:
    for row in rows(make(segment_length=SEGMENT, rewrites=0.25)):
        for places in tellings(row).values():
            segments = [place // SEGMENT for place, _ in places]
            assert segments == sorted(set(segments))


@pytest.mark.parametrize(("power_a", "slots"), [(0.01, 36), (1.0, 36), (0.5, 5)])
def test_places_follow_the_power_law(power_a: float, slots: int) -> None:
    """Of one pair alone, in so many slots after it, as the original's formula has it."""
    task = make(examples=1, grid=[(2 + 2 * slots, 1)], power_a=power_a)
    random = np.random.default_rng(0)
    found = np.bincount([task._drawn(random, slots, 1)[0] for _ in range(4000)], minlength=slots) / 4000
    expected = np.arange(1, slots + 1) ** (power_a - 1)
    np.testing.assert_allclose(found, expected / expected.sum(), atol=0.03)


def test_a_draw_without_repeats_is_numpys() -> None:
    chances, random = np.arange(1, 5) ** -0.9, np.random.default_rng(0)
    task, chances = make(power_a=0.1), chances / chances.sum()
    ours = Counter(tuple(task._drawn(random, 4, 2)) for _ in range(6000))
    theirs = Counter(tuple(random.choice(4, 2, replace=False, p=chances)) for _ in range(6000))
    for order in theirs | ours:
        assert ours[order] / 6000 == pytest.approx(theirs[order] / 6000, abs=0.03)


def test_other_tokens_are_any_but_the_rows_keys() -> None:
    seen: set[int] = set()
    for row in rows(make(examples=60)):
        other = torch.ones(LENGTH, dtype=torch.bool)
        other[: 2 * PAIRS], other[row.shift_labels != IGNORED] = False, False
        tokens = set(row.input_ids[other].tolist())
        assert not tokens & set(row.input_ids[: 2 * PAIRS : 2].tolist())
        seen |= tokens
    assert seen == set(range(VOCABULARY))


def test_a_batch_is_of_one_cell_and_cells_come_as_often_as_they_stand_in_the_grid() -> None:
    task = make(examples=1200, grid=[(64, 4), (64, 4), (32, 2)])
    batches = list(DataLoader(task, batch_size=4))
    shapes = Counter(
        (batch["input_ids"].shape[1], int((batch["shift_labels"] != IGNORED).sum())) for batch in batches
    )
    assert set(shapes) == {(64, 16), (32, 8)} and set(batches[0]) == {"input_ids", "shift_labels"}
    assert shapes[64, 16] / 300 == pytest.approx(2 / 3, abs=0.1)


def test_an_item_depends_on_seed_and_index_alone() -> None:
    task = make()
    assert task[2]["input_ids"].equal(make(examples=3)[2]["input_ids"])
    assert not task[1]["input_ids"].equal(task[2]["input_ids"])
    for seed in (1, 2**32):
        assert not make(examples=3, seed=seed)[2]["input_ids"].equal(task[2]["input_ids"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"examples": 0}, "examples is 0 and grid [(96, 12)]; give at least 1 example"),
        ({"grid": []}, "grid []; give at least 1 example, and one cell"),
        ({"grid": [(64, 0)]}, "grid [(64, 0)]"),
        ({"segment_length": 0}, "segment_length is 0; give at least 1, or None"),
        ({"power_a": 0.0}, "power_a is 0.0; give a number above 0"),
        ({"rewrites": 1.5}, "rewrites is 1.5; give a share from 0 to 1"),
        ({"grid": [(47, 12)]}, "12 pairs in 47 tokens, and to tell and to ask them takes 48; give a longer"),
        ({"grid": [(54, 12)], "rewrites": 0.5}, "in 54 tokens, and to tell and to ask them takes 60"),
        (
            {"grid": [(96, 12)], "segment_length": 64, "rewrites": 0.5},
            "in segments of 64 takes 152; give a longer length, or fewer pairs and rewrites",
        ),
        ({"vocab_size": 25}, "vocab_size is 25, and 12 pairs take 12 keys"),
        ({"vocab_size": 30, "rewrites": 0.5}, "and 18 values of its upper half; give at least 36"),
    ],
    ids=str,
)
def test_what_cannot_be_met_is_named_with_a_remedy(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        make(**settings)


@pytest.mark.parametrize(
    "settings", [{"vocab_size": 26}, {"grid": [(48, 12)]}, {"vocab_size": 36, "rewrites": 0.5}], ids=str
)
def test_what_just_fits_is_made(settings: dict[str, Any]) -> None:
    assert (make(**settings)[0]["shift_labels"] != IGNORED).sum() == PAIRS
