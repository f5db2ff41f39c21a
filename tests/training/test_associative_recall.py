"""Associative recall by recipe: what is trained on, and that models learn it within seconds."""

from pathlib import Path
from typing import Any

import pytest

from infini_attention.training import material
from infini_attention.training.material import load_material
from infini_attention.training.recipe import read_recipe
from infini_attention.training.run import dry_run, train

RECIPE = Path(__file__).parents[2] / "recipes" / "mqar.yaml"
TINY = {
    "data.associative_recall.vocab_size": 32,
    "data.associative_recall.grid": "[[24, 4]]",
    "data.associative_recall.across_segments": "true",
    "model.segment_length": 8,
    "model.sizes.num_hidden_layers": 1,
    "model.sizes.hidden_size": 32,
    "model.sizes.intermediate_size": 32,
    "training.dataloader_num_workers": 0,
    "training.use_cpu": "true",
    "training.save_strategy": "no",
}


def read(**changes: Any) -> Any:
    return read_recipe(RECIPE, [f"--{name}={value}" for name, value in (TINY | changes).items()])


@pytest.mark.parametrize(
    "system", [{"model.feature_map": "exp"}, {"model.baseline": "linear_attention"}], ids=str
)
def test_what_the_last_segment_does_not_tell_is_learnt(
    system: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(material, "HELD_OUT", 200)
    fast = {"max_steps": 120, "learning_rate": 1e-2, "warmup_steps": 0, "lr_scheduler_type": "constant"}
    fast |= {"weight_decay": 0.0, "output_dir": tmp_path}
    reading = read(**system, **{f"training.{name}": value for name, value in fast.items()})
    figures = train(reading.recipe, reading.text)
    assert figures["recall_4_pairs_in_24"] > 0.3  # one of 16 values is right by chance
    if "model.baseline" not in system:
        assert figures["recall_4_pairs_in_24_memory_off"] < 0.12


def test_rows_are_those_of_the_recipe() -> None:
    grid = {"data.associative_recall.grid": "[[24, 4], [32, 2]]"}
    found = load_material(read(**grid, **{"data.associative_recall.rewrites": 0.5}).recipe)
    assert found.vocab_size == 32 and found.tokenizer is None
    assert {name: len(part[0]["input_ids"]) for name, part in found.validation.items()} == {
        "4_pairs_in_24": 24,
        "2_pairs_in_32": 32,
    }
    assert (found.train.segment_length, found.train.rewrites) == (8, 0.5)
    assert not found.train.example(0, 24, 4).input_ids.equal(
        found.validation["4_pairs_in_24"].example(0, 24, 4).input_ids
    )
    usual = load_material(read(**{"data.associative_recall.across_segments": "false"}).recipe)
    assert usual.train.segment_length is None


def test_a_dry_run_names_the_task_and_its_longest_rows() -> None:
    figures = dry_run(read(**{"data.associative_recall.grid": "[[24, 4], [32, 2]]"}).recipe)
    assert (figures["data"], figures["length"]) == ("associative recall", 32)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training.least_segments": 2}, "least_segments is 2, and every row of data.associative_recall"),
        ({"data.tokenizer": "bytes"}, "data.tokenizer belong to documents"),
        (
            {"model.baseline": "linear_attention", "model.update_rule": "delta"},
            "use for model.update_rule",
        ),
    ],
    ids=str,
)
def test_what_contradicts_the_task_is_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read(**changes)
