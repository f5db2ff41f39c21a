"""MemoryBoard: gates and memories in TensorBoard, beside the figures of the log."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback

from infini_attention.models.observe import Observation, gate_logits, gated_layers
from infini_attention.training.view import heat

CELL = 16  # pixels a head, and a layer


class MemoryBoard(TensorBoardCallback):
    """transformers' callback, and at every log a histogram of the gates and heat maps, layers by heads.

    It takes the place of TensorBoardCallback, in the same folder. Heat maps have layer 0 on top and head 0 on
    the left; the strip on the right is their scale, from 0 at the bottom to 1.

    Args:
        observation: gives the latest Observation, or None while there is none.

    Raises:
        RuntimeError: tensorboard is not installed: pip install 'infini-attention[train]'.
    """

    def __init__(self, observation: Callable[[], Observation | None] = lambda: None) -> None:
        super().__init__()
        self._observation = observation

    def on_log(
        self,
        args: Any,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        """Write the log's figures, then the gates' and the memory's pictures."""
        super().on_log(args, state, control, logs=logs, model=model, **kwargs)
        if not gated_layers(model):
            return
        gates = gate_logits(model).sigmoid()  # by every process: sharded gates are gathered
        if logs is None or "loss" not in logs or not state.is_world_process_zero:
            return
        board, step = self.tb_writer, state.global_step
        board.add_histogram("memory/gates", gates, step)
        board.add_image("memory/gates_by_head", heat_map(gates), step)
        if (observation := self._observation()) is not None:
            board.add_image("memory/share_by_head", heat_map(observation.share), step)
        board.flush()


def heat_map(values: Tensor) -> Tensor:
    """A picture (3, height, width) uint8 of values (layers, heads) from 0 to 1, with a scale at its right."""
    rows = len(values) * CELL
    cells = values.repeat_interleave(CELL, dim=0).repeat_interleave(CELL, dim=1)
    scale = torch.linspace(1, 0, rows)[:, None].expand(rows, CELL)
    picture, strip = (heat(x).permute(2, 0, 1) for x in (cells, scale))
    return torch.cat([F.pad(picture, (0, CELL // 2), value=255), strip], dim=2)
