"""What a training would need: parameters, memory and time, without running it."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.throughput import flops_per_token

EFFICIENCY = 0.35  # of a large matrix product's speed; trainings of this kind reach 0.2 to 0.5
OPTIMIZER_BYTES = {"adafactor": 0.1}  # a parameter, beside Adam's two fp32 moments
PROBE_SECONDS = 0.3  # for which a matrix product is timed
PROBE_SIDE, CPU_PROBE_SIDE = 2048, 512  # without bfloat16's instructions a CPU takes 46 s for the former


@dataclass(frozen=True)
class Estimate:
    """What a training needs, a process; all but the first three are rough.

    Attributes:
        parameters: of the model.
        trained_parameters: those that need a gradient.
        tokens_a_step: of all processes.
        state_gb: weights, gradients and the optimiser's own, in GB.
        activations_gb: what is kept for the backward pass, in GB.
        seconds_a_step: at `EFFICIENCY` of the speed of a matrix product, measured on the device.
    """

    parameters: int
    trained_parameters: int
    tokens_a_step: int
    state_gb: float
    activations_gb: float
    seconds_a_step: float


def estimate(model: Any, args: InfiniTrainingArguments, *, length: int) -> Estimate:
    """Needs of training `model`, which loses its contents, on rows of `length` tokens.

    Nothing is carried from earlier steps here, nor read again, which costs each layer one more projection and
    one more write of its memory.
    Activations are those that autograd keeps of one pass over tensors without contents ("meta"); time is
    counted in operations, at the speed of a matrix product on the device that would be used.
    """
    rows = args.per_device_train_batch_size
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    data_parallel = args.world_size // args.context_parallel_size
    tokens = rows * length * args.gradient_accumulation_steps * data_parallel
    operations = flops_per_token(model, length) * tokens / args.world_size
    state = whole * 4 + trained * (4 + OPTIMIZER_BYTES.get(str(getattr(args.optim, "value", args.optim)), 8))
    kept = _activations(model, args, rows, length // args.context_parallel_size)
    return Estimate(
        parameters=whole,
        trained_parameters=trained,
        tokens_a_step=tokens,
        state_gb=state / 1e9,
        activations_gb=kept / 1e9,
        seconds_a_step=operations / (EFFICIENCY * _matmul_speed(args)),
    )


def _activations(model: Any, args: InfiniTrainingArguments, rows: int, length: int) -> int:
    """Bytes kept by one forward pass, and by the run of segments that is made anew in the backward pass."""
    hollow = model.to("meta").train()
    if args.bf16:
        hollow = hollow.to(torch.bfloat16)
    if args.checkpoint_segments is None:
        return _kept(hollow, rows, length, args)
    run = min(length, args.checkpoint_segments * model.config.segment_length)
    between = _kept(hollow, rows, length, args, checkpoint_segments=args.checkpoint_segments)
    return between + _kept(hollow, rows, run, args)


def _kept(model: Any, rows: int, length: int, args: InfiniTrainingArguments, **settings: Any) -> int:
    ids = torch.zeros(rows, length, dtype=torch.int64, device="meta")
    with _counting(model) as sizes:
        settings |= {"stop_gradient": True} if args.stop_gradient else {}
        model(input_ids=ids, labels=ids, use_cache=False, loss_chunk=args.loss_chunk, **settings)
    return sum(sizes.values())


@contextmanager
def _counting(model: Any) -> Iterator[dict[int, int]]:
    """Collect the storages that autograd keeps, parameters aside: sizes in bytes by identity."""
    own = {id(parameter) for parameter in model.parameters()}
    sizes: dict[int, int] = {}
    alive: list[Tensor] = []  # an identity is one only as long as what it belongs to lives

    def keep(tensor: Tensor) -> Tensor:
        if id(tensor) not in own:
            storage = tensor.untyped_storage()
            sizes[storage._cdata] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield sizes


def _matmul_speed(args: InfiniTrainingArguments) -> float:
    """Operations a second of a matrix product in the training's precision."""
    side = CPU_PROBE_SIDE if args.device.type == "cpu" else PROBE_SIDE
    dtype = torch.bfloat16 if args.bf16 else torch.float32
    x = torch.ones(side, side, dtype=dtype, device=args.device)
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < PROBE_SECONDS or count < 2:
        float((x @ x)[0, 0])  # waits for the device
        count += 1
    return count * 2 * side**3 / (time.perf_counter() - started)
