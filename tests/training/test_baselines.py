"""Baselines in training: those without gates show none, and costs are counted as they are."""

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from infini_attention.baselines import BASELINES
from infini_attention.models.observe import gate_logits, gated_layers
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.throughput import flops_per_token
from infini_attention.training.trainer import InfiniTrainer
from infini_attention.training.view import TrainingView

from ..baselines.cases import make_baseline

WIDTH, HEADS, LAYERS = 8, 4, 2
MATRICES = 6 * (LAYERS * (4 * 32 * 32 + 3 * 32 * 48) + 64 * 32)


def make(name: str) -> Any:
    window = {"window": 6} if name == "sliding_window" else {}
    return make_baseline(name, num_hidden_layers=LAYERS, num_key_value_heads=HEADS, **window)


def trainer(model: Any, folder: Path, **settings: Any) -> InfiniTrainer:
    fixed = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "report_to": "none"}
    fixed |= {"save_strategy": "no", "use_cpu": True, "disable_tqdm": True}
    ids = torch.randint(0, 64, (8, 40), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    args = InfiniTrainingArguments(output_dir=str(folder), **fixed | settings)
    return InfiniTrainer(model=model, args=args, train_dataset=rows)


@pytest.mark.parametrize("name", BASELINES)
def test_gates_are_logged_where_there_are_any(name: str, tmp_path: Path) -> None:
    model = make(name)
    training = trainer(model, tmp_path)
    training.train()
    logged = [entry for entry in training.state.log_history if "loss" in entry]
    assert len(logged) == 2
    gated = name == "memorizing"
    assert all(("gate_max" in entry) == ("gate_learning_rate" in entry) == gated for entry in logged)
    assert training.warnings.said == []
    assert gated_layers(model) == ([0] if gated else [])
    if not gated:
        with pytest.raises(ValueError, match=r"Llama.* has no memories; give an infini"):
            gate_logits(model)


@pytest.mark.parametrize(("name", "gated"), [("transformer_xl", False), ("memorizing", True)])
def test_the_picture_has_gates_where_there_are_any(name: str, gated: bool) -> None:
    output = io.StringIO()
    terminal = {"force_terminal": True, "color_system": "truecolor", "width": 110, "height": 50}
    view = TrainingView(console=Console(file=output, **terminal))
    state = SimpleNamespace(global_step=5, max_steps=20, is_world_process_zero=True)
    view.on_train_begin(None, state, None)
    view.on_log(None, state, None, model=make(name), logs={"loss": 2.5})
    view.on_train_end(None, state, None)
    assert "2.5" in output.getvalue()
    assert ("gates by head" in output.getvalue()) == gated


def test_tensorboard_gets_the_figures_of_a_model_without_gates(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from infini_attention.training.tensorboard import MemoryBoard

    training = trainer(make("transformer_xl"), tmp_path)
    training.add_callback(MemoryBoard())
    training.train()
    (file,) = tmp_path.rglob("events.out.tfevents.*")
    read = EventAccumulator(str(file.parent)).Reload()
    assert "train/loss" in read.Tags()["scalars"] and not read.Tags()["histograms"]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"repeat_ceiling": 10.0}, "segment_weights is set"),
        ({"observe_steps": 1}, "TransformerXLLlamaForCausalLM has no memories"),
    ],
    ids=str,
)
def test_what_has_no_meaning_for_a_baseline_is_refused(
    settings: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=words):
        trainer(make("transformer_xl"), tmp_path, **settings).train()


def test_operations_are_those_counted_by_hand() -> None:
    """Of 24 tokens in three segments; 4 d for a key and its value, three times forward."""
    unit = 3 * HEADS * 4 * WIDTH
    keys = {
        "full": LAYERS * 12,
        "sliding_window": LAYERS * (6 * 3 + 18 * 5.5) / 24,
        "transformer_xl": LAYERS * (4 + (0 + 8 + 8) / 3),
        "linear_attention": LAYERS * (12 + WIDTH),
        "recurrent_memory": LAYERS * (4 + 3),
        # One layer also finds three pairs, and compares queries with 8 and 16 keys without their values.
        "memorizing": LAYERS * (4 + (0 + 8 + 8) / 3) + (0 + 3 + 3) / 3 + (0 + 8 + 16) / 3 / 2,
    }
    for name, seen in keys.items():
        assert flops_per_token(make(name), 24) == pytest.approx(MATRICES + unit * seen)
