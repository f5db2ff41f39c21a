"""The gates open where the task needs them, and only with a learning rate of their own."""

from pathlib import Path
from typing import Any

import pytest

from infini_attention.training.recipe import read_recipe
from infini_attention.training.run import train

RECIPE = Path(__file__).parents[2] / "recipes" / "copy-task.yaml"


def run(folder: Path, gate_init: float, **training: Any) -> dict[str, float]:
    """What the recipe comes to from gates at `gate_init`."""
    training |= {"output_dir": folder, "save_strategy": "no", "observe_steps": 0}
    overrides = [f"--training.{name}={value}" for name, value in training.items()]
    reading = read_recipe(RECIPE, [f"--model.gate_init={gate_init}", *overrides])
    return train(reading.recipe, reading.text)


@pytest.mark.parametrize("gate_init", [0, -3])
def test_the_gates_of_the_copy_task_open(tmp_path: Path, gate_init: float) -> None:
    figures = run(tmp_path, gate_init)
    assert figures["gate_max"] > 0.9
    assert figures["recall"] >= 0.99
    assert figures["recall_memory_off"] < 0.1  # local attention alone is right in one of 16 cases


def test_with_the_bodys_learning_rate_they_stay_where_they_are(tmp_path: Path) -> None:
    body = read_recipe(RECIPE).recipe.training.learning_rate
    from_open, from_shut = (
        run(tmp_path / str(gate_init), gate_init, gate_learning_rate=body) for gate_init in (0, -3)
    )
    assert from_open["gate_max"] < 0.7  # from 0.5
    assert from_shut["gate_max"] < 0.1  # from 0.05
    assert from_shut["recall"] < 0.1
