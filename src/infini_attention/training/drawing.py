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

    Attributes:
        random: what is drawn from, which goes on from a checkpoint.
    """

    def __init__(self, args: InfiniTrainingArguments, config: Any, *, captures: bool, seed: int) -> None:
        self.args, self.config, self.captures = args, config, captures
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, inputs: dict[str, Any], step: int) -> dict[str, Any]:
        """The inputs of the step number `step`, and how they go through the model.

        Raises ValueError for inputs with which that cannot be done.
        """
        inputs = dict(inputs)
        if "starts_document" in inputs:  # here, where no batch of the step is under way yet
            inputs["starts_document"] = self._starts(inputs["starts_document"].cpu())
        repeatable, documents = inputs.pop("repeatable", None), _documents(inputs)
        self._check(inputs, documents)
        if self.captures:  # which cannot look at it
            inputs.pop("attention_mask", None)
        if self.args.least_segments is not None:
            inputs, end = self._some(inputs, step)
            repeatable = None if repeatable is None else repeatable[:, :end]
        if self.args.repeat_ceiling > 1:
            rows, length = inputs["input_ids"].shape
            counts = [length] * rows if documents is None else documents
            inputs["segment_weights"] = self._weights(counts, repeatable, step)
        for name in ("checkpoint_segments", "detach_every"):
            if getattr(self.args, name) is not None:
                inputs[name] = getattr(self.args, name)
        return inputs

    def _starts(self, starts: Tensor) -> Tensor:
        """Which rows start afresh: those whose text does, and some that are drawn."""
        if not self.args.reset_probability:
            return starts
        return starts | (torch.rand(starts.shape, generator=self.random) < self.args.reset_probability)

    def _check(self, inputs: dict[str, Any], documents: list[int] | None) -> None:
        """Raise ValueError for inputs that do not go with the arguments."""
        args, size, length = self.args, self.config.segment_length, inputs["input_ids"].shape[1]
        of_whole = {"repeat_ceiling": args.repeat_ceiling > 1, "cuda_graphs": self.captures}
        for name, needed in of_whole.items():
            if needed and args.carry_memory and length % size:
                raise ValueError(
                    f"inputs have {length} tokens, which are no whole segments of {size}: with a memory that "
                    f"is carried on, {name} needs whole ones; choose a multiple"
                )
        mask = inputs.get("attention_mask")
        if self.captures and mask is not None and not bool(mask.all()):
            raise ValueError(
                "cuda_graphs is set and attention_mask marks padding, which a captured step cannot look at; "
                "fill rows up on the right and leave the mask out, or leave cuda_graphs out"
            )
        alone = {
            f"least_segments is {args.least_segments},": (args.least_segments, "each as long as it is"),
            "cuda_graphs is set": (args.cuda_graphs, "each batch in its own way"),
            "teacher is set": (args.teacher, "which it would read as one"),
        }
        for words, (given, reason) in alone.items():
            if given and documents is not None:
                raise ValueError(f"{words} and documents are packed, {reason}; leave one out")

    def _some(self, inputs: dict[str, Any], step: int) -> tuple[dict[str, Any], int]:
        """So many of the last segments that predict something, and how many there are up to their end."""
        args, size, length = self.args, self.config.segment_length, inputs["input_ids"].shape[1]
        assert args.least_segments is not None
        most = most_segments(length // size, args.least_segments, args.curriculum_steps, step)
        count = some_segments(most * size, size, args.least_segments, generator=self.random)
        targets = shifted(inputs.pop("labels", None), inputs.get("shift_labels"))  # a cut would lose the last
        end = max(count, last_asked(targets, size))  # rows may be filled up after it
        return cut(inputs | {"shift_labels": targets}, slice(end - count, end)), math.ceil(end / size)

    def _weights(self, counts: list[int], repeatable: Tensor | None, step: int) -> Tensor:
        """How often each segment counts, of texts of so many tokens."""
        args, size = self.args, self.config.segment_length
        segments = max(math.ceil(count / size) for count in counts)
        ceiling = risen(args.repeat_ceiling, args.repeat_start_step, args.repeat_warmup_steps, step)
        weights = repeated_segments(len(counts), segments, ceiling, generator=self.random)
        if repeatable is not None:
            weights = weights.to(repeatable.device).where(repeatable[:, -segments:], 1.0)
        if args.repeat_form == "sums" or self.config.update_rule != "delta":
            return weights
        if any(count % size for count in counts):
            raise ValueError(
                f"repeat_form is 'copies', and inputs of {max(counts)} tokens are no whole segments of "
                f"{size}, as copies are; choose a multiple, or repeat_form='sums'"
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
