"""Models with a memory in other people's hands: transformers' Trainer, TRL, adapters of PEFT, accelerate."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
)

from infini_attention.models import retrofit
from infini_attention.training.parameters import parameter_groups
from infini_attention.training.trainer import InfiniTrainer, InfiniTrainingArguments, gate_logits

SEGMENT = 8
TEXTS = [
    "It was a dark and stormy night; the rain fell in torrents",
    "Call me Ishmael",
    "It is a truth universally acknowledged, that a single man",
    "All happy families are alike",
]
PADDED: dict[str, Any] = {"packing": False}
PACKED: dict[str, Any] = {"packing": True, "max_length": 64}
PADDING_FREE: dict[str, Any] = {"packing": False, "padding_free": True, "max_length": None}

MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def model() -> LlamaForCausalLM:
    """Its gates start at 0, where no weight decay moves them: one that is not 0 was moved by its gradient."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    config = LlamaConfig(vocab_size=258, num_key_value_heads=2, initializer_range=0.2, **sizes, **special)
    return retrofit(LlamaForCausalLM(config), segment_length=SEGMENT, gate_init=0.0).train()


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a byte, one for padding, one for the end."""
    symbols = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>")


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """What every trainer here is given: six steps, each on everything there is."""
    steps = {"per_device_train_batch_size": 4, "max_steps": 6, "learning_rate": 1e-2, "logging_steps": 1}
    quiet = {"report_to": "none", "save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    return {"output_dir": str(tmp_path), **steps, **quiet}


@pytest.fixture
def make_sft(
    model: LlamaForCausalLM, settings: dict[str, Any], tokenizer: PreTrainedTokenizerFast
) -> MakeTrainer:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")

    def make(config: dict[str, Any], **arguments: Any) -> Trainer:
        arguments |= {"train_dataset": datasets.Dataset.from_dict({"text": TEXTS})}
        args = trl.SFTConfig(**settings | config)
        return trl.SFTTrainer(model=model, args=args, processing_class=tokenizer, **arguments)

    return make


@pytest.fixture
def adapter() -> Any:
    peft = pytest.importorskip("peft")
    return peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["memory_gate"], r=2)


def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(3, 258, (4, 40), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def losses_apart_and_together(
    model: LlamaForCausalLM, batch: dict[str, Any], lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean losses a token: of the packed documents run one by one, and of all of them run as if one."""
    documents = batch["input_ids"].split(list(lengths), dim=1)
    sums = [model(ids, labels=ids).loss * (ids.shape[1] - 1) for ids in documents]
    together = model(batch["input_ids"], labels=batch["labels"]).loss
    return sum(sums) / (sum(lengths) - len(lengths)), together


def test_transformers_trainer_moves_the_gates_and_saves_them(
    model: LlamaForCausalLM, settings: dict[str, Any], tmp_path: Path
) -> None:
    trainer = Trainer(model=model, args=TrainingArguments(**settings), train_dataset=rows())
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    assert (gate_logits(model) != 0).all()
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(gate_logits(again), gate_logits(model))


