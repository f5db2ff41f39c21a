"""Recall and bytes of state, beside what models say and hold by themselves."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention import InfiniLlamaConfig, InfiniLlamaForCausalLM
from infini_attention.baselines import BASELINES
from infini_attention.data.associative_recall import AssociativeRecall
from infini_attention.evaluation.associative_recall import (
    HELD_OUT_SEED,
    RecallScore,
    associative_recall,
    state_bytes,
)
from infini_attention.models import memory_off
from infini_attention.models.loss import IGNORED
from infini_attention.models.memory_off import SHUT

LENGTH, PAIRS, SEGMENT, LAYERS, HEADS, WIDTH = 24, 3, 8, 2, 2, 8
SIZES = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": WIDTH,
    "segment_length": SEGMENT,
    "initializer_range": 0.5,
}
OWN = {"sliding_window": {"window": 5}}
ASKED = {"grid": [(LENGTH, PAIRS)], "examples": 40, "rewrites": 0.5, "batch_rows": 7}
SYSTEMS = ["infini", "local", *BASELINES]


def make(name: str) -> Any:
    """A tiny model of a system, in evaluation mode; its answers are random, and of few tokens."""
    torch.manual_seed(0)
    if name in BASELINES:
        model_class = BASELINES[name][LlamaForCausalLM]
        return model_class(model_class.config_class(**SIZES | OWN.get(name, {}))).eval()
    gate_init = SHUT if name == "local" else 1.0
    return InfiniLlamaForCausalLM(InfiniLlamaConfig(**SIZES, gate_init=gate_init)).eval()


@torch.no_grad()
def shares(model: Any) -> tuple[float, float, float]:
    """Right answers, of those of rewritten keys the right ones and the old values: row by row, key by key."""
    task = AssociativeRecall(1, grid=ASKED["grid"], vocab_size=16, rewrites=0.5, seed=HELD_OUT_SEED)
    right, rewritten, old = [], [], []
    for number in range(ASKED["examples"]):
        row = task.example(number, LENGTH, PAIRS)
        likeliest = model(row.input_ids[None]).logits[0].argmax(dim=-1)
        for place in (row.shift_labels != IGNORED).nonzero().flatten():
            right.append(bool(likeliest[place] == row.shift_labels[place]))
            if row.old_labels[place] != IGNORED:
                rewritten.append(right[-1])
                old.append(bool(likeliest[place] == row.old_labels[place]))
    return tuple(sum(each) / len(each) for each in (right, rewritten, old))


@pytest.mark.parametrize("name", SYSTEMS)
def test_shares_are_those_of_the_models_own_forward(name: str) -> None:
    model = make(name)
    (score,) = associative_recall(model, **ASKED).scores
    found = score.accuracy.share, score.rewritten.share, score.old.share
    assert found == pytest.approx(shares(model)) and sum(found) > 0
    assert score.accuracy.trials == ASKED["examples"]
    assert (score.length, score.pairs) == (LENGTH, PAIRS)
    assert (score.control is not None) == (name in ("infini", "memorizing"))
    if score.control is not None:
        with memory_off(model):
            assert score.control.share == pytest.approx(shares(model)[0])


def test_without_rewrites_nothing_is_said_of_them() -> None:
    (score,) = associative_recall(make("infini"), **ASKED | {"rewrites": 0.0}).scores
    assert (score.rewritten, score.old) == (None, None)


@pytest.mark.parametrize("name", ["linear_attention", "infini"])
def test_keys_are_asked_across_the_models_own_segments(name: str) -> None:
    report = associative_recall(make(name), **ASKED | {"rewrites": 0.0}, across_segments=True)
    plain = associative_recall(make(name), **ASKED | {"rewrites": 0.0})
    assert report.setting.segment_length == SEGMENT and report.setting.across_segments
    assert report.scores != plain.scores
    with pytest.raises(ValueError, match="in segments of 8 takes 14"):
        associative_recall(make(name), grid=[(12, PAIRS)], across_segments=True)


@torch.no_grad()
def test_the_state_is_what_is_carried_to_the_last_token() -> None:
    token = 2 * LAYERS * HEADS * WIDTH * 4  # bytes of a token's keys and values
    sums = LAYERS * HEADS * WIDTH * (WIDTH + 1) * 4
    count = LAYERS * 8  # each layer's state says how many tokens it has seen
    sizes = {
        "infini": 2 * sums + (SEGMENT - 1) * token + count,
        "local": (SEGMENT - 1) * token + count,
        "linear_attention": sums,
        "full": (LENGTH - 1) * token,
        "sliding_window": 4 * token,
        "transformer_xl": (2 * SEGMENT - 1) * token,
    }
    for name, size in sizes.items():
        assert state_bytes(make(name), LENGTH) == size
    narrow = make("linear_attention").to(torch.bfloat16)
    assert state_bytes(narrow, LENGTH) == sums and state_bytes(narrow, 10 * LENGTH) == sums


def test_a_report_is_kept_and_comes_back_and_others_are_refused(tmp_path: Path) -> None:
    path, model = tmp_path / "new" / "recall.json", make("infini")
    report = associative_recall(model, **ASKED, output=path)
    content = json.loads(path.read_text())
    assert [RecallScore.of(each) for each in content["scores"]] == report.scores
    written = path.stat().st_mtime_ns
    assert associative_recall(model, **ASKED, output=path) == report
    assert path.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"holds other figures: examples is 40 there and 2 here"):
        associative_recall(model, **ASKED | {"examples": 2}, output=path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="holds no report of associative recall"):
        associative_recall(model, **ASKED, output=path)


def test_models_and_settings_that_cannot_be_right_are_refused() -> None:
    with pytest.raises(ValueError, match=r"in training mode.*call model.eval"):
        associative_recall(make("infini").train(), **ASKED)
    with pytest.raises(ValueError, match="batch_rows is 0; give at least 1"):
        associative_recall(make("infini"), **ASKED | {"batch_rows": 0})
    with pytest.raises(ValueError, match="LlamaConfig is no config of an infini"):
        associative_recall(LlamaForCausalLM(LlamaConfig(**SIZES)).eval(), **ASKED)
