import pytest
import torch
from torch import Tensor

from infini_attention.data.copy_task import CopyTask

KEYS, VALUES, BACK = 5, 4, 3
TASK = CopyTask(400, keys=KEYS, values=VALUES, segments_back=BACK)


def said(tokens: Tensor) -> dict[int, int]:
    """The values by their keys."""
    return {int(token) // VALUES: int(token) % VALUES for token in tokens}


def test_every_key_is_asked_and_the_answer_is_the_first_segments() -> None:
    for item in TASK:
        first, last = item["input_ids"][:KEYS], item["input_ids"][-KEYS:]
        labels = item["shift_labels"]
        assert set(said(first)) == set(said(last)) == set(range(KEYS))
        assert said(labels[-KEYS:]) == said(first)
        assert (labels[-KEYS:] // VALUES).equal(last // VALUES)  # each answer stands where its key is said
        assert (labels[:-KEYS] == -100).all()


def test_segments_between_say_nothing() -> None:
    for item in TASK:
        assert len(item["input_ids"]) == len(item["shift_labels"]) == KEYS * (BACK + 1)
        assert (item["input_ids"][KEYS:-KEYS] == KEYS * VALUES).all()
    assert TASK.vocab_size == KEYS * VALUES + 1
    assert TASK.segment_length == KEYS


def test_the_last_segment_does_not_tell_the_answer() -> None:
    seen = torch.zeros(VALUES, VALUES)  # shown value, right value
    for item in TASK:
        shown, right = item["input_ids"][-KEYS:] % VALUES, item["shift_labels"][-KEYS:] % VALUES
        seen.index_put_((shown, right), torch.ones(KEYS), accumulate=True)
    shares = seen / seen.sum(1, keepdim=True)  # about 500 questions a row
    torch.testing.assert_close(shares, torch.full_like(shares, TASK.chance), rtol=0, atol=0.07)


def test_where_a_key_was_told_does_not_tell_where_it_is_asked() -> None:
    places = torch.zeros(KEYS, KEYS)
    for item in TASK:
        told, asked = item["input_ids"][:KEYS] // VALUES, item["input_ids"][-KEYS:] // VALUES
        places.index_put_((told.argsort(), asked.argsort()), torch.ones(KEYS), accumulate=True)
    torch.testing.assert_close(places / 400, torch.full_like(places, 1 / KEYS), rtol=0, atol=0.07)


def test_an_item_depends_on_seed_and_index_alone() -> None:
    fewer = CopyTask(3, keys=KEYS, values=VALUES, segments_back=BACK)
    assert fewer[2]["input_ids"].equal(TASK[2]["input_ids"])
    assert not TASK[1]["input_ids"].equal(TASK[2]["input_ids"])
    for seed in (1, 2**32):
        other = CopyTask(3, keys=KEYS, values=VALUES, segments_back=BACK, seed=seed)
        assert not other[2]["input_ids"].equal(TASK[2]["input_ids"])


def test_one_segment_back_is_the_segment_before() -> None:
    item = CopyTask(1, keys=KEYS, values=VALUES, segments_back=1)[0]
    assert len(item["input_ids"]) == 2 * KEYS


@pytest.mark.parametrize("settings", [{"keys": 0}, {"values": 1}, {"segments_back": 0}])
def test_settings_that_leave_nothing_to_ask_are_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="give at least 1 of each, and 2 values"):
        CopyTask(1, **settings)
