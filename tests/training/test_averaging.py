"""The weights' running average takes their place at the end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from infini_attention.models import retrofit
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.trainer import InfiniTrainer

STEPS = 12


def rows() -> list[dict[str, torch.Tensor]]:
    ids = torch.randint(0, 64, (64, 16), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


class Seen(TrainerCallback):
    """Every step's weights."""

    def __init__(self) -> None:
        self.weights: list[list[torch.Tensor]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        self.weights.append([each.detach().clone() for each in model.parameters()])


def training(folder: Path, **settings: Any) -> tuple[InfiniTrainer, Seen]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = retrofit(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), segment_length=8, gate_init=0.0)
    args = InfiniTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        save_steps=5,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **settings,
    )
    seen = Seen()
    trainer = InfiniTrainer(model=model, args=args, train_dataset=rows(), callbacks=[seen])
    return trainer, seen


def weights(trainer: InfiniTrainer) -> list[torch.Tensor]:
    assert trainer.model is not None
    return [each.detach().clone() for each in trainer.model.parameters()]


def averaged(start: list[torch.Tensor], steps: list[list[torch.Tensor]], most: float) -> list[torch.Tensor]:
    for step, now in enumerate(steps, start=1):
        decay = min(most, step / (9 + step))
        start = [decay * old + (1 - decay) * new for old, new in zip(start, now, strict=True)]
    return start


def test_a_training_ends_with_the_average_of_its_steps(tmp_path: Path) -> None:
    trainer, seen = training(tmp_path, ema_decay=0.8)
    start = weights(trainer)
    trainer.train()
    torch.testing.assert_close(weights(trainer), averaged(start, seen.weights, 0.8))
    assert not torch.equal(weights(trainer)[0], seen.weights[-1][0])


def test_averaging_changes_no_step(tmp_path: Path) -> None:
    averaged, with_it = training(tmp_path / "a", ema_decay=0.9)
    plain, without = training(tmp_path / "b")
    averaged.train()
    plain.train()
    torch.testing.assert_close(with_it.weights, without.weights, rtol=0, atol=0)
    torch.testing.assert_close(weights(plain), without.weights[-1], rtol=0, atol=0)


def test_a_training_that_was_cut_off_goes_on_with_its_average(tmp_path: Path) -> None:
    whole, _ = training(tmp_path / "whole", ema_decay=0.9)
    whole.train()
    again, seen = training(tmp_path / "again", ema_decay=0.9)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert len(seen.weights) == STEPS - 5
    torch.testing.assert_close(weights(again), weights(whole), rtol=0, atol=0)


def test_a_checkpoint_without_an_average_is_refused(tmp_path: Path) -> None:
    training(tmp_path / "plain")[0].train()
    trainer, _ = training(tmp_path / "again", ema_decay=0.9)
    with pytest.raises(ValueError, match="the checkpoint is of a training without it; leave it out"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "plain" / "checkpoint-5"))


def test_a_second_training_begins_a_new_average(tmp_path: Path) -> None:
    trainer, seen = training(tmp_path, ema_decay=0.8)
    trainer.train()
    start = weights(trainer)
    trainer.train()
    torch.testing.assert_close(weights(trainer), averaged(start, seen.weights[STEPS:], 0.8))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_that_is_none_is_refused(tmp_path: Path, decay: float) -> None:
    with pytest.raises(ValueError, match=r"ema_decay is .*; give a number between 0 and 1"):
        InfiniTrainingArguments(str(tmp_path), ema_decay=decay)


def test_an_average_beside_the_best_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ema_decay is set with load_best_model_at_end"):
        InfiniTrainingArguments(
            str(tmp_path), ema_decay=0.9, load_best_model_at_end=True, eval_strategy="steps", eval_steps=5
        )
