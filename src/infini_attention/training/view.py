"""TrainingView: what a training shows while it runs."""

import math
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState

from infini_attention.models.observe import Observation, gate_logits, gated_layers

FIGURES = {  # of the trainer's log, in the order in which they are shown: name and format
    "loss": ("loss", "{:.4f}"),
    "loss_memory_on": ("loss with memory", "{:.4f}"),
    "loss_memory_off": ("loss without memory", "{:.4f}"),
    "memory_gain": ("memory's gain", "{:+.4f}"),
    "learning_rate": ("learning rate", "{:.2e}"),
    "gate_learning_rate": ("gates' learning rate", "{:.2e}"),
    "grad_norm": ("gradient norm", "{:.3f}"),
    "gate_min": ("least gate", "{:.4f}"),
    "gate_mean": ("mean gate", "{:.4f}"),
    "gate_max": ("greatest gate", "{:.4f}"),
    "memory_share": ("memory's share", "{:.2%}"),
    "memory_norm": ("norm of M", "{:.4g}"),
    "memory_saturation": ("saturation", "{:.2f}"),
    "tokens_per_second": ("tokens a second", "{:,.0f}"),
    "mfu": ("MFU", "{:.1%}"),
    "epoch": ("epoch", "{:.2f}"),
}
UNSHOWN = ("total_flos",)  # transformers' estimate, which knows no memory
BINS = 10
BAR = 24  # characters of the histogram's longest bar
MOST_CELLS = 32  # of a heat map's row; more heads are drawn in groups
LEAST_CELLS, LEAST_ROWS = 4, 4  # however small the terminal
OTHER_LINES = 13  # of the terminal, beside figures and the heat map's rows; warnings are among them
OTHER_COLUMNS = 56  # beside the heat map's cells, of two columns each
LATEST = 3  # warnings that stay in sight
COLOURS = torch.tensor(  # viridis, from 0 to 1
    [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=torch.float32
)


class TrainingView(TrainerCallback):
    """Shows progress, figures, gates and memories of a training, in place of transformers' displays.

    In a terminal it is one picture that is renewed at every log; elsewhere, as in a file, a line for every
    log. Where several processes train, the first one shows.

    Args:
        observation: gives the latest Observation, or None while there is none.
        said: warnings so far, a list that may grow; see `MemoryWarnings`.
        console: where to show; default standard output.
    """

    def __init__(
        self,
        observation: Callable[[], Observation | None] = lambda: None,
        said: Sequence[str] = (),
        *,
        console: Console | None = None,
    ) -> None:
        self._observation, self._said = observation, said
        self._console = Console() if console is None else console
        self._figures: dict[str, Any] = {}
        self._live: Live | None = None
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("time left"),
            TimeRemainingColumn(),
            console=self._console,
            speed_estimate_period=3600,
        )
        self._task = self._progress.add_task("", total=None)

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Start the display."""
        if not state.is_world_process_zero:
            return
        self._progress.reset(self._task, total=state.max_steps, completed=state.global_step)
        if self._console.is_terminal:
            self._live = Live(self._progress, console=self._console)
            self._live.start()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Show the latest figures."""
        layers = gated_layers(model)
        gates = gate_logits(model).sigmoid() if layers else None  # by every process: some may be sharded
        if logs is None or not state.is_world_process_zero:
            return
        self._figures |= logs
        if self._live is None:
            self._console.print(self._line(state, logs), soft_wrap=True, markup=False, highlight=False)
        else:
            self._live.update(self._picture(gates, layers), refresh=True)

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the last picture standing."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, also where a training ends by an exception."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _line(self, state: TrainerState, logs: dict[str, Any]) -> str:
        parts = [f"step {state.global_step}/{state.max_steps}"]
        parts += [f"{name} {figure}" for name, figure in _shown(logs)]
        if (seconds := self._progress.tasks[0].time_remaining) is not None:
            parts.append(f"time left {timedelta(seconds=round(seconds))}")
        return "  ".join(parts)

    def _picture(self, gates: Tensor | None, layers: list[int]) -> RenderableType:
        warnings = [Text(f"! {words}", style="yellow") for words in self._said[-LATEST:]]
        if gates is None:
            return Group(self._progress, "", _figures(self._figures), "", *warnings)
        top = Table.grid(padding=(0, 6))
        top.add_row(_figures(self._figures), _histogram(gates))
        lines = self._console.height - max(len(self._figures), BINS) - OTHER_LINES
        rows, cells = max(lines, LEAST_ROWS), (self._console.width - OTHER_COLUMNS) // 2
        cells = min(max(cells, LEAST_CELLS), MOST_CELLS)
        heads = _heat_map(gates, layers, self._observation(), rows, cells)
        return Group(self._progress, "", top, "", heads, _legend(), "", *warnings)


