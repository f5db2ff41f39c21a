from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from infini_attention.models import retrofit
from infini_attention.training.parameters import parameter_groups
from infini_attention.training.trainer import GateWatch, InfiniTrainer, InfiniTrainingArguments, gate_logits

SEGMENT = 8


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    return retrofit(base, segment_length=SEGMENT, gate_init=0.0).train()


def rows(count: int = 16, length: int = 40) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (count, length), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


@pytest.fixture
def make_trainer(model: LlamaForCausalLM, tmp_path: Path) -> Callable[..., InfiniTrainer]:
    def make(**settings: Any) -> InfiniTrainer:
        fixed = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3}
        fixed |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        args = InfiniTrainingArguments(output_dir=str(tmp_path), **(fixed | settings))
        return InfiniTrainer(model=model, args=args, train_dataset=rows())

    return make


def test_gates_have_a_group_of_their_own_and_nothing_is_left_out(model: LlamaForCausalLM) -> None:
    groups = parameter_groups(model, learning_rate=1e-3, weight_decay=0.1, gate_learning_rate=1e-2)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("matrices", 1e-3, 0.1),
        ("vectors", 1e-3, 0.0),
        ("gates", 1e-2, 0.0),
    ]
    grouped = [parameter for group in groups for parameter in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}
    assert len(grouped) == len({id(p) for p in grouped})


def test_gates_move_by_their_own_learning_rate(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    before = gate_logits(model)
    trainer = make_trainer(gate_learning_rate=0.05, lr_scheduler_type="constant")
    trainer.train()
    moved = (gate_logits(model) - before).abs()
    assert moved.max() > 0.1  # four steps of Adam are about four times the rate
    shares = [entry["gate_max"] for entry in trainer.state.log_history if "gate_max" in entry]
    assert len(shares) == 4
    assert shares[-1] == pytest.approx(gate_logits(model).sigmoid().max().item(), abs=1e-3)


def test_the_gates_warm_up_by_themselves(make_trainer: Callable[..., InfiniTrainer]) -> None:
    trainer = make_trainer(gate_warmup_steps=4, lr_scheduler_type="constant", max_steps=8)
    trainer.create_optimizer_and_scheduler(8)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in trainer.optimizer.param_groups])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert [body for body, *_ in rates] == [1e-3] * 8
    expected = [0.0025, 0.005, 0.0075, 0.01, 0.01, 0.01, 0.01, 0.01]
    assert [gates for *_, gates in rates] == pytest.approx(expected)


def test_the_loss_is_the_models_own(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    trainer = make_trainer(loss_chunk=5)
    batch = {name: torch.stack([row[name] for row in rows(3)]) for name in ("input_ids", "labels")}
    model.train()
    torch.testing.assert_close(trainer.compute_loss(model, batch), model(**batch, use_cache=False).loss)


def test_accumulated_steps_weigh_every_token_alike(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    start = {name: x.clone() for name, x in model.state_dict().items()}
    ended = []
    for settings in (
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    ):
        model.load_state_dict(start)
        make_trainer(max_steps=1, optim="sgd", max_grad_norm=0.0, **settings).train()
        ended.append({name: x.clone() for name, x in model.state_dict().items()})
    for name in start:
        torch.testing.assert_close(ended[0][name], ended[1][name], rtol=1e-4, atol=1e-6)


def test_segments_repeat_and_vary_in_number_in_training_only(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(repeat_ceiling=100.0, least_segments=2)
    seen: list[tuple[int, Any]] = []
    forward = type(model).forward

    def spy(self: Any, **inputs: Any) -> Any:
        seen.append((inputs["input_ids"].shape[1], inputs.get("segment_weights")))
        return forward(self, **inputs)

    monkeypatch.setattr(type(model), "forward", spy)
    batch = {name: torch.stack([row[name] for row in rows(3)]) for name in ("input_ids", "labels")}
    for _ in range(30):
        trainer.compute_loss(model, batch)
    assert {length for length, _ in seen} == {16, 24, 32, 40}
    assert all(weights.shape == (3, length // SEGMENT) for length, weights in seen)
    model.eval()
    seen.clear()
    trainer.compute_loss(model, batch)
    assert seen == [(40, None)]


def test_a_loss_that_is_no_number_stops_the_training(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the loss is nan at step 0; go on from the last checkpoint"):
        trainer.train()


def test_gates_that_do_not_move_are_spoken_of(
    make_trainer: Callable[..., InfiniTrainer],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(GateWatch, "patience", 2)
    make_trainer(gate_learning_rate=1e-6).train()
    assert capsys.readouterr().out.count("gates have moved by 0.000 at most in 2 steps") == 1


def test_ordinary_arguments_are_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="give InfiniTrainingArguments"):
        InfiniTrainer(model=model, args=args, train_dataset=rows())
