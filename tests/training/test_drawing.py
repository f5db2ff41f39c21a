"""What a step's inputs are made of batches."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.drawing import Drawing

SIZE = 8
IDS = torch.zeros(64, 5 * SIZE, dtype=torch.int64)
PACKED = torch.cat([torch.arange(20), torch.arange(20)])[None]  # two documents' positions
CONFIG = SimpleNamespace(segment_length=SIZE, update_rule="delta")


def make(folder: Path, captures: bool = False, **settings: Any) -> Drawing:
    args = InfiniTrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, **settings)
    return Drawing(args, captures=captures, seed=0)


def drawn(folder: Path, inputs: dict[str, Tensor], step: int = 0, **settings: Any) -> dict[str, Any]:
    return make(folder, **settings)(inputs, CONFIG, step)


def test_what_says_that_it_must_not_repeat_counts_once(tmp_path: Path) -> None:
    repeatable = torch.tensor([[True, False, True, True, False]]).expand(64, 5)
    found = drawn(tmp_path, {"input_ids": IDS, "labels": IDS, "repeatable": repeatable}, repeat_ceiling=50.0)
    assert "repeatable" not in found
    weights = found["segment_weights"]
    assert (weights[:, [1, 4]] == 1).all()
    assert (weights[:, [0, 2, 3]] > 1).any(dim=0).all()


def test_what_must_not_repeat_is_known_where_inputs_are_cut(tmp_path: Path) -> None:
    labels, repeatable = IDS.clone(), torch.tensor([[False, True, False, True, True]]).expand(64, 5)
    labels[:, 4 * SIZE :] = -100  # rows are filled up after their fourth segment
    drawing, seen = make(tmp_path, least_segments=2, repeat_ceiling=50.0), set()
    for _ in range(40):
        found = drawing({"input_ids": IDS, "labels": labels, "repeatable": repeatable}, CONFIG, 0)
        count = found["input_ids"].shape[1] // SIZE
        end = max(count, 4)
        own, weights = repeatable[:, end - count : end], found["segment_weights"]
        assert (weights[~own] == 1).all() and (weights[own] > 1).any()
        seen.add(count)
    assert seen == {2, 3, 4, 5}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"least_segments": 2}, "least_segments is 2, and documents are packed, each as long as it is"),
        ({"cuda_graphs": True}, "cuda_graphs is set, and documents are packed, each batch in its own way"),
        ({"teacher": "smollm2"}, "teacher is set, and documents are packed, which it would read as one"),
        ({"repeat_ceiling": 9.0, "repeat_form": "copies"}, "inputs of 20 tokens are no whole segments of 8"),
    ],
)
def test_packed_documents_are_refused_where_they_cannot_be(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    batch = {"input_ids": IDS[:1], "labels": IDS[:1], "position_ids": PACKED}
    with pytest.raises(ValueError, match=words):
        drawn(tmp_path, batch, **settings)


@pytest.mark.parametrize("step", [0, 5, 20])
def test_rows_shorter_than_the_least_are_refused_at_once(step: int, tmp_path: Path) -> None:
    batch = {"input_ids": IDS[:, : 2 * SIZE], "labels": IDS[:, : 2 * SIZE]}
    with pytest.raises(ValueError, match="at least 3 segments are wanted, and inputs have 2; give fewer"):
        drawn(tmp_path, batch, step=step, least_segments=3, curriculum_steps=20)


def test_a_captured_step_has_no_mask_and_refuses_one_of_padding(tmp_path: Path) -> None:
    mask = torch.ones_like(IDS)
    batch = {"input_ids": IDS, "labels": IDS, "attention_mask": mask}
    assert "attention_mask" in drawn(tmp_path, batch)
    assert "attention_mask" not in drawn(tmp_path, batch, captures=True)
    mask[3, -1] = 0
    with pytest.raises(ValueError, match="attention_mask marks padding, which a captured step cannot look"):
        drawn(tmp_path, batch, captures=True)


def test_a_batch_stays_as_it_was_given(tmp_path: Path) -> None:
    starts = torch.zeros(64, dtype=torch.bool)
    batch = {"input_ids": IDS, "labels": IDS, "starts_document": starts}
    found = drawn(tmp_path, batch, carry_memory=True, reset_probability=0.5, repeat_ceiling=5.0)
    assert [*batch] == ["input_ids", "labels", "starts_document"] and not starts.any()
    assert found["starts_document"].any() and not found["starts_document"].all()
