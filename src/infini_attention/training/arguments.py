"""InfiniTrainingArguments: transformers' arguments, and those of a memory."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from infini_attention.ops.copies import MOST_COPIES
from infini_attention.ops.options import check_choice

REPEAT_FORMS = ("sums", "copies")
WITHOUT_GRAPHS = (None, "default", "max-autotune-no-cudagraphs")  # modes of torch_compile


@dataclass
class InfiniTrainingArguments(TrainingArguments):
    """transformers' arguments, and those of the memory.

    Attributes:
        gate_learning_rate: of the gates; they have no weight decay.
        gate_warmup_steps: linear, of the gates alone; the body's decay follows.
        repeat_ceiling: how often a segment may count at most, drawn anew every step; 1 for never. See
            `segments.repeated_segments`.
        repeat_form: what repeating is under the delta rule: "sums", what a segment adds counts so often and
            what it takes out once; or "copies", it stands there so often in a row, a whole number of times,
            for inputs of whole segments; the fused kernels do not have them. See `ops.copies`.
        repeat_start_step: before it no segment repeats.
        repeat_warmup_steps: from there the ceiling grows from 1, by the same factor every step, over so many.
        least_segments: inputs are cut to a random number of whole segments from here up, the last ones that
            predict something; None for never.
        curriculum_steps: the most segments that are drawn grow from `least_segments` to all over so many
            steps; 0 for all from the first.
        loss_chunk: tokens whose logits exist at once.
        checkpoint_segments: so many segments go through the model at once, and again in the backward pass,
            which keeps only their states between; None keeps every activation.
        detach_every: gradients do not flow through the memory past every so many segments; None for never.
        stop_gradient: what memory is to hold, and what later segments see, teaches each layer's key and
            value projections, and not the layers below, as in Transformer-XL.
        carry_memory: the memory, or what a baseline carries, goes on from step to step, row by row, and
            starts afresh where a row's `starts_document` says so. See `CarriedWindows`, `SplitWindows` and
            `FlowingWindows` of `infini_attention.data.windows`.
        reset_probability: of each row and step, that what is carried starts afresh in the midst of a text:
            then after 1 / reset_probability steps on average. What is carried far is else rarely empty.
        read_again: each layer whose memory is carried first reads again what the step before has read (its
            last run alone, where there are several by `checkpoint_segments` or `detach_every`), if that was
            whole segments that count once: gradients reach the key and value projections through it, and
            nothing older. None for where local attention sees other segments, whose keys nothing else
            teaches across a step.
        context_parallel_size: so many processes share each sequence, a run of whole segments each.
        cuda_graphs: forward and backward of each kind of batch, 64 kinds at most, are captured as a CUDA
            graph once and then replayed, for models that wait for the host; on one GPU, and where what is
            carried is a memory. On a CPU there is nothing to capture, and steps run as ever.
        torch_compile: transformers' own, which here fuses kernels layer by layer, before steps are captured;
            for rows of one length that go through whole, and are whole segments where a memory is carried:
            each number of segments, each way that open segments differ and packed documents would be
            compiled anew.
        ema_decay: at the end the weights are their exponential moving average over some 1 / (1 - ema_decay)
            steps, as are then those that are measured and saved; checkpoints keep both. None for the last
            step's weights. See `training.averaging`.
        teacher: a model, as `load_model` takes it, whose predictions are learnt beside the text: usually the
            base of a retrofit, within its window; None for none. See `training.teaching`.
        teacher_weight: of its divergence from the model, which the training's loss then holds beside the
            cross entropy.
        teacher_tokens: of each row, from its start, that the teacher reads; None for its whole window.
        observe_steps: every so many steps the memory's part in the output and the loss without it are
            measured on the step's own tokens; 0 for never.
    """

    gate_learning_rate: float = field(default=1e-2)
    gate_warmup_steps: int = field(default=0)
    repeat_ceiling: float = field(default=1.0)
    repeat_form: str = field(default="sums")
    repeat_start_step: int = field(default=0)
    repeat_warmup_steps: int = field(default=0)
    least_segments: int | None = field(default=None)
    curriculum_steps: int = field(default=0)
    loss_chunk: int = field(default=2048)
    checkpoint_segments: int | None = field(default=None)
    detach_every: int | None = field(default=None)
    stop_gradient: bool = field(default=False)
    carry_memory: bool = field(default=False)
    reset_probability: float = field(default=0.0)
    read_again: bool | None = field(default=None)
    context_parallel_size: int = field(default=1)
    cuda_graphs: bool = field(default=False)
    ema_decay: float | None = field(default=None)
    teacher: str | None = field(default=None)
    teacher_weight: float = field(default=1.0)
    teacher_tokens: int | None = field(default=None)
    observe_steps: int = field(default=0)

    def __post_init__(self) -> None:
        # transformers refuses bf16, and several processes, on a CPU that it was not told to use.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # for copies to a GPU
        self._check_memory()

    def _check_memory(self) -> None:
        steps = (
            "gate_warmup_steps",
            "repeat_start_step",
            "repeat_warmup_steps",
            "curriculum_steps",
            "observe_steps",
        )
        for name in ("gate_learning_rate", *steps):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 0")
        for name in ("least_segments", "checkpoint_segments", "detach_every", "loss_chunk", "teacher_tokens"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1, or leave it out")
        if not self.repeat_ceiling >= 1:
            raise ValueError(f"repeat_ceiling is {self.repeat_ceiling}; give at least 1, which is never")
        check_choice("repeat_form", self.repeat_form, REPEAT_FORMS)
        if self.repeat_form == "copies" and self.repeat_ceiling > MOST_COPIES:
            raise ValueError(
                f"repeat_ceiling is {self.repeat_ceiling:g}, and repeat_form 'copies' makes at most "
                f"{MOST_COPIES:,} of a segment; lower the ceiling, or choose 'sums'"
            )
        if self.curriculum_steps and self.least_segments is None:
            raise ValueError(
                f"curriculum_steps is {self.curriculum_steps}, and there is nothing to begin with; "
                "set least_segments"
            )
        if self.carry_memory and self.least_segments is not None:
            raise ValueError(
                f"carry_memory is set and least_segments is {self.least_segments}: what is cut off would be "
                "missing from the document; leave one of them out"
            )
        if not 0 <= self.reset_probability < 1:
            raise ValueError(
                f"reset_probability is {self.reset_probability}; give at least 0, which is never, and less "
                "than 1"
            )
        if self.reset_probability and not self.carry_memory:
            raise ValueError(
                f"reset_probability is {self.reset_probability}, and nothing is carried from step to step; "
                "set carry_memory, or leave it out"
            )
        if self.read_again is not None and not self.carry_memory:
            raise ValueError(
                f"read_again is {self.read_again}, and nothing is carried from step to step; set "
                "carry_memory, or leave it out"
            )
        if self.carry_memory and self.ignore_data_skip:
            raise ValueError(
                "carry_memory and ignore_data_skip are set, and rows would go on from a checkpoint's memory "
                "with texts that it is not of; leave the latter out"
            )
        if self.carry_memory and self.dataloader_persistent_workers:
            raise ValueError(
                "carry_memory and dataloader_persistent_workers are set, and workers that live on would deal "
                "rows of all epochs like those of the first; leave the latter out"
            )
        if self.context_parallel_size < 1 or self.world_size % self.context_parallel_size:
            raise ValueError(
                f"context_parallel_size is {self.context_parallel_size}, which does not divide the "
                f"{self.world_size} processes; choose a divisor, or start more processes"
            )
        if self.context_parallel_size > 1:
            self._check_context_parallel()
        if self.torch_compile:
            self._check_compile()
        if self.cuda_graphs:
            self._check_graphs()
        self._check_teacher()
        if self.ema_decay is not None:
            self._check_average()

    def _check_average(self) -> None:
        assert self.ema_decay is not None
        if not 0 < self.ema_decay < 1:
            raise ValueError(
                f"ema_decay is {self.ema_decay}; give a number between 0 and 1, such as 0.999, or leave it "
                "out"
            )
        others = {"fsdp": bool(self.fsdp), "load_best_model_at_end": self.load_best_model_at_end}
        _refuse_beside("ema_decay", others, "deals with the weights in another way")

    def _check_compile(self) -> None:
        others = {
            # What is computed again in the backward pass may be compiled otherwise, and then does not fit.
            "checkpoint_segments": self.checkpoint_segments is not None,
            "repeat_form 'copies'": self.repeat_form == "copies",  # all its doublings would be unrolled
        }
        _refuse_beside("torch_compile", others, "cannot be compiled well")

    def _check_graphs(self) -> None:
        others = {
            "several processes": self.world_size > 1,
            "checkpoint_segments": self.checkpoint_segments is not None,
            "detach_every": self.detach_every is not None,
            "gradient_checkpointing": self.gradient_checkpointing,
            "teacher": self.teacher is not None,
            "fp16": self.fp16,
            # Their own graphs would be captured in ours.
            f"torch_compile_mode {self.torch_compile_mode}": self.torch_compile_mode not in WITHOUT_GRAPHS,
        }
        _refuse_beside("cuda_graphs", others, "a captured step knows nothing of")

    def _check_teacher(self) -> None:
        if not self.teacher_weight > 0:
            raise ValueError(
                f"teacher_weight is {self.teacher_weight}; give more than 0, or leave teacher out"
            )
        if self.teacher is None and self.teacher_tokens is not None:
            raise ValueError(f"teacher_tokens is {self.teacher_tokens}, and there is no teacher; name one")
        if self.teacher is not None and (self.carry_memory or self.context_parallel_size > 1):
            raise ValueError(
                f"teacher is {self.teacher}, which reads whole rows from their start; leave it out, or "
                "carry_memory and context_parallel_size"
            )

    def _check_context_parallel(self) -> None:
        for name in ("carry_memory", "checkpoint_segments", "detach_every"):
            if getattr(self, name):
                raise ValueError(
                    f"context_parallel_size is {self.context_parallel_size}, with which {name} has no "
                    "meaning; leave it out"
                )
        if self.least_segments is not None and self.least_segments < self.context_parallel_size:
            raise ValueError(
                f"least_segments is {self.least_segments}, and {self.context_parallel_size} processes need "
                f"one segment each; set least_segments to at least {self.context_parallel_size}"
            )


def _refuse_beside(setting: str, others: dict[str, bool], why: str) -> None:
    """Raise ValueError where any of the `others`, by name, is given beside the setting."""
    if clashing := [name for name, given in others.items() if given]:
        raise ValueError(f"{setting} is set with {', '.join(clashing)}, which {why}; leave one of them out")
