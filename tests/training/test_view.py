import io
import re
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.models import retrofit
from infini_attention.models.observe import Observation
from infini_attention.training.view import TrainingView, heat

LOGS = {
    "loss": 2.4313,
    "learning_rate": 3e-4,
    "gate_learning_rate": 0.01,
    "grad_norm": 1.2345,
    "gate_min": 0.01,
    "gate_mean": 0.3,
    "gate_max": 0.97,
    "memory_share": 0.2134,
    "memory_norm": 4321.0,
    "loss_memory_off": 2.51,
    "memory_gain": 0.081,
    "tokens_per_second": 123456.7,
    "mfu": 0.412,
    "epoch": 0.5,
}


@cache
def make_model(layers: int = 3, heads: int = 2, with_memory: int | None = None) -> Any:
    """`with_memory`: only from this layer on."""
    sizes = {"hidden_size": 2 * heads, "intermediate_size": 2, "num_attention_heads": heads}
    config = LlamaConfig(vocab_size=4, num_hidden_layers=layers, num_key_value_heads=1, **sizes)
    with_memory = None if with_memory is None else list(range(with_memory, layers))
    return retrofit(LlamaForCausalLM(config), segment_length=8, layers=with_memory)


def set_gates(model: Any, shares: list[list[float]]) -> None:
    for layer, row in zip(model.config.infini_layers, shares, strict=True):
        gate = model.model.layers[layer].self_attn.memory_gate
        gate.logits.data = torch.tensor(row).logit()


def observation(layers: int) -> Observation:
    column = torch.arange(layers, dtype=torch.float32)[:, None]
    return Observation(
        gates=column / layers,
        share=0.001 + column / 100,
        memory_norm=100 + column,
        normalizer=column,
        saturation=0.25 + column / 1000,
        loss=2.0,
        loss_memory_off=2.1,
    )


class Shown:
    """A view on a console in memory, and a training that is told what to log."""

    def __init__(self, *, terminal: bool, model: Any = None, width: int = 110, height: int = 50) -> None:
        self.output = io.StringIO()
        self.observation: Observation | None = None
        self.said: list[str] = []
        console = Console(
            file=self.output, force_terminal=terminal, color_system="truecolor", width=width, height=height
        )
        self.view = TrainingView(lambda: self.observation, self.said, console=console)
        self.model = make_model() if model is None else model
        self.state = SimpleNamespace(global_step=0, max_steps=20, is_world_process_zero=True)

    def begin(self) -> None:
        self.view.on_train_begin(None, self.state, None)

    def log(self, logs: dict[str, Any], *, step: int = 5) -> None:
        self.state.global_step = step
        self.view.on_step_end(None, self.state, None)
        self.view.on_log(None, self.state, None, model=self.model, logs=logs)

    def end(self) -> str:
        """All that was printed, without its colours and movements."""
        self.view.on_train_end(None, self.state, None)
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.output.getvalue())


def last_picture(text: str) -> list[str]:
    """The lines that stand in the terminal in the end."""
    lines = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
    start = max(number for number, line in enumerate(lines) if line.startswith("step "))
    return lines[start:]


def test_without_a_terminal_there_is_a_plain_line_a_log() -> None:
    shown = Shown(terminal=False, width=40)
    shown.begin()
    shown.log(LOGS)
    shown.log({"loss": 2.25, "total_flos": 1e15}, step=10)
    shown.log({"eval_loss": 2.123456}, step=10)
    first, second, third = (re.sub(r"  time left .*", "", line.rstrip()) for line in shown.end().splitlines())
    assert first == (
        "step 5/20  loss 2.4313  loss without memory 2.5100  memory's gain +0.0810  learning rate 3.00e-04  "
        "gates' learning rate 1.00e-02  gradient norm 1.234  least gate 0.0100  mean gate 0.3000  "
        "greatest gate 0.9700  memory's share 21.34%  norm of M 4321  tokens a second 123,457  MFU 41.2%  "
        "epoch 0.50"
    )
    assert (second, third) == ("step 10/20  loss 2.2500", "step 10/20  eval_loss 2.123")
    assert "\x1b" not in shown.output.getvalue()


def test_the_time_left_is_that_of_steps_so_far() -> None:
    shown = Shown(terminal=False)
    now = 0.0
    shown.view._progress.get_time = lambda: now
    shown.begin()
    for step in range(1, 6):
        now = 60.0 * step
        shown.log({"loss": 1.0}, step=step)
    assert shown.end().splitlines()[-1] == "step 5/20  loss 1.0000  time left 0:15:00"


