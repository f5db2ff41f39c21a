"""Functions that are opaque to `torch.compile` and cost nothing when it is not there."""

from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class operator(Generic[P, R]):
    """Decorator: a function registered as a custom op, `infini_attention::<its name>`.

    Under `torch.compile` a call is that op, whose fake says what comes out. An eager call goes to the
    function itself: an op's dispatch takes longer than its kernels do on short inputs.
    """

    def __init__(self, function: Callable[P, R]) -> None:
        self.function = function
        self.op = torch.library.custom_op(f"infini_attention::{function.__name__}", function, mutates_args=())

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """The function's result."""
        call: Callable[P, R] = self.op if torch.compiler.is_compiling() else self.function
        return call(*args, **kwargs)

    def register_fake(self, fake: Callable[P, R]) -> Callable[P, R]:
        """Decorator: `fake` makes outputs of the right shapes and dtypes without computing them."""
        self.op.register_fake(fake)
        return fake
