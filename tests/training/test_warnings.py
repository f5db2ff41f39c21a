import logging
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.models import retrofit
from infini_attention.models.observe import Observation
from infini_attention.training.warnings import MemoryWarnings

Log = Callable[..., None]


@pytest.fixture
def model() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    return retrofit(LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)), segment_length=8, gate_init=0.0)


def observation(
    *, share: float = 0.1, saturation: float = 0.5, loss: float = 2.0, loss_memory_off: float = 2.1
) -> Observation:
    whole = torch.ones(2, 2)
    return Observation(
        gates=whole * 0.5,
        share=whole * share,
        memory_norm=whole,
        normalizer=whole,
        saturation=whole * saturation,
        loss=loss,
        loss_memory_off=loss_memory_off,
    )


class Watched:
    """Warnings, and a training that is told what to log."""

    def __init__(self, model: Any, first_step: int = 0) -> None:
        self.model = model
        self.observation: Observation | None = None
        self.warnings = MemoryWarnings(lambda: self.observation)
        self.state = SimpleNamespace(global_step=first_step, is_world_process_zero=True)
        self.warnings.on_train_begin(None, self.state, None, model=model)

    def log(self, *, step: int | None = None, loss: float = 2.0, seen: Observation | None = None) -> None:
        """A log line at `step`, with an observation of its own."""
        self.state.global_step = self.state.global_step + 1 if step is None else step
        self.observation = seen
        self.warnings.on_log(None, self.state, None, model=self.model, logs={"loss": loss})

    @property
    def said(self) -> list[str]:
        return self.warnings.said


@pytest.fixture
def watched(model: Any) -> Watched:
    return Watched(model)


def move(model: Any, by: float) -> None:
    with torch.no_grad():
        model.model.layers[1].self_attn.memory_gate.logits[0] += by


def test_gates_that_do_not_move_are_spoken_of_once(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    move(watched.model, 0.03)
    watched.log(step=199)
    assert watched.said == []
    for step in (200, 300, 400):
        watched.log(step=step)
    (words,) = watched.said
    assert words.startswith("gates have moved by 0.030 at most in 200 steps")
    assert "raise gate_learning_rate" in words
    records = [(record.name, record.levelno, record.message) for record in caplog.records]
    assert records == [("infini_attention.training", logging.WARNING, words)]


def test_gates_that_move_are_not(watched: Watched) -> None:
    move(watched.model, -0.06)
    watched.log(step=300)
    assert watched.said == []


def test_a_training_that_goes_on_has_the_same_patience(model: Any) -> None:
    watched = Watched(model, first_step=1000)
    watched.log(step=1001)
    watched.log(step=1199)
    assert watched.said == []
    watched.log(step=1200)
    assert len(watched.said) == 1


def test_another_training_is_spoken_of_anew(watched: Watched) -> None:
    for _ in range(2):
        watched.state.global_step = 0
        watched.warnings.on_train_begin(None, watched.state, None, model=watched.model)
        watched.log(step=200)
    assert len(watched.said) == 2


def test_gates_that_are_not_trained_are_left_alone(model: Any) -> None:
    for layer in model.model.layers:
        layer.self_attn.memory_gate.requires_grad_(False)
    watched = Watched(model)
    for _ in range(5):
        watched.log(step=500, seen=observation(share=0.0, saturation=1.0, loss_memory_off=2.0))
    assert watched.said == []


def test_a_memory_that_works_is_not_spoken_of(watched: Watched) -> None:
    move(watched.model, 1.0)
    for step in range(0, 1000, 10):
        watched.log(step=step, seen=observation())
    assert watched.said == []


@pytest.mark.parametrize(
    ("figures", "words"),
    [
        ({"share": 0.0}, "no token had a memory to read: inputs are no longer than a segment"),
        ({"share": 5e-4}, "the gates are as good as shut: the memory's share is 0.050% at most"),
        (
            {"loss_memory_off": 1.99},
            "the memory makes 10.0% of what attention puts out, and the loss without it is no higher "
            "(1.9900 against 2.0000 with it)",
        ),
        (
            {"saturation": 0.95},
            "the memory is full: what it answers to the keys it was given correlates by only 0.05",
        ),
    ],
)
def test_each_trouble_is_spoken_of_once_when_it_was_seen_three_times_in_a_row(
    watched: Watched, figures: dict[str, float], words: str
) -> None:
    move(watched.model, 1.0)
    for seen in (figures, figures, {}, figures, figures):
        watched.log(step=500, seen=observation(**seen))
    assert watched.said == []
    for _ in range(5):
        watched.log(step=500, seen=observation(**figures))
    (said,) = watched.said
    assert said.startswith(words)
    assert ";" in said  # the remedy


def test_one_observation_counts_once_however_often_it_is_logged(watched: Watched) -> None:
    move(watched.model, 1.0)
    seen = observation(saturation=1.0)
    for _ in range(10):
        watched.log(step=500, seen=seen)
    assert watched.said == []


@pytest.mark.parametrize("figures", [{"share": 5e-4}, {"loss_memory_off": 1.9}])
def test_a_young_memory_is_given_time(watched: Watched, figures: dict[str, float]) -> None:
    for _ in range(10):
        watched.log(step=150, seen=observation(**figures))
    assert watched.said == []


def test_a_loss_that_leaps_is_named_with_its_step_each_time(watched: Watched) -> None:
    for step in range(1, 31):
        watched.log(step=step, loss=3.0 - 0.01 * step + 0.02 * (step % 3))
    watched.log(step=31, loss=4.5)
    (words,) = watched.said
    assert words.startswith("the loss leapt to 4.500 at step 31, from 2.8")
    for step in range(32, 62):
        watched.log(step=step, loss=4.5 + 0.02 * (step % 3))
    assert len(watched.said) == 1  # it stayed where it had leapt to
    watched.log(step=62, loss=6.0)
    assert [words.split(",")[0] for words in watched.said[1:]] == ["the loss leapt to 6.000 at step 62"]


def test_a_loss_that_varies_or_has_just_begun_does_not_leap(watched: Watched) -> None:
    for step, loss in enumerate([9.0, 8.0, 10.5, 7.0, 7.5, 6.0, 6.5, 5.5, 6.5, 5.0, 6.0, 7.5, 5.5, 5.0, 6.9]):
        watched.log(step=step, loss=loss)
    for step in range(15, 30):
        watched.log(step=step, loss=5.0)
    watched.log(step=30, loss=5.1)
    assert watched.said == []


def test_other_processes_and_other_logs_say_nothing(watched: Watched) -> None:
    watched.state.global_step = 500
    watched.warnings.on_log(None, watched.state, None, model=watched.model, logs={"eval_loss": 1.0})
    watched.state.is_world_process_zero = False
    watched.log(step=500)
    assert watched.said == []
