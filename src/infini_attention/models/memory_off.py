"""memory_off(): the control of every measurement."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from infini_attention.layers import MemoryGate

SHUT = -1e4  # its sigmoid is exactly 0, in fp32 and in fp64


@contextmanager
def memory_off(model: nn.Module) -> Iterator[None]:
    """Shut every gate of `model`, so that its memories weigh exactly nothing; reopen them afterwards.

    What memory does for a model is the difference that this makes on identical tokens. The memories are
    still written to, so a cache filled meanwhile is as good as any.
    """
    gates = [module.logits for module in model.modules() if isinstance(module, MemoryGate)]
    kept = [gate.detach().clone() for gate in gates]
    with torch.no_grad():
        for gate in gates:
            gate.fill_(SHUT)
    try:
        yield
    finally:
        with torch.no_grad():
            for gate, logits in zip(gates, kept, strict=True):
                gate.copy_(logits)
