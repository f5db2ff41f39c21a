"""Training on a GPU: captured and compiled steps do what steps that are launched kernel by kernel do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.models import retrofit
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.graphs import GraphedSteps
from infini_attention.training.models import make_model
from infini_attention.training.recipe import ModelRecipe
from infini_attention.training.trainer import InfiniTrainer

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
SEGMENT, STEPS, ROWS = 16, 12, 4
MEMORIES: list[dict[str, Any]] = [
    {"update_rule": "linear", "feature_map": "elu1"},
    {"update_rule": "delta", "feature_map": "exp", "short_convolution": 4},
]

SIZES: dict[str, dict[str, Any]] = {
    "transformer_xl": {},
    "memorizing": {"neighbors": 4},
    "recurrent_memory": {"memory_tokens": 4},
    "sliding_window": {"window": 16, "sinks": 2},
    "full": {},
}


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Batches of three lengths, most of whose tokens predict nothing."""

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitems__(self, indices: list[int]) -> list[dict[str, torch.Tensor]]:
        return [self._row(index, length=SEGMENT * (2 + indices[0] % 3)) for index in indices]

    def _row(self, index: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(0, 64, (length,), generator=torch.Generator().manual_seed(index))
        labels = ids.where(torch.arange(length) % 5 == index % 5, torch.tensor(-100))
        return {"input_ids": ids, "shift_labels": labels}


class CarriedRows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Two segments a step, four steps a text; rows begin at different ones."""

    rows = ROWS

    def __len__(self) -> int:
        return STEPS * ROWS

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        step, row = divmod(index, ROWS)
        ids = torch.randint(0, 64, (2 * SEGMENT + 1,), generator=torch.Generator().manual_seed(index))
        starts = step == 0 or (step + row) % 4 == 0
        return {"input_ids": ids[:-1], "shift_labels": ids[1:], "starts_document": torch.tensor(starts)}


@pytest.mark.parametrize("local_attention", ["segment", "sliding"])
@pytest.mark.parametrize("memory", MEMORIES, ids=lambda memory: memory["update_rule"])
def test_carried_memories_may_be_compiled_and_captured(
    memory: dict[str, Any], local_attention: str, tmp_path: Path
) -> None:
    system, rows = memory | {"local_attention": local_attention}, CarriedRows()
    other = {"read_again": local_attention == "segment"}  # than is usual

    def run(graphs: bool, **settings: Any) -> torch.Tensor:
        return trained(system, False, graphs, tmp_path, rows, carry_memory=True, **settings)[0]

    expected = run(False, use_cpu=True)
    for graphs in (False, True):
        torch.testing.assert_close(run(graphs), expected, rtol=1e-3, atol=1e-3)
        compiled = run(graphs, torch_compile=True)
        torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(run(True, **other), run(False, **other), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda memory: memory["update_rule"])
@pytest.mark.parametrize("bf16", [False, True])
def test_captured_steps_train_as_others_do(memory: dict[str, Any], bf16: bool, tmp_path: Path) -> None:
    runs = [trained(memory, bf16, graphs, tmp_path) for graphs in (False, True)]
    losses, weights = zip(*runs, strict=True)
    assert len(losses[0]) == STEPS
    tolerance = 2e-2 if bf16 else 1e-4
    torch.testing.assert_close(losses[1], losses[0], rtol=tolerance, atol=tolerance)
    moved = (weights[0] - flat(small(memory))).norm()
    assert (weights[1] - weights[0]).norm() < tolerance * 10 * moved


def test_weights_of_segments_are_read_anew_by_every_replay(tmp_path: Path) -> None:
    (losses, _), (captured, _) = (
        trained(MEMORIES[0], False, graphs, tmp_path, repeat_ceiling=50.0) for graphs in (False, True)
    )
    torch.testing.assert_close(captured, losses, rtol=1e-4, atol=1e-4)


def test_gradients_of_captured_batches_add_up_to_a_step(tmp_path: Path) -> None:
    (losses, _), (captured, _) = (
        trained(MEMORIES[0], False, graphs, tmp_path, gradient_accumulation_steps=3)
        for graphs in (False, True)
    )
    torch.testing.assert_close(captured, losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("memory", MEMORIES, ids=lambda memory: memory["update_rule"])
def test_captured_steps_may_be_compiled(memory: dict[str, Any], tmp_path: Path) -> None:
    expected, _ = trained(memory, False, False, tmp_path, repeat_ceiling=50.0)
    torch._dynamo.utils.counters.clear()
    losses, _ = trained(memory, False, True, tmp_path, repeat_ceiling=50.0, torch_compile=True)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 2
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=1e-3)


def test_what_a_replay_draws_does_not_depend_on_when_it_was_captured() -> None:
    module, batch = torch.nn.Linear(64, 1, bias=False).cuda(), {"x": torch.ones(8, 64, device="cuda")}

    def step(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, None]:
        return module(torch.nn.functional.dropout(inputs["x"])).sum(), None

    steps, losses = GraphedSteps(module, step), []
    for _ in range(2):
        torch.cuda.manual_seed(0)
        losses.append([steps(batch)[0].item() for _ in range(3)])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("baseline", [*SIZES])
def test_captured_steps_train_baselines_as_others_do(baseline: str, tmp_path: Path) -> None:
    memory = {"baseline": baseline}
    (losses, _), (captured, _) = (trained(memory, False, graphs, tmp_path) for graphs in (False, True))
    torch.testing.assert_close(captured, losses, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("baseline", ["transformer_xl", "memorizing", "recurrent_memory"])
def test_carried_baselines_train_as_on_a_cpu(baseline: str, tmp_path: Path) -> None:
    (losses, _), (elsewhere, _) = (
        trained({"baseline": baseline}, False, False, tmp_path, CarriedRows(), carry_memory=True, **settings)
        for settings in ({}, {"use_cpu": True})
    )
    torch.testing.assert_close(elsewhere, losses, rtol=1e-3, atol=1e-3)


def trained(
    memory: dict[str, Any],
    bf16: bool,
    graphs: bool,
    folder: Path,
    rows: torch.utils.data.Dataset[dict[str, torch.Tensor]] | None = None,
    **settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of every step, and all weights after the last."""
    args = InfiniTrainingArguments(
        output_dir=str(folder),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS,
        learning_rate=1e-3,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        bf16=bf16,
        cuda_graphs=graphs,
        **settings,
    )
    trainer = InfiniTrainer(model=small(memory), args=args, train_dataset=rows or Rows())
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return torch.tensor(losses), flat(trainer.model)


def small(memory: dict[str, Any]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    if baseline := memory.get("baseline"):
        recipe = ModelRecipe(baseline=baseline, sizes=sizes | SIZES[baseline], segment_length=SEGMENT)
        return make_model(recipe, 64).train()
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **sizes))
    return retrofit(base, segment_length=SEGMENT, gate_init=0.0, **memory).train()


def flat(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([each.detach().flatten().cpu().float() for each in model.parameters()])