def test_a_terminal_shows_figures_gates_memories_and_warnings() -> None:
    shown = Shown(terminal=True)
    set_gates(shown.model, [[0.05, 0.15], [0.55, 0.45], [0.95, 0.99]])
    shown.begin()
    shown.log({"loss": 9.0})
    shown.observation = observation(3)
    shown.said += ["first words", "second words", "third words", "fourth [words]"]
    shown.log(LOGS, step=10)
    picture = last_picture(shown.end())
    text = "\n".join(picture)
    assert picture[0].startswith("step 10/20")
    assert re.search(r"^loss +2\.4313 ", text, re.M)
    assert re.search(r"^MFU +41\.2%", text, re.M)
    assert re.search(r"of 6 heads$", text, re.M)
    assert re.findall(r"\d\.\d to \d\.\d +█* +(\d)$", text, re.M) == list("1100110002")
    rows = [line.split() for line in picture if re.match(r" +\d \d \d +\d\.", line)]
    assert rows == [
        ["0", "0", "1", "0.050", "0.100", "0.150", "0.1%", "100", "0.25"],
        ["1", "5", "4", "0.450", "0.500", "0.550", "1.1%", "101", "0.25"],
        ["2", "9", "9", "0.950", "0.970", "0.990", "2.1%", "102", "0.25"],
    ]
    assert picture[-3:] == ["! second words", "! third words", "! fourth [words]"]


def test_the_heat_map_has_the_colours_of_its_gates() -> None:
    shown = Shown(terminal=True)
    set_gates(shown.model, [[0.001, 0.25], [0.5, 0.75], [0.9, 0.999]])
    shown.begin()
    shown.log({"loss": 1.0})
    shown.end()
    for share, digit in ((0.001, 0), (0.25, 2), (0.75, 7), (0.999, 9)):
        red, green, blue = heat(torch.tensor(share)).tolist()
        assert f"48;2;{red};{green};{blue}m{digit} " in shown.output.getvalue()


def test_layers_have_their_own_numbers_where_some_have_no_memory() -> None:
    shown = Shown(terminal=True, model=make_model(layers=6, with_memory=3))
    shown.begin()
    shown.log({"loss": 1.0})
    picture = "\n".join(last_picture(shown.end()))
    assert re.findall(r"^ +(\d) \d \d  ", picture, re.M) == ["3", "4", "5"]


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (5, 100), (100, 8), (100, 64)])
@pytest.mark.parametrize(("width", "height"), [(80, 24), (110, 50), (200, 200)])
def test_any_number_of_layers_and_heads_fits(layers: int, heads: int, width: int, height: int) -> None:
    shown = Shown(terminal=True, model=make_model(layers, heads), width=width, height=height)
    shown.observation = observation(layers)
    shown.begin()
    shown.log(LOGS)
    picture = last_picture(shown.end())
    rows = [line for line in picture if re.search(r"\d\.\d%  ", line) and not line.startswith("MFU")]
    labels = [re.match(r" *(\d+)(?: to (\d+))? ", row) for row in rows]
    assert all(labels)
    spans = [(int(first), int(last or first)) for first, last in (label.groups() for label in labels)]
    assert [n for first, last in spans for n in range(first, last + 1)] == list(range(layers))
    assert max(map(len, picture)) <= width
    if height >= 50:
        assert len(picture) <= height


def test_the_first_process_alone_shows() -> None:
    shown = Shown(terminal=True)
    shown.state.is_world_process_zero = False
    shown.begin()
    shown.log(LOGS)
    assert shown.end() == ""


def test_the_terminal_is_given_back_where_a_training_breaks() -> None:
    shown = Shown(terminal=True)
    shown.begin()
    assert "\x1b[?25l" in shown.output.getvalue()  # the cursor is hidden
    shown.view.close()
    assert shown.output.getvalue().rstrip().endswith("\x1b[?25h")
    shown.view.close()


def test_colours_go_from_dark_to_bright() -> None:
    colours = heat(torch.tensor([-1.0, 0.0, 0.125, 1.0, 2.0]))
    assert colours.tolist() == [
        [68, 1, 84],
        [68, 1, 84],
        [64, 42, 112],
        [253, 231, 37],
        [253, 231, 37],
    ]
