"""Captured steps, without a GPU: where a graph would be replayed, what it holds is done again.

What is done again has the numbers that were the host's when it was captured, as a graph has. Captures
themselves are tested in tests/gpu.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from infini_attention.data.shards import TokenStore
from infini_attention.data.windows import SplitWindows, Windows
from infini_attention.training import graphs
from infini_attention.training.graphs import GraphedSteps, mapped
from infini_attention.training.trainer import InfiniTrainer

from .test_carrying import CASES, PARTS, ROWS, SEGMENT, make, store, trainer

__all__ = ["store"]  # a fixture
MEMORIES = [case for case in CASES if case[0] in ("segment", "sliding", "sink", "convolved")]


class Repeats:
    """Stands for `Captures`."""

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        left = run()

        def replay() -> None:
            for old, new in zip(tensors(left), tensors(run()), strict=True):
                old.copy_(new)

        return replay, left


def tensors(x: Any) -> list[Tensor]:
    found: list[Tensor] = []
    mapped(found.append, x)
    return found


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "Captures", Repeats)
    monkeypatch.setattr(graphs, "_for_host", lambda x: x.dim() == 1 and not x.is_floating_point())
    monkeypatch.setattr(InfiniTrainer, "_captures", property(lambda self: self.args.cuda_graphs))


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("name", "read_again"), MEMORIES)
def test_a_carried_memory_goes_through_captured_steps(
    name: str, read_again: bool | None, accumulated: int, store: TokenStore, tmp_path: Path, captured: None
) -> None:
    def trained(cuda_graphs: bool) -> InfiniTrainer:
        training = trainer(
            make(name),
            store,
            tmp_path,
            cuda_graphs=cuda_graphs,
            read_again=read_again,
            max_steps=9,
            learning_rate=1e-2,
            gradient_accumulation_steps=accumulated,
            per_device_train_batch_size=4 // accumulated,
        )
        training.train()
        return training

    expected, training = trained(False), trained(True)
    assert losses(training) == pytest.approx(losses(expected), abs=1e-6)
    assert len(losses(training)) == 9
    steps = training._graphs
    assert steps is not None
    assert 1 < len(steps._captured) < 9 * accumulated  # what is met again is replayed


def test_rows_of_several_lengths_are_captured_once_each(
    store: TokenStore, tmp_path: Path, captured: None
) -> None:
    def trained(cuda_graphs: bool) -> InfiniTrainer:
        settings = {"carry_memory": False, "least_segments": 1, "cuda_graphs": cuda_graphs, "max_steps": 12}
        training = trainer(make("segment"), store, tmp_path, **settings)
        training.train_dataset = Windows(store, 12)
        training.train()
        return training

    expected, training = trained(False), trained(True)
    assert losses(training) == pytest.approx(losses(expected), abs=1e-6)
    steps = training._graphs
    assert steps is not None and 1 < len(steps._captured) <= 6  # of 1 to 3 segments, also in an epoch's rest


def test_gradients_that_are_there_are_added_to_and_dropped_ones_made_anew(captured: None) -> None:
    model = torch.nn.Linear(3, 1, bias=False)
    steps = GraphedSteps(model, lambda batch: (model(batch["x"]).sum(), {"doubled": 2 * batch["x"]}))
    one, many = torch.ones(1, 3), torch.full((1, 3), 5.0)
    loss, left = steps({"x": one})
    assert loss == model(one)
    steps({"x": many})
    assert torch.equal(model.weight.grad, one + many)
    assert torch.equal(left["doubled"], 2 * one)  # no later replay writes to it
    model.weight.grad = None
    steps({"x": many})
    assert torch.equal(model.weight.grad, many)


def test_what_the_host_looks_at_makes_another_kind_of_batch(captured: None) -> None:
    model = torch.nn.Linear(1, 1, bias=False)

    def step(batch: dict[str, Any]) -> tuple[Tensor, None]:
        return model(batch["x"]).sum() * batch["times"].tolist()[0] * batch["factor"], None

    steps, x = GraphedSteps(model, step), torch.ones(1, 1)
    cases = [(2, 1.0), (3, 1.0), (2, 5.0), (2, 1.0)]
    found = [steps({"x": x, "times": torch.tensor([times]), "factor": by})[0] for times, by in cases]
    assert found == pytest.approx([times * by * model.weight.item() for times, by in cases])
    assert len(steps._captured) == 3


def test_states_lie_at_the_same_places_whatever_the_kind(
    store: TokenStore, tmp_path: Path, captured: None
) -> None:
    training = trainer(make("sliding"), store, tmp_path, cuda_graphs=True, max_steps=9)
    training.train()
    steps = training._graphs
    assert steps is not None and len(steps._captured) > 3
    places = {tuple(map(id, each.places)) for each in steps._captured.values()}
    assert len(places) == 3  # with no states before, with one, and with one to read again after another


def test_beyond_so_many_kinds_steps_run_as_they_are(
    captured: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(graphs, "MOST_KINDS", 2)
    model = torch.nn.Linear(1, 1, bias=False)
    steps = GraphedSteps(model, lambda batch: (model(batch).sum(), batch * 2))
    for rows in (1, 2, 3, 4, 1, 3):
        loss, doubled = steps(torch.ones(rows, 1))
        assert loss.item() == pytest.approx(rows * model.weight.item()) and not loss.requires_grad
        assert torch.equal(doubled, torch.full((rows, 1), 2.0))
    assert model.weight.grad.item() == 1 + 2 + 3 + 4 + 1 + 3
    assert len(steps._captured) == 2
    assert caplog.text.count("steps are of more than 2 kinds") == 1


def test_what_cannot_be_captured_is_refused(store: TokenStore, tmp_path: Path, captured: None) -> None:
    with pytest.raises(ValueError, match=r"cuda_graphs and carry_memory are set, and a TransformerXLLlama"):
        trainer(make("transformer_xl"), store, tmp_path, cuda_graphs=True)
    with pytest.raises(ValueError, match=r"a FullAttentionLlamaConfig has nothing of fixed size to carry"):
        trainer(make("full"), store, tmp_path, cuda_graphs=True)
    training = trainer(make("segment"), store, tmp_path, cuda_graphs=True)
    training.train_dataset = SplitWindows(store, SEGMENT + 1, ROWS, PARTS)
    with pytest.raises(ValueError, match=r"inputs have 5 tokens, .* cuda_graphs needs whole ones"):
        training.train()


@pytest.mark.parametrize("padded", [False, True])
def test_a_mask_is_left_out_or_refused(
    padded: bool, store: TokenStore, tmp_path: Path, captured: None
) -> None:
    row = {"input_ids": torch.arange(8), "labels": torch.arange(8), "attention_mask": torch.ones(8).long()}
    row["attention_mask"][0] = int(not padded)
    training = trainer(make("segment"), store, tmp_path, cuda_graphs=True, carry_memory=False, max_steps=2)
    training.train_dataset = [row] * 8
    if not padded:
        training.train()
        return
    with pytest.raises(ValueError, match=r"cuda_graphs is set and attention_mask marks padding"):
        training.train()


def losses(training: InfiniTrainer) -> list[float]:
    return [entry["loss"] for entry in training.state.log_history if "loss" in entry]
