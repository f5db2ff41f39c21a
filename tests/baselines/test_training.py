"""Every system learns to use its memory: what is asked was said in an earlier segment only."""

import math
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import LlamaForCausalLM

from infini_attention.baselines import BASELINES
from infini_attention.data.copy_task import CopyTask
from infini_attention.models.loss import IGNORED
from infini_attention.training.parameters import parameter_groups

KEYS, VALUES, SEGMENT, ROWS = 4, 4, 8, 32
SILENCE = KEYS * VALUES + KEYS  # after tokens that tell a key's value, and tokens that ask for it
Batch = dict[str, Tensor]


def small(name: str, vocab_size: int, segment_length: int, **own: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model_class = BASELINES[name][LlamaForCausalLM]
    fields = {**sizes, "vocab_size": vocab_size, "segment_length": segment_length, **own}
    return model_class(model_class.config_class(**fields, num_key_value_heads=2))


def train(model: Any, batches: Iterable[Batch]) -> float:
    """Train on each batch once; returns the mean loss of the last five."""
    rates = {"learning_rate": 3e-3, "gate_learning_rate": 3e-2}
    optimizer = torch.optim.AdamW(
        parameter_groups(model.train(), **rates, weight_decay=0.0), betas=(0.9, 0.95)
    )
    losses = []
    for batch in batches:
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-5:]) / 5


def loss_of(model: Any, batch: Batch) -> Tensor:
    loss: Tensor = model(**batch, use_cache=False, loss_chunk=2048).loss
    return loss


@pytest.mark.parametrize(
    ("name", "segments_back", "steps", "own"),
    [
        ("full", 2, 50, {}),
        ("sliding_window", 1, 50, {"window": 2 * KEYS}),
        ("transformer_xl", 1, 50, {}),
        ("linear_attention", 2, 50, {"feature_map": "exp"}),
        ("recurrent_memory", 1, 90, {"memory_tokens": KEYS}),
    ],
)
def test_the_copy_task_is_learnt(name: str, segments_back: int, steps: int, own: dict[str, Any]) -> None:
    task = CopyTask(ROWS * steps, keys=KEYS, values=VALUES, segments_back=segments_back)
    model = small(name, task.vocab_size, task.segment_length, **own)
    assert train(model, DataLoader(task, batch_size=ROWS)) < math.log(VALUES) / 2


def recall(generator: torch.Generator, *, memory_alone: bool) -> Batch:
    """Rows of three segments: every key's value is told, silence, some are told again and all asked.

    `memory_alone` leaves out the questions that the last segment answers.
    """

    def order() -> Tensor:
        return torch.rand(ROWS, KEYS, generator=generator).argsort(dim=1)

    values = torch.randint(VALUES, (ROWS, KEYS), generator=generator)
    tells, again, asked = torch.arange(KEYS) * VALUES + values, order()[:, : KEYS // 2], order()
    inputs = torch.full((ROWS, 3 * SEGMENT), SILENCE)
    inputs[:, :KEYS] = tells.gather(1, order())
    inputs[:, -SEGMENT : -SEGMENT + KEYS // 2] = tells.gather(1, again)
    inputs[:, -KEYS:] = KEYS * VALUES + asked
    answers = values.gather(1, asked)
    if memory_alone:
        answers = answers.masked_fill((asked[:, :, None] == again[:, None]).any(dim=2), IGNORED)
    labels = torch.full_like(inputs, IGNORED)
    labels[:, -KEYS:] = answers
    return {"input_ids": inputs, "shift_labels": labels}


def test_a_lookup_is_learnt_from_what_is_told_again() -> None:
    """No gradient flows into the memory, so that keys are learnt where the segment's own are looked at."""
    model = small("memorizing", SILENCE + 1, SEGMENT, memory_size=64, neighbors=4, local_cache=False)
    generator = torch.Generator().manual_seed(0)
    train(model, (recall(generator, memory_alone=False) for _ in range(70)))
    with torch.no_grad():
        held_out = [loss_of(model, recall(generator, memory_alone=True)).item() for _ in range(5)]
    assert sum(held_out) / 5 < math.log(VALUES) / 2
