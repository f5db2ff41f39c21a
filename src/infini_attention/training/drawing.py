"""The inputs of a training's steps: what is drawn of them at random, and what cannot be done with them."""

import math
from typing import Any

import torch
from torch import Tensor

from infini_attention.models.inputs import packed_documents
from infini_attention.models.loss import shifted
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.segments import (
    cut,
    last_asked,
    most_segments,
    repeated_segments,
    risen,
    some_segments,
)


class Drawing:
    """Makes batches the inputs of a step: so many segments, each so often, of rows that may start afresh.

    Args:
        args: the training's arguments.
        captures: whether steps are captured, which cannot look at masks.
        seed: of what is drawn.

    Attributes:
        random: what is drawn from, which goes on from a checkpoint.
    """

    def __init__(self, args: InfiniTrainingArguments, *, captures: bool, seed: int) -> None:
        self._args, self._captures = args, captures
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, inputs: dict[str, Any], config: Any, step: int) -> dict[str, Any]:
        """The inputs of a step, and how they go through the model.

        Args:
            inputs: a batch: `input_ids`, (rows, length) int64, and what goes with them. `starts_document`,
                (rows,) bool, says which rows start afresh, to which others are added; `repeatable`, (rows,
                segments) bool, which segments may count more often, and is taken out.
            config: the model's, of its `segment_length` and `update_rule`.
            step: its number.

        Returns:
            The batch, cut short where that is wanted, with `segment_weights`, (rows or packed documents,
            segments), where segments repeat. A captured step's has no `attention_mask`.

        Raises:
            ValueError: inputs with which that cannot be done.
        """
        inputs = dict(inputs)
        if "starts_document" in inputs:  # on a GPU nothing waits: batches are drawn before one is under way
            inputs["starts_document"] = self._starts(inputs["starts_document"].cpu())
        repeatable, documents = inputs.pop("repeatable", None), _documents(inputs)
        self._check(inputs, config.segment_length, documents)
        if self._captures:
            inputs.pop("attention_mask", None)
        if self._args.least_segments is not None:
            inputs, end = self._cut_short(inputs, config.segment_length, step)
            repeatable = None if repeatable is None else repeatable[:, :end]
        if self._args.repeat_ceiling > 1:
            rows, length = inputs["input_ids"].shape
            counts = [length] * rows if documents is None else documents
            inputs["segment_weights"] = self._weights(counts, repeatable, config, step)
        for name in ("checkpoint_segments", "detach_every"):
            if getattr(self._args, name) is not None:
                inputs[name] = getattr(self._args, name)
        return inputs

    def _starts(self, starts: Tensor) -> Tensor:
        """Which rows start afresh: those whose text does, and some that are drawn."""
        if not self._args.reset_probability:
            return starts
        return starts | (torch.rand(starts.shape, generator=self.random) < self._args.reset_probability)

    def _check(self, inputs: dict[str, Any], size: int, documents: list[int] | None) -> None:
        """Raise ValueError for inputs that do not go with the arguments."""
        args, length = self._args, inputs["input_ids"].shape[1]
        needs_whole = {"repeat_ceiling": args.repeat_ceiling > 1, "cuda_graphs": self._captures}
        for name, given in needs_whole.items():
            if given and args.carry_memory and length % size:
                raise ValueError(
                    f"inputs have {length} tokens, which are no whole segments of {size}: with a memory that "
                    f"is carried on, {name} needs whole ones; choose a multiple"
                )
        mask = inputs.get("attention_mask")
        if self._captures and mask is not None and not bool(mask.all()):
            raise ValueError(
                "cuda_graphs is set and attention_mask marks padding, which a captured step cannot look at; "
                "fill rows up on the right and leave the mask out, or leave cuda_graphs out"
            )
        not_packed = (
            (
                args.least_segments is not None,
                f"least_segments is {args.least_segments}",
                "each as long as it is",
            ),
            (args.cuda_graphs, "cuda_graphs is set", "each batch in its own way"),
            (args.teacher is not None, "teacher is set", "which it would read as one"),
        )
        for given, words, reason in not_packed:
            if given and documents is not None:
                raise ValueError(f"{words}, and documents are packed, {reason}; leave one out")

    def _cut_short(self, inputs: dict[str, Any], size: int, step: int) -> tuple[dict[str, Any], int]:
        """The inputs cut to a number of segments that is drawn, and where they end, in segments.

        The last is the last that predicts something, or a later one where there are not as many.
        """
        args, length = self._args, inputs["input_ids"].shape[1]
        assert args.least_segments is not None
        most = most_segments(length // size, args.least_segments, args.curriculum_steps, step)
        tokens = some_segments(most * size, size, args.least_segments, generator=self.random)
        targets = shifted(inputs.pop("labels", None), inputs.get("shift_labels"))  # a cut would lose the last
        end = max(tokens, last_asked(targets, size))  # rows may be filled up after it
        return cut(inputs | {"shift_labels": targets}, slice(end - tokens, end)), math.ceil(end / size)

    def _weights(self, counts: list[int], repeatable: Tensor | None, config: Any, step: int) -> Tensor:
        """How often each segment counts, of texts of so many tokens."""
        args, size = self._args, config.segment_length
        segments = max(math.ceil(count / size) for count in counts)
        ceiling = risen(args.repeat_ceiling, args.repeat_start_step, args.repeat_warmup_steps, step)
        weights = repeated_segments(len(counts), segments, ceiling, generator=self.random)
        if repeatable is not None:
            weights = weights.to(repeatable.device).where(repeatable[:, -segments:], 1.0)
        if args.repeat_form == "sums" or config.update_rule != "delta":
            return weights
        for count in counts:
            if count % size:
                raise ValueError(
                    f"repeat_form is 'copies', and inputs of {count} tokens are no whole segments of {size}, "
                    "as copies are; choose a multiple, or repeat_form='sums'"
                )
        return weights.long()


def _documents(inputs: dict[str, Any]) -> list[int] | None:
    """Lengths of the documents that are packed into this batch; None where rows are what they seem."""
    mask = inputs.get("attention_mask")
    bounds = packed_documents(
        inputs.get("position_ids"),
        cu_seqlens=inputs.get("cu_seq_lens_q"),
        padding_mask=None if mask is None else mask != 0,
        can_pack=len(inputs["input_ids"]) == 1,
    )
    return None if bounds is None else bounds.diff().tolist()
