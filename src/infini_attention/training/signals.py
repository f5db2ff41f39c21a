"""SIGTERM and Ctrl-C end a training after the step that is under way, with a checkpoint."""

import signal
import threading
from collections.abc import Callable
from functools import partial
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState

SIGNALS = (signal.SIGTERM, signal.SIGINT)


def left_to_the_training(loader: DataLoader, under_way: Tensor) -> DataLoader:
    """`loader`, whose workers pass signals over while `under_way`, a shared bool: the training heeds them.

    Those to a whole group reach the workers too. After the training they end workers that still run.
    """
    inner: Any = getattr(loader, "base_dataloader", loader)  # accelerate's wraps the one that has workers
    inner.worker_init_fn = partial(_pass_signals_over, inner.worker_init_fn, under_way)
    return loader


def _pass_signals_over(initialise: Callable[[int], None] | None, under_way: Tensor, worker: int) -> None:
    def hear(number: int, frame: FrameType | None) -> None:
        if not under_way:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in SIGNALS:
        signal.signal(number, hear)
    if initialise is not None:
        initialise(worker)


class StopAtSignal(TrainerCallback):
    """Saves and stops after the step in which any process was asked to end; a second time ends it at once.

    `received` names the signal that did; None where the training was at its end anyway. `under_way` says to
    other processes whether a training is, a 0-dim bool in shared memory.
    """

    def __init__(self, accelerator: Any) -> None:
        self.received: str | None = None
        self.under_way = torch.zeros((), dtype=torch.bool).share_memory_()
        self._heard: str | None = None
        self._accelerator = accelerator
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Listen, where Python lets signals be heard: in the main thread."""
        self.received = self._heard = None
        self.under_way.fill_(True)
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._hear) for number in SIGNALS}

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Save and stop, all processes after the same step."""
        heard = torch.tensor(int(self._heard is not None), device=self._accelerator.device)
        if self._accelerator.num_processes > 1:
            heard = self._accelerator.reduce(heard)
        if heard and state.global_step < state.max_steps:
            self.received = self._heard or signal.SIGTERM.name
            control.should_save = control.should_training_stop = True

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._heard = signal.Signals(number).name
        self._restore()

    def end(self) -> None:
        """The training has ended, well or not: signals mean what they meant before it."""
        self.under_way.fill_(False)
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
