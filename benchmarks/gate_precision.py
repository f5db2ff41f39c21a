"""Do gates move when they are kept in bfloat16? The copy task by gate's start, learning rate and precision.

    python benchmarks/gate_precision.py

Gates are fp32 in this library, whatever the model is in. Here they are also rounded to bfloat16 after every
step, as if the model had been cast to it: Adam then moves a logit by about the learning rate or,
where that is less than half the distance to the next bfloat16 number, not at all.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import environment
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback, set_seed

from infini_attention.models.observe import gate_logits
from infini_attention.training.figures import measured
from infini_attention.training.material import load_material
from infini_attention.training.models import make_model
from infini_attention.training.recipe import read_recipe
from infini_attention.training.trainer import InfiniTrainer

COLUMNS = ("gates", "start", "learning rate", "moved least", "moved most", "greatest gate", "recall")


class Rounded(TrainerCallback):
    """Keeps gates at numbers that bfloat16 has."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        for name, parameter in model.named_parameters():
            if "memory_gate" in name:
                parameter.data.copy_(parameter.data.bfloat16())


def main(
    recipe: Path = Path("recipes/copy-task.yaml"),
    starts: tuple[float, ...] = (0.0, -4.0),
    rates: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03),
) -> None:
    """Train the copy task with each start and rate, gates in fp32 and in bfloat16."""
    torch.set_num_threads(1)
    rows = [
        trained(recipe, start, rate, bf16) for start in starts for rate in rates for bf16 in (False, True)
    ]
    table = Table(title="Gates in fp32 and in bfloat16: the copy task", title_justify="left", box=None)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(str(row[name]) for name in COLUMNS))
    Console(width=110).print(table)
    print(json.dumps({"benchmark": "gate_precision", "rows": rows} | environment("cpu")))


def trained(path: Path, start: float, rate: float, bf16: bool) -> dict[str, Any]:
    """How far gates have moved, in logits, and the part of the questions that are answered right."""
    with TemporaryDirectory() as folder:
        settings = {"output_dir": folder, "gate_learning_rate": rate, "save_strategy": "no"}
        settings |= {"observe_steps": 0, "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True}
        values = [f"--training.{name}={value}" for name, value in settings.items()]
        chosen = read_recipe(path, [*values, f"--model.gate_init={start}"]).recipe
        set_seed(chosen.training.seed)
        material = load_material(chosen)
        model = make_model(chosen.model, material.vocab_size)
        trainer = InfiniTrainer(
            model=model,
            args=chosen.training,
            train_dataset=material.train,
            eval_dataset=material.validation,
            data_collator=material.collator,
        )
        trainer.remove_callback(PrinterCallback)
        if bf16:
            trainer.add_callback(Rounded())
        trainer.train()
        figures, moved = measured(trainer, material), (gate_logits(model) - start).abs()
    return {
        "gates": "bfloat16" if bf16 else "fp32",
        "start": start,
        "learning rate": rate,
        "moved least": round(moved.min().item(), 4),
        "moved most": round(moved.max().item(), 4),
        "greatest gate": figures["gate_max"],
        "recall": figures["recall"],
    }


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