def test_transformers_trainer_weighs_every_token_of_an_accumulated_step_alike(
    model: LlamaForCausalLM, settings: dict[str, Any]
) -> None:
    uneven = rows()
    uneven[0]["labels"] = uneven[0]["labels"].masked_fill(torch.arange(40) < 30, -100)
    start = {name: x.clone() for name, x in model.state_dict().items()}
    settings |= {"max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    ended = []
    for size in (4, 1):
        model.load_state_dict(start)
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        Trainer(model=model, args=TrainingArguments(**settings | sizes), train_dataset=uneven).train()
        ended.append({name: x.clone() for name, x in model.state_dict().items()})
    for name in start:
        torch.testing.assert_close(ended[0][name], ended[1][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("boundaries", [True, False], ids=["by boundaries", "by positions"])
def test_documents_flattened_by_transformers_stay_apart(model: LlamaForCausalLM, boundaries: bool) -> None:
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=boundaries)
    lengths = [30, 25, 20]
    batch = collate([{"input_ids": ids.tolist()} for ids in torch.arange(3, 78).split(lengths)])
    assert ("cu_seq_lens_q" in batch) == boundaries
    apart, together = losses_apart_and_together(model, batch, lengths)
    torch.testing.assert_close(model(**batch).loss, apart)
    assert (together - apart).abs() > 1e-3


@pytest.mark.parametrize("config", [PADDED, PACKED, PADDING_FREE], ids=["padded", "packed", "padding-free"])
def test_trl_lowers_the_loss_and_moves_the_gates(
    make_sft: MakeTrainer, model: LlamaForCausalLM, config: dict[str, Any]
) -> None:
    trainer = make_sft(config)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0] - 0.5
    assert (gate_logits(model) != 0).all()


def test_documents_packed_by_trl_stay_apart(
    make_sft: MakeTrainer, model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_sft(PACKED)
    batch = next(iter(trainer.get_train_dataloader()))
    seen: dict[str, Any] = {}
    forward = type(model.model).forward

    def spy(self: Any, **inputs: Any) -> Any:
        seen.update(inputs)
        return forward(self, **inputs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "forward", spy)
        loss = trainer.compute_loss(model, dict(batch))
    lengths = seen["cu_seq_lens_q"].diff().tolist()
    assert sorted(lengths) == sorted(len(text) + 1 for text in TEXTS)
    assert seen["position_ids"].tolist() == [[i for length in lengths for i in range(length)]]
    assert "attention_mask" not in seen
    apart, together = losses_apart_and_together(model, batch, lengths)
    torch.testing.assert_close(loss, apart)
    assert (together - apart).abs() > 1e-3


def test_trl_finds_the_same_loss_with_padding_and_without(
    make_sft: MakeTrainer, model: LlamaForCausalLM
) -> None:
    found = []
    for config in (PADDED, PADDING_FREE):
        trainer = make_sft(config)
        batch = next(iter(trainer.get_train_dataloader()))
        assert ("attention_mask" in batch) == (config is PADDED)
        found.append(trainer.compute_loss(model, dict(batch)))
    torch.testing.assert_close(*found)


def test_trl_takes_the_gates_as_a_group_of_their_own(make_sft: MakeTrainer, model: LlamaForCausalLM) -> None:
    groups = parameter_groups(model, learning_rate=0.0, weight_decay=0.0, gate_learning_rate=0.05)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    make_sft(PADDED, optimizers=(torch.optim.AdamW(groups), None)).train()
    moved = {name for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {name for name in before if "memory_gate" in name}


def test_trl_trains_an_adapter_and_its_gates(make_sft: MakeTrainer, adapter: Any) -> None:
    trainer = make_sft(PACKED, peft_config=adapter)
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    assert (gate_logits(trainer.model.merge_and_unload()) != 0).all()


def test_an_adapter_in_our_trainer_has_gates_that_are_its_own(
    model: LlamaForCausalLM, settings: dict[str, Any], adapter: Any, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.stack([row["input_ids"] for row in rows()])
    untrained = model(ids).logits
    adapted = peft.get_peft_model(model, adapter)
    args = InfiniTrainingArguments(**settings, gate_learning_rate=0.05)
    trainer = InfiniTrainer(model=adapted, args=args, train_dataset=rows())
    trainer.train()

    gates = {name: p for name, p in adapted.named_parameters() if "memory_gate.modules_to_save" in name}
    (group,) = (group for group in trainer.optimizer.param_groups if group["name"] == "gates")
    assert {id(p) for p in group["params"]} == {id(p) for p in gates.values()} and len(gates) == 2
    with adapted.disable_adapter():
        assert torch.equal(adapted(ids).logits, untrained)

    trainer.save_model(str(tmp_path / "adapter"))
    trained = adapted(ids).logits
    merged = adapted.merge_and_unload()
    assert torch.equal(gate_logits(merged), torch.stack(list(gates.values())))
    torch.testing.assert_close(merged(ids).logits, trained)


def test_accelerate_trains_in_bf16_and_its_gates_stay_in_fp32(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerate = pytest.importorskip("accelerate")
    # There is one state a process, and trainers leave theirs.
    monkeypatch.setattr(accelerate.state.AcceleratorState, "_shared_state", {})
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision="bf16")
    loader = torch.utils.data.DataLoader(rows(), batch_size=4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    prepared, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    found = []
    for _ in range(6):
        for batch in loader:
            loss = prepared(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
    assert found[-1] < found[0] - 0.5
    gates = [p for name, p in model.named_parameters() if "memory_gate" in name]
    assert all(gate.dtype == torch.float32 and (gate != 0).all() for gate in gates)
