"""Parameter groups: gates move by a learning rate of their own, or they do not move."""

from typing import Any

from torch import nn

from infini_attention.baselines.memorizing import LookupScale
from infini_attention.layers import MemoryGate

OF_A_HEAD = (MemoryGate, LookupScale)  # each parameter is one number a head, and has far to go


def parameter_groups(
    model: nn.Module, *, learning_rate: float, weight_decay: float, gate_learning_rate: float
) -> list[dict[str, Any]]:
    """Groups for an optimiser: matrices, with decay; vectors and biases, without; gates, without, last.

    The factors of a Memorizing Transformer's lookup are with the gates: at the body's rate they hardly move.
    Parameters that need no gradient are left out, and so are empty groups. Every group has a `name`.
    """
    gates = {id(p) for m in model.modules() if isinstance(m, OF_A_HEAD) for p in m.parameters()}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    body = [parameter for parameter in trained if id(parameter) not in gates]
    groups = [
        {
            "name": "matrices",
            "params": [parameter for parameter in body if parameter.dim() > 1],
            "lr": learning_rate,
            "weight_decay": weight_decay,
        },
        {
            "name": "vectors",
            "params": [parameter for parameter in body if parameter.dim() <= 1],
            "lr": learning_rate,
            "weight_decay": 0.0,
        },
        {
            "name": "gates",
            "params": [parameter for parameter in trained if id(parameter) in gates],
            "lr": gate_learning_rate,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]