def heat(values: Tensor) -> Tensor:
    """Colours (..., 3) uint8 of values from 0 to 1: from dark violet through green to yellow."""
    places = values.clamp(0, 1) * (len(COLOURS) - 1)
    below = places.long().clamp(max=len(COLOURS) - 2)
    return COLOURS[below].lerp(COLOURS[below + 1], (places - below)[..., None]).round().to(torch.uint8)


def _shown(logs: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Names and figures for people: the known ones in their order, then any others."""
    for key in [*FIGURES, *(key for key in logs if key not in FIGURES)]:
        if key in logs and key not in UNSHOWN:
            name, pattern = FIGURES.get(key, (key, "{:.4g}"))
            yield name, logs[key] if isinstance(logs[key], str) else pattern.format(logs[key])


def _figures(logs: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, figure in _shown(logs):
        table.add_row(name, figure)
    return table


def _histogram(gates: Tensor) -> Table:
    counts = torch.histc(gates, BINS, min=0, max=1)
    table = Table.grid(padding=(0, 2))
    table.add_row("gates", f"of {gates.numel()} heads")
    for number, count in enumerate(counts.tolist()):
        name = f"{number / BINS:.1f} to {(number + 1) / BINS:.1f}"
        bar = "█" * math.ceil(BAR * count / max(counts.max().item(), 1))
        table.add_row(name, Text(bar, style=_colour((number + 0.5) / BINS)), f"{count:.0f}")
    return table


def _heat_map(
    gates: Tensor, layers: list[int], observation: Observation | None, rows: int, cells: int
) -> Table:
    """A row a layer and a cell a head, or a few of them where there are more."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("layer", "gates by head", "min", "mean", "max", "share", "norm of M", "saturation"):
        table.add_column(name, justify="left" if name == "gates by head" else "right", no_wrap=True)
    for some in torch.arange(len(layers)).split(math.ceil(len(layers) / rows)):
        first, last, mine = layers[some[0]], layers[some[-1]], gates[some]
        figures = [f"{figure:.3f}" for figure in (mine.min(), mine.mean(), mine.max())]
        table.add_row(
            f"{first}" if first == last else f"{first} to {last}",
            _cells(mine.mean(dim=0), cells),
            *figures,
            *([] if observation is None else _memory(observation, some)),
        )
    return table


def _memory(observation: Observation, layers: Tensor) -> list[str]:
    share, norm, saturation = (
        x[layers].mean() for x in (observation.share, observation.memory_norm, observation.saturation)
    )
    return [f"{share:.1%}", f"{norm:.4g}", f"{saturation:.2f}"]


def _cells(gates: Tensor, most: int) -> Text:
    """A digit a head, or a few heads, on its colour: the tenths of its gate."""
    groups = gates.split(math.ceil(len(gates) / most))
    return Text.assemble(*(_cell(group.mean().item()) for group in groups))


def _cell(gate: float) -> tuple[str, str]:
    ink = "black" if gate > 0.5 else "white"
    return f"{min(int(gate * 10), 9)} ", f"{ink} on {_colour(gate)}"


def _legend() -> Text:
    cells = [_cell((number + 0.5) / BINS) for number in range(BINS)]
    return Text.assemble(*cells, " tenths of a head's output that its gate gives to memory")


def _colour(value: float) -> str:
    red, green, blue = heat(torch.tensor(value)).tolist()
    return f"rgb({red},{green},{blue})"
