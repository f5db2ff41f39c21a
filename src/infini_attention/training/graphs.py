"""Forward and backward as CUDA graphs: the host launches a step at once, not kernel by kernel."""

import logging
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from infini_attention.ops.options import as_captured

logger = logging.getLogger(__name__)

Step = Callable[[Any], tuple[Tensor, Any]]
MOST_KINDS = 64  # of batches that are captured; a graph holds memory, and takes a few steps' time
WARM_UPS = 3  # steps before a capture, in which kernels are compiled and libraries allocate


class GraphedSteps:
    """Losses and gradients of a model's batches; each kind is captured once, and replayed from then on.

    Batches are of a kind where all is alike but the numbers in tensors on the device: shapes, and what the
    host looks at to plan the step, such as counts in tensors on the CPU. What is captured reads its inputs
    and writes loss and gradients at fixed places. Gradients are added to those that are there, as by any
    backward pass; those that a trainer has dropped (`zero_grad`) are handed out anew.

    Args:
        model: whose parameters get gradients.
        step: from a batch to its loss, and whatever else the step leaves, without looking at any value on
            the device. Batches, and what is left, hold tensors in dicts, lists, tuples and dataclasses.
    """

    def __init__(self, model: nn.Module, step: Step) -> None:
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        self._gradients = [torch.zeros_like(each) for each in self._parameters]
        self._step = step
        self._places = Places()
        self._captures = Captures()
        self._captured: dict[str, Captured] = {}
        self._has_said = False

    def __call__(self, batch: Any) -> tuple[Tensor, Any]:
        """The loss, 0-dim, and what else the step leaves; gradients are in the parameters."""
        if self._parameters[0].grad is not self._gradients[0]:
            self._hand_out()
        kind = repr(mapped(_described, batch))
        if kind not in self._captured and len(self._captured) == MOST_KINDS:
            self._say_that_it_is_enough()
            return self._backward(batch)
        if kind not in self._captured:
            self._captured[kind] = self._capture(batch)
        replay, places, left = self._captured[kind]
        torch._foreach_copy_(places, _for_device(batch), non_blocking=True)
        replay()
        loss, left = mapped(Tensor.clone, left)
        return loss, left

    def _hand_out(self) -> None:
        """Have gradients where replays add to them, with what there is of them already."""
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def _capture(self, batch: Any) -> "Captured":
        places = self._places.like(_for_device(batch))
        torch._foreach_copy_(places, _for_device(batch))  # for the warm-ups
        batch = placed(batch, places)
        gradients = [each.clone() for each in self._gradients]  # to which warm-ups add
        replay, left = self._captures(lambda: self._backward(batch))
        torch._foreach_copy_(self._gradients, gradients)
        return Captured(replay, places, left)

    def _say_that_it_is_enough(self) -> None:
        if not self._has_said:
            logger.warning(
                "steps are of more than %d kinds, and those beyond run uncaptured; give batches that are "
                "more alike, or leave cuda_graphs out",
                MOST_KINDS,
            )
        self._has_said = True

    def _backward(self, batch: Any) -> tuple[Tensor, Any]:
        loss, left = self._step(batch)
        loss.backward()
        return mapped(Tensor.detach, (loss, left))


class Captured(NamedTuple):
    """A step of one kind of batch.

    Attributes:
        replay: has the device do it once more.
        places: what it reads.
        left: the loss, and what else it writes.
    """

    replay: Callable[[], None]
    places: list[Tensor]
    left: tuple[Tensor, Any]


class Captures:
    """Captures what is done on a GPU as CUDA graphs, which share their memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._places = Places()  # outside of the pool: graphs may use the same memory between them

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """How to do it once more, and what it returns, whose tensors are then written anew."""
        random = torch.cuda.get_rng_state()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with as_captured():
            with torch.cuda.stream(aside):
                for _ in range(WARM_UPS):
                    left = run()
            torch.cuda.current_stream().wait_stream(aside)
            places = self._places.like(_for_device(left))
            del left
            torch.cuda.set_rng_state(random)  # draws are the same whenever a kind is met first
            graph = torch.cuda.CUDAGraph()
            # "thread_local": the thread that pins the next batch may go on meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                left = run()
                torch._foreach_copy_(places, _for_device(left))
        return graph.replay, placed(left, places)


class Places:
    """Tensors that stay where they are, the same for all that is of the same shapes."""

    def __init__(self) -> None:
        self._made: dict[Any, list[Tensor]] = {}

    def like(self, tensors: list[Tensor]) -> list[Tensor]:
        """As many, of their shapes and dtypes; what stands there is to be written over."""
        kind = tuple((x.dtype, x.shape) for x in tensors)
        if kind not in self._made:
            self._made[kind] = [torch.empty_like(x) for x in tensors]
        return self._made[kind]


def placed(x: Any, places: list[Tensor]) -> Any:
    """`x` with these in place of its tensors for the device."""
    each = iter(places)
    return mapped(lambda tensor: tensor if _for_host(tensor) else next(each), x)


def mapped(function: Callable[[Tensor], Any], x: Any) -> Any:
    """`x` with `function` of every tensor in its dicts, lists, tuples and dataclasses."""
    if isinstance(x, Tensor):
        return function(x)
    if isinstance(x, dict):
        return {name: mapped(function, each) for name, each in x.items()}
    if isinstance(x, list):
        return [mapped(function, each) for each in x]
    if isinstance(x, tuple):
        parts = (mapped(function, each) for each in x)
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{each.name: mapped(function, getattr(x, each.name)) for each in fields(x)})
    return x


def _for_device(x: Any) -> list[Tensor]:
    """Its tensors, in order, but for those that are the host's."""
    tensors: list[Tensor] = []
    mapped(tensors.append, x)
    return [each for each in tensors if not _for_host(each)]


def _for_host(x: Tensor) -> bool:
    """Whether its numbers are looked at when a step is planned."""
    return x.device.type == "cpu"


def _described(x: Tensor) -> tuple[Any, ...]:
    """What makes a batch one of a kind."""
    return x.dtype, x.tolist() if _for_host(x) else x.shape
