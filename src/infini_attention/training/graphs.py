"""Forward and backward as CUDA graphs: the host launches a step at once, not kernel by kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from infini_attention.ops.options import as_captured

Inputs = dict[str, Any]
WARM_UPS = 3  # steps before a capture, in which kernels are compiled and libraries allocate


class GraphedSteps:
    """Losses and gradients of a model's batches; each shape is captured once, and replayed from then on.

    Gradients are added to those that are there, as by any backward pass. What is captured reads its inputs
    and writes loss and gradients at fixed places; gradients that a trainer has dropped (`zero_grad`) are
    handed out anew.

    Args:
        model: whose parameters get gradients.
        loss_of: from a batch to its loss, without looking at any value on the host.
    """

    def __init__(self, model: nn.Module, loss_of: Callable[[Inputs], Tensor]) -> None:
        self._parameters = [each for each in model.parameters() if each.requires_grad]
        self._gradients = [torch.zeros_like(each) for each in self._parameters]
        self._loss_of = loss_of
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[Any, tuple[torch.cuda.CUDAGraph, Inputs, Tensor]] = {}

    def __call__(self, inputs: Inputs) -> Tensor:
        """The loss, 0-dim; gradients are in the parameters."""
        if self._parameters[0].grad is not self._gradients[0]:
            self._hand_out()
        shapes = tuple((name, x.shape, x.dtype) for name, x in inputs.items())
        if shapes not in self._captured:
            with as_captured():
                self._captured[shapes] = self._capture(inputs)
        graph, places, loss = self._captured[shapes]
        for name, place in places.items():
            place.copy_(inputs[name], non_blocking=True)
        graph.replay()
        return loss.clone()

    def _hand_out(self) -> None:
        """Have gradients where replays add to them, with what there is of them already."""
        torch._foreach_zero_(self._gradients)
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is not None:
                gradient.copy_(parameter.grad)
            parameter.grad = gradient

    def _capture(self, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, Inputs, Tensor]:
        places = {name: x.clone() for name, x in inputs.items()}
        gradients = [each.clone() for each in self._gradients]  # to which warm-ups add
        random = torch.cuda.get_rng_state()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(WARM_UPS):
                self._step(places)
        torch.cuda.current_stream().wait_stream(aside)
        torch.cuda.set_rng_state(random)  # draws are the same whenever a shape is met first
        torch._foreach_copy_(self._gradients, gradients)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": the thread that pins the next batch may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            loss = self._step(places)
        return graph, places, loss

    def _step(self, places: Inputs) -> Tensor:
        loss = self._loss_of(places)
        loss.backward()
        return loss.detach()
