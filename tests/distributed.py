"""A function on several processes that form a group, as `torchrun` would start them on this machine."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

ROOT = Path(__file__).parents[1]

# Processes are forked from a server that has done nothing but import what is in use of these. A fork of the
# tests' own process would inherit its threads, and beside a GPU could not call backward after it did.
PRELOADED = ("infini_attention", "infini_attention.training", "transformers.trainer", "hypothesis", "pytest")


def run_on(processes: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120) -> list[Any]:
    """What `function(*arguments)` returns on each rank of a gloo group of `processes`, in order of rank.

    The function is one of a module's own, since it is found by name; arguments and results are pickled, so
    tensors among them are detached. Raises the first failure of any rank, with its traceback in the text,
    and TimeoutError when some rank has not ended after `timeout` seconds; no process outlives the call.
    """
    forkserver.set_forkserver_preload([name for name in PRELOADED if name in sys.modules])
    with tempfile.TemporaryDirectory() as folder:
        with mock.patch.object(sys, "path", [str(ROOT), *sys.path]):  # where ranks look for the function
            context = mp.start_processes(
                _rank,
                args=(processes, folder, timeout, function, arguments),
                nprocs=processes,
                join=False,
                start_method="forkserver",
            )
        try:
            _join(context, timeout)
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(Path(folder, str(rank)), weights_only=False) for rank in range(processes)]


def _join(context: mp.ProcessContext, timeout: float) -> None:
    end = time.monotonic() + timeout
    while not context.join(timeout=max(0, end - time.monotonic()), grace_period=1):
        if time.monotonic() >= end:
            alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
            raise TimeoutError(
                f"ranks {alive} have not ended after {timeout} s; do all call each collective?"
            )


def _rank(
    rank: int,
    processes: int,
    folder: str,
    timeout: float,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=processes,
        timeout=timedelta(seconds=timeout / 2),  # so that a collective that waits in vain says where
    )
    torch.save(function(*arguments), Path(folder, str(rank)))
    if dist.is_initialized():
        dist.barrier()  # a rank that left early would take its connections along
        dist.destroy_process_group()
