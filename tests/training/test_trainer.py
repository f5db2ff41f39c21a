import shutil
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from infini_attention.models import load_model, retrofit
from infini_attention.models.observe import gate_logits
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.parameters import parameter_groups
from infini_attention.training.trainer import InfiniTrainer
from infini_attention.training.warnings import MemoryWarnings

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
    def make(model: LlamaForCausalLM = model, **settings: Any) -> InfiniTrainer:
        fixed = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-3}
        fixed |= {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
        args = InfiniTrainingArguments(output_dir=str(tmp_path), **(fixed | settings))
        return InfiniTrainer(model=model, args=args, train_dataset=rows(), eval_dataset=rows(4))

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
        drawn, _ = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        trainer.training_step(model, drawn[0], num_items_in_batch=117)
    assert {length for length, _ in seen} == {16, 24, 32, 40}
    assert all(weights.shape == (3, length // SEGMENT) for length, weights in seen)
    model.eval()
    seen.clear()
    trainer.compute_loss(model, batch)
    assert seen == [(40, None)]


def test_segments_are_copied_a_whole_number_of_times_where_that_is_the_form(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    model.config.update_rule = "delta"
    batch = {name: torch.stack([row[name] for row in rows(3)]) for name in ("input_ids", "labels")}
    losses = {}
    for form in ("sums", "copies"):
        trainer = make_trainer(repeat_ceiling=1e6, repeat_form=form)
        (drawn,), count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
        weights = drawn["segment_weights"]
        assert weights.is_floating_point() == (form == "sums")
        assert weights.min() == 1 and weights.max() > 1
        losses[form] = trainer.training_step(model.train(), drawn, num_items_in_batch=count)
    assert not torch.equal(losses["sums"], losses["copies"])
    with pytest.raises(ValueError, match="repeat_form is 'power'; choose one of 'sums', 'copies'"):
        make_trainer(repeat_form="power")
    with pytest.raises(ValueError, match=r"repeat_ceiling is 1e\+12, and repeat_form 'copies'"):
        make_trainer(repeat_form="copies", repeat_ceiling=1e12)
    ragged = {name: torch.stack([row[name] for row in rows(2, 43)]) for name in ("input_ids", "labels")}
    with pytest.raises(ValueError, match="inputs of 43 tokens are no whole segments of 8, as copies are"):
        trainer.get_batch_samples(iter([ragged]), 1, torch.device("cpu"))


def test_a_loss_that_is_no_number_stops_the_training(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    trainer = make_trainer()
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="loss is nan at step 0; start anew with a lower"):
        trainer.train()


def test_so_does_that_of_any_batch_of_a_step_before_the_weights_are_touched(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(gradient_accumulation_steps=3)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    losses = iter([1.0, float("inf")] + [1.0] * 9)
    loss_of = trainer._loss_of
    monkeypatch.setattr(trainer, "_loss_of", lambda *batch: loss_of(*batch) + next(losses))
    with pytest.raises(FloatingPointError, match="loss is inf at step 0"):
        trainer.train()
    for name, x in model.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)


class FiveBatches(torch.utils.data.IterableDataset):
    """Of four rows: an epoch ends in the midst of a step of two batches."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return iter(rows(20))


class StopInTheMidst(TrainerCallback):
    """Ends the training after the first of the third step's batches."""

    def on_substep_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        control.should_training_stop = state.global_step == 2


@pytest.mark.parametrize("callbacks", [[], [StopInTheMidst()]], ids=["goes on", "ends"])
def test_so_does_that_of_a_batch_after_which_the_weights_stay(
    make_trainer: Callable[..., InfiniTrainer], monkeypatch: pytest.MonkeyPatch, callbacks: list[Any]
) -> None:
    trainer = make_trainer(gradient_accumulation_steps=2)
    trainer.train_dataset = FiveBatches()
    for each in callbacks:
        trainer.add_callback(each)
    losses = iter([0.0] * 4 + [float("inf")] + [0.0] * 9)
    loss_of = trainer._loss_of
    monkeypatch.setattr(trainer, "_loss_of", lambda *batch: loss_of(*batch) + next(losses))
    with pytest.raises(FloatingPointError, match="loss is inf at step 2"):
        trainer.train()


def test_rows_with_nothing_to_predict_are_not_in_the_mean_of_an_evaluation(
    make_trainer: Callable[..., InfiniTrainer],
) -> None:
    some = rows(3)
    nothing = {name: torch.full_like(x, -100) if name == "labels" else x for name, x in some[0].items()}
    trainer = make_trainer(per_device_eval_batch_size=1)
    expected = trainer.evaluate(some)["eval_loss"]
    assert trainer.evaluate([*some, nothing])["eval_loss"] == pytest.approx(expected)


def test_a_gradient_that_is_no_number_stops_it_before_the_weights_are_touched(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM, tmp_path: Path
) -> None:
    trainer = make_trainer(save_strategy="steps", save_steps=2, max_steps=8)
    hook = model.lm_head.weight.register_hook(
        lambda gradient: gradient * float("inf") if trainer.state.global_step == 3 else gradient
    )
    with pytest.raises(FloatingPointError, match=r"(nan|inf) at step 3; start from .*checkpoint-2"):
        trainer.train()
    hook.remove()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_gates_that_do_not_move_are_spoken_of(
    make_trainer: Callable[..., InfiniTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryWarnings, "patience", 2)
    trainer = make_trainer(gate_learning_rate=1e-6)
    trainer.train()
    assert len([words for words in trainer.warnings.said if "gates have moved by 0.000" in words]) == 1


def test_ordinary_arguments_are_refused(model: LlamaForCausalLM, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match="give InfiniTrainingArguments"):
        InfiniTrainer(model=model, args=args, train_dataset=rows())


def test_a_model_without_segments_is_refused(make_trainer: Callable[..., InfiniTrainer]) -> None:
    plain = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    with pytest.raises(ValueError, match=r"model is a LlamaForCausalLM, which has no segments; give it a m"):
        make_trainer(plain)


def test_the_memorys_part_is_measured_on_the_steps_own_tokens(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    trainer = make_trainer(observe_steps=2, max_steps=4)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "memory_share" in entry]
    assert [entry["step"] for entry in logged] == [1, 3]  # of steps 0 and 2, logged when they are done
    for entry in logged:
        assert 0 < entry["memory_share"] < 1
        gain = entry["loss_memory_off"] - entry["loss_memory_on"]
        assert entry["memory_gain"] == pytest.approx(gain, abs=1e-6)
        assert entry["loss_memory_on"] == pytest.approx(entry["loss"], abs=2e-2)  # after the step, not before
    assert all("tokens_per_second" in entry for entry in trainer.state.log_history[1:4])


def test_checkpointed_segments_train_the_same(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    start = {name: x.clone() for name, x in model.state_dict().items()}
    losses = []
    for settings in ({}, {"checkpoint_segments": 2}, {"checkpoint_segments": 1, "detach_every": 1}):
        model.load_state_dict(start)
        trainer = make_trainer(repeat_ceiling=10.0, **settings)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][0] == pytest.approx(losses[2][0], abs=1e-4)
    assert losses[0] != pytest.approx(losses[2], abs=1e-5)  # the write side is cut off


def test_a_stopped_gradient_trains_otherwise_from_the_same_loss(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    start = {name: x.clone() for name, x in model.state_dict().items()}
    losses = []
    for settings in ({}, {"stop_gradient": True}, {"stop_gradient": True, "checkpoint_segments": 2}):
        model.load_state_dict(start)
        trainer = make_trainer(**settings)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert losses[0][0] == pytest.approx(losses[1][0], abs=1e-4)
    assert losses[0] != pytest.approx(losses[1], abs=1e-5)
    assert losses[1] == pytest.approx(losses[2], abs=1e-4)


def test_inputs_that_are_cut_count_the_tokens_that_are_left(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    trainer = make_trainer(least_segments=2, curriculum_steps=1000)  # at the start two segments and no more
    batch = {name: torch.stack([row[name] for row in rows(3)]) for name in ("input_ids", "labels")}
    (drawn,), count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert count == 3 * (2 * SEGMENT - 1)
    loss = trainer.training_step(model.train(), drawn, num_items_in_batch=count)
    torch.testing.assert_close(loss, model(**drawn, use_cache=False, loss_chunk=64).loss.detach())


def test_inputs_that_are_cut_keep_the_last_tokens_that_are_asked_for(
    make_trainer: Callable[..., InfiniTrainer],
) -> None:
    """As the last window of a document is filled up."""
    trainer = make_trainer(least_segments=2, curriculum_steps=1000)
    ids = torch.arange(40).repeat(2, 1)
    targets = ids.masked_fill(ids >= 19, -100)
    targets[1, 9:] = -100
    (drawn,), count = trainer.get_batch_samples(
        iter([{"input_ids": ids, "shift_labels": targets}]), 1, torch.device("cpu")
    )
    assert drawn["input_ids"].tolist() == [list(range(8, 24))] * 2
    assert count == 19 - 8 + 9 - 8
    labels = torch.full_like(ids, -100).index_fill(1, torch.tensor([16]), 3)  # where token 15 ends a segment
    assert trainer.get_batch_samples(iter([{"input_ids": ids, "labels": labels}]), 1, ids.device)[1] == 2
    nothing = {"input_ids": ids, "shift_labels": torch.full_like(ids, -100)}
    (drawn,), _ = trainer.get_batch_samples(iter([nothing]), 1, torch.device("cpu"))
    assert drawn["input_ids"].shape == (2, 16)


def test_the_curriculum_lengthens_inputs(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    make_trainer(least_segments=1, curriculum_steps=40, max_steps=60).train()
    assert set(lengths[:10]) == {SEGMENT}
    assert set(lengths[10:20]) == {SEGMENT, 2 * SEGMENT}
    assert max(lengths[40:]) == 5 * SEGMENT


def test_adafactor_scales_the_bodys_steps_and_not_the_gates(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    before = gate_logits(model)
    trainer = make_trainer(optim="adafactor", learning_rate=0.01, gate_learning_rate=0.01)
    trainer.train()
    scaled = {group["name"]: group["scale_parameter"] for group in trainer.optimizer.param_groups}
    assert scaled == {"matrices": True, "vectors": True, "gates": False}
    moved = (gate_logits(model) - before).abs()
    assert 0.005 < moved.max() < 0.1  # four steps of at most about the rate, though the gates started at 0


def test_what_the_trainer_would_not_do_is_refused(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    with pytest.raises(ValueError, match="label_smoothing_factor or compute_loss_func is set"):
        make_trainer(label_smoothing_factor=0.1)
    evaluates = {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    with pytest.raises(ValueError, match="gate_warmup_steps is 5, and lr_scheduler_type"):
        make_trainer(gate_warmup_steps=5, lr_scheduler_type="reduce_lr_on_plateau", **evaluates).train()
    documents = DataCollatorWithFlattening()(rows(2))
    with pytest.raises(ValueError, match="least_segments is 2, and documents are packed"):
        make_trainer(least_segments=2).get_batch_samples(iter([documents]), 1, torch.device("cpu"))
    ragged = {name: torch.stack([row[name] for row in rows(2, 43)]) for name in ("input_ids", "labels")}
    with pytest.raises(ValueError, match="inputs have 43 tokens, which are no whole segments of 8"):
        trainer = make_trainer(carry_memory=True, repeat_ceiling=5.0)
        trainer.get_batch_samples(iter([ragged]), 1, torch.device("cpu"))


def test_a_run_goes_on_only_as_it_was_dealt_out(
    make_trainer: Callable[..., InfiniTrainer], tmp_path: Path
) -> None:
    make_trainer(save_strategy="steps", save_steps=2).train()
    with pytest.raises(ValueError, match=r"per_device_train_batch_size is 2, and .* was saved with 4"):
        make_trainer(per_device_train_batch_size=2, max_steps=8).train(True)


def test_all_checkpoints_are_kept_where_the_limit_is_0(
    make_trainer: Callable[..., InfiniTrainer], tmp_path: Path
) -> None:
    make_trainer(save_strategy="steps", save_steps=1, save_total_limit=0).train()
    assert len(list(tmp_path.glob("checkpoint-*/manifest.json"))) == 4


class Story(torch.utils.data.Dataset):
    """Two rows that go through two documents each, in windows of 16 tokens."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.documents = [
            [torch.randint(0, 64, (length,), generator=generator) for length in lengths]
            for lengths in ((48, 16), (16, 48))
        ]

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, row = divmod(index, 2)
        text = torch.cat(self.documents[row])
        window = text[16 * step : 16 * step + 16]
        starts = 16 * step in (0, len(self.documents[row][0]))
        return {"input_ids": window, "labels": window, "starts_document": torch.tensor(starts)}


def test_a_carried_memory_sees_each_document_whole_and_nothing_else(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    settings = {"carry_memory": True, "per_device_train_batch_size": 2, "learning_rate": 0.0}
    trainer = make_trainer(gate_learning_rate=0.0, **settings)
    trainer.train_dataset = story = Story()
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    losses = torch.zeros(4, 2)
    for row, documents in enumerate(story.documents):
        per_token = []
        for document in documents:
            logits = model(document[None], use_cache=False).logits[0, :-1]
            found = torch.nn.functional.cross_entropy(logits, document[1:], reduction="none")
            per_token.append(torch.cat([torch.zeros(1), found]))
        windows = torch.cat(per_token).view(4, 16)
        losses[:, row] = windows[:, 1:].mean(dim=1)  # a window's first token is not predicted
    assert logged == pytest.approx(losses.mean(dim=1).tolist(), abs=1e-4)


def test_packed_documents_start_with_an_empty_memory(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    lengths = (20, 33, 9, 40)
    features = [
        {name: x[:length] for name, x in row.items()} for row, length in zip(rows(4), lengths, strict=True)
    ]
    batch = DataCollatorWithFlattening()(features)
    trainer = make_trainer(repeat_ceiling=4.0)
    weights: list[Any] = []
    model.register_forward_pre_hook(
        lambda module, args, inputs: weights.append(inputs.get("segment_weights")), with_kwargs=True
    )
    (drawn,), count = trainer.get_batch_samples(iter([batch]), 1, torch.device("cpu"))
    assert count == 98
    loss = trainer.training_step(model.train(), drawn, num_items_in_batch=count)
    assert weights[0].shape == (4, 5)  # a row a document, as many columns as the longest has segments
    singly = sum(
        model(
            input_ids=each["input_ids"][None],
            labels=each["labels"][None],
            segment_weights=weights[0][[number], : -(-len(each["labels"]) // SEGMENT)],
            use_cache=False,
        ).loss
        * (len(each["labels"]) - 1)
        for number, each in enumerate(features)
    )
    torch.testing.assert_close(loss, (singly / 98).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++, which is missing")
def test_compiled_layers_train_as_others_do_and_are_compiled_once(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM
) -> None:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    losses, weights = [], []
    for compiled in (False, True):
        trainer = make_trainer(deepcopy(model), torch_compile=compiled, repeat_ceiling=20.0)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        weights.append(trainer.model.state_dict())
    counters = torch._dynamo.utils.counters
    assert 2 < counters["stats"]["unique_graphs"] <= 6  # of one layer and of what is around the two
    assert not counters["graph_break"]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-3, atol=1e-4)


def test_settings_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for settings, message in (
        ({"repeat_ceiling": 0.5}, "repeat_ceiling is 0.5; give at least 1"),
        ({"curriculum_steps": 9}, "curriculum_steps is 9, and there is nothing to begin with"),
        ({"carry_memory": True, "least_segments": 2}, "carry_memory is set and least_segments is 2"),
        ({"context_parallel_size": 2}, "context_parallel_size is 2, which does not divide the 1 processes"),
        ({"cuda_graphs": True, "detach_every": 2}, "cuda_graphs is set with detach_every"),
        (
            {"cuda_graphs": True, "torch_compile_mode": "reduce-overhead"},
            "cuda_graphs is set with torch_compile_mode reduce-overhead",
        ),
        ({"torch_compile": True, "checkpoint_segments": 2}, "torch_compile is set with checkpoint_segments"),
        ({"torch_compile": True, "repeat_form": "copies"}, "torch_compile is set with repeat_form 'copies'"),
    ):
        with pytest.raises(ValueError, match=message):
            InfiniTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, **settings)


def test_a_captured_step_is_for_one_gpu(model: LlamaForCausalLM, tmp_path: Path) -> None:
    args = InfiniTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True, cuda_graphs=True)
    InfiniTrainer(model=model, args=args, train_dataset=rows())
    args._n_gpu = 2  # what transformers found
    with pytest.raises(ValueError, match=r"sees 2 GPUs.*show it one with CUDA_VISIBLE_DEVICES"):
        InfiniTrainer(model=model, args=args, train_dataset=rows())


@pytest.fixture
def teacher(tmp_path: Path) -> str:
    """A folder with a model that thinks otherwise than the one that learns."""
    torch.manual_seed(5)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(
        LlamaConfig(vocab_size=64, initializer_range=1.0, max_position_embeddings=24, **sizes)
    ).save_pretrained(tmp_path / "teacher")
    return str(tmp_path / "teacher")


def test_a_teachers_predictions_are_learnt(
    make_trainer: Callable[..., InfiniTrainer], model: LlamaForCausalLM, teacher: str
) -> None:
    start = deepcopy(model.state_dict())
    ids = torch.stack([row["input_ids"] for row in rows(4)])
    with torch.no_grad():
        taught = load_model(teacher)(ids[:, :24]).logits.log_softmax(-1)

    def divergence(**settings: Any) -> float:
        model.load_state_dict(start)
        make_trainer(max_steps=20, learning_rate=1e-2, **settings).train()
        with torch.no_grad():
            ours = model.eval()(ids, use_cache=False).logits[:, :24].log_softmax(-1)
        return float(F.kl_div(ours, taught, reduction="sum", log_target=True))

    assert divergence(teacher=teacher, teacher_weight=5.0) < 0.8 * divergence()


def test_a_teacher_reads_in_the_precision_of_the_training(
    make_trainer: Callable[..., InfiniTrainer], teacher: str
) -> None:
    for bf16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        trainer = make_trainer(teacher=teacher, bf16=bf16)
        assert trainer._teacher is not None
        assert trainer._teacher.teach(torch.arange(8)[None]).hidden_states.dtype == dtype


def test_a_teacher_is_not_in_the_validations_loss(
    make_trainer: Callable[..., InfiniTrainer], teacher: str
) -> None:
    alone, taught = (make_trainer(**each).evaluate() for each in ({}, {"teacher": teacher}))
    assert alone["eval_loss"] == taught["eval_loss"]


def test_a_teacher_that_cannot_teach_is_refused(
    make_trainer: Callable[..., InfiniTrainer], teacher: str, tmp_path: Path
) -> None:
    for settings, message in (
        ({"teacher": teacher, "teacher_tokens": 25}, "teacher_tokens is 25, and teacher .* reads 24 at most"),
        ({"teacher": teacher, "teacher_tokens": 0}, "teacher_tokens is 0; give at least 1"),
        ({"teacher": teacher, "teacher_weight": 0.0}, "teacher_weight is 0.0; give more than 0"),
        ({"teacher_tokens": 4}, "teacher_tokens is 4, and there is no teacher"),
        ({"teacher": teacher, "carry_memory": True}, "reads whole rows from their start"),
        ({"teacher": teacher, "cuda_graphs": True}, "cuda_graphs is set with teacher"),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(**settings)
    other = LlamaForCausalLM(LlamaConfig(vocab_size=65, hidden_size=16, num_attention_heads=2))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="knows 65 tokens, and the model 64"):
        make_trainer(teacher=str(tmp_path / "other"))
