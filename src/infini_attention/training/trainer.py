"""InfiniTrainer: transformers' Trainer, with what a memory needs."""

import json
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import TorchDynamoPlugin
from torch import Tensor
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, EvalLoopOutput, TrainOutput

from infini_attention.models.adapters import is_adapted, save_config
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.loss import predicted
from infini_attention.models.observe import Observation, gate_logits, gated_layers, observe
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.averaging import AveragedWeights
from infini_attention.training.carrying import CarriedMemory, empty_cache
from infini_attention.training.checkpoints import damage, keep_newest, newest_checkpoint, seal, unseal
from infini_attention.training.context import ContextShare
from infini_attention.training.drawing import Drawing
from infini_attention.training.graphs import GraphedSteps
from infini_attention.training.parameters import parameter_groups
from infini_attention.training.signals import StopAtSignal, left_to_the_training
from infini_attention.training.teaching import Teacher
from infini_attention.training.throughput import Cost, Throughput
from infini_attention.training.warnings import MemoryWarnings

logger = logging.getLogger(__name__)

LAYOUT = "layout.json"  # in a checkpoint: how rows were dealt out
LAYOUT_FIELDS = (
    "world_size",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "context_parallel_size",
)
FOR_TRAINING = ("starts_document", "repeatable")  # columns of a batch that no model's forward takes
BATCH_COLUMNS = ("shift_labels", *FOR_TRAINING)  # of ours, beside the arguments of a model's forward


class InfiniTrainer(Trainer):
    """Trains an `infini_*` language model; takes what transformers' Trainer takes.

    Its args are InfiniTrainingArguments. Gates are a parameter group of their own, the loss is made in
    chunks, segments can repeat, and a memory can be carried from step to step. Checkpoints hold everything
    that a run needs to go on as if it had not been interrupted, and count only when they are whole. A loss
    or a gradient that is no number stops the training with FloatingPointError. SIGTERM and Ctrl-C end it
    after the step, with a checkpoint; `stopped_by` then names the signal.
    """

    args: InfiniTrainingArguments

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        if not isinstance(self.args, InfiniTrainingArguments):
            raise ValueError(f"args are {type(self.args).__name__}; give InfiniTrainingArguments")
        if not hasattr(getattr(self.model, "config", None), "segment_length"):
            raise ValueError(
                f"model is a {type(self.model).__name__}, which has no segments; give it a memory with "
                "infini_attention.models.retrofit, or train it with transformers' own Trainer"
            )
        if self.args.label_smoothing_factor or self.compute_loss_func is not None:
            raise ValueError(
                "label_smoothing_factor or compute_loss_func is set, and the loss is the model's, in chunks; "
                "leave them out"
            )
        if self.args.cuda_graphs and self.args.n_gpu > 1:
            raise ValueError(
                f"cuda_graphs is set and this process sees {self.args.n_gpu} GPUs, of which a captured step "
                "uses one; show it one with CUDA_VISIBLE_DEVICES, or leave cuda_graphs out"
            )
        if self._captures and self.args.carry_memory:
            self._check_carried_graphs()
        if self.args.fsdp and not self.is_fsdp_enabled:
            raise ValueError(
                f"fsdp is set, and accelerate shards no weights of {self.args.world_size} processes on "
                f"{self.args.device.type}; start several with a GPU each, or leave fsdp out"
            )
        self._filters = self.args.logging_nan_inf_filter
        self._set_compilation()
        model: Any = self.model
        self.model_accepts_loss_kwargs = True  # losses are sums over a whole step, accumulation included
        self.label_names, self.can_return_loss = [], True  # evaluate by labels or shift_labels alike
        self._batch = 0  # of the step's that are accumulated, each of which carries rows of its own
        self._losses: list[Tensor] = []  # of batches that nobody has looked at
        self.observation: Observation | None = None
        self._logged: Observation | None = None
        self._observed_at = -1
        self._rates: dict[str | None, float] = {}  # of the last step
        self._context = ContextShare.of(self.args)
        seed = self.args.seed + self._context.number
        self._drawing = Drawing(self.args, captures=self._captures, seed=seed)
        self._carried = self._nothing_carried()
        self._graphs: GraphedSteps | None = None
        self._teacher = Teacher(self.args, model.config.vocab_size) if self.args.teacher else None
        self._throughput = Throughput(self.model, self.args)
        self.cost = Cost(self.args.device)
        self._signals = StopAtSignal(self.accelerator)
        self.warnings = MemoryWarnings(lambda: self.observation)
        for callback in (self._signals, self.warnings):
            self.add_callback(callback)
        self._average = AveragedWeights(model, self.args.ema_decay) if self.args.ema_decay else None
        if self._average is not None:
            self.add_callback(self._average)
        if self.is_fsdp_enabled and self.args.bf16:
            # Weights are gathered as they are and computed with in bf16 by autocast: gates stay fp32.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def _check_carried_graphs(self) -> None:
        """Raise ValueError for a model whose carried steps cannot be captured."""
        empty_cache(self.model)
        if not isinstance(self._config, InfiniConfigMixin):
            raise ValueError(
                f"cuda_graphs and carry_memory are set, and a {type(self._config).__name__} counts on from "
                "step to step, each of which would be captured anew; leave cuda_graphs out"
            )

    def _set_compilation(self) -> None:
        """Have `torch_compile` compile the layer that all layers are, not the model: in much less time.

        Set anew: accelerate would keep the first trainer's where the arguments of several were made before.
        """
        if self.args.torch_compile:
            torch._dynamo.config.optimize_ddp = False  # or it cuts layers at buckets of gradients
        self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(
            backend=self.args.torch_compile_backend,
            mode=self.args.torch_compile_mode,
            use_regional_compilation=True,
        )

    @property
    def stopped_by(self) -> str | None:
        """The name of the signal that ended the training early, if one did."""
        return self._signals.received

    def train(
        self, resume_from_checkpoint: str | bool | None = None, *arguments: Any, **settings: Any
    ) -> TrainOutput:
        """Train; True goes on from the newest good checkpoint in `args.output_dir`.

        Raises ValueError where there is none, or where the one that is named is damaged.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(self._newest())
        elif resume_from_checkpoint and (reason := damage(Path(resume_from_checkpoint))):
            raise ValueError(f"{reason}; go on from another checkpoint")
        self._carried, self._losses, self._observed_at = self._nothing_carried(), [], -1
        self.cost.begin()
        if self._average is not None:
            self._average.forget()
        self.args.logging_nan_inf_filter = False  # `_check_losses` leaves nothing to filter
        try:
            output = super().train(resume_from_checkpoint, *arguments, **settings)
        finally:
            self._signals.end()
            self.args.logging_nan_inf_filter = self._filters
        self._check_losses()  # of batches that no step followed
        if self._average is not None and self.stopped_by is None:
            self._average.take()
        return output

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)
        folder = output_dir or self.args.output_dir
        if folder is not None and is_adapted(self.model):
            save_config(self.model, Path(folder))

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The optimiser that `args.optim` names, over `parameter_groups`.

        Adafactor scales the body's steps by the size of its parameters, as the paper's does (section 8 of
        arXiv 1804.04235), and takes the gates' as they are.
        """
        if self.optimizer is None:
            whole: Any = self.model if model is None else model
            chosen, settings = self.get_optimizer_cls_and_kwargs(self.args, whole)
            groups = parameter_groups(
                whole,
                learning_rate=self.args.learning_rate,
                weight_decay=self.args.weight_decay,
                gate_learning_rate=self.args.gate_learning_rate,
            )
            if "scale_parameter" in settings:
                groups = [group | {"scale_parameter": group["name"] != "gates"} for group in groups]
            self.optimizer = chosen(groups, **settings)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The scheduler that the args name; the gates take its decay after a warm-up of their own."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR):
            warmup = self.args.get_warmup_steps(num_training_steps)
            for number, group in enumerate(scheduler.optimizer.param_groups):
                if group.get("name") == "gates":
                    body = scheduler.lr_lambdas[number]
                    factor = _gates_factor(body, warmup, self.args.gate_warmup_steps)
                    scheduler.lr_lambdas[number] = factor
                    group["lr"] = scheduler.base_lrs[number] * factor(scheduler.last_epoch)
        elif self.args.gate_warmup_steps:
            raise ValueError(
                f"gate_warmup_steps is {self.args.gate_warmup_steps}, and lr_scheduler_type "
                f"{self.args.lr_scheduler_type} leaves no room for it; choose another, such as cosine"
            )
        return scheduler

    def get_train_dataloader(self) -> DataLoader:
        """transformers' own; the processes that share a sequence get the same rows."""
        loader = self._context.shared(super().get_train_dataloader())
        return left_to_the_training(loader, self._signals.under_way)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor | None]:
        """The batches of a step, drawn, and how many tokens all processes predict in it."""
        if 0 < self.state.max_steps <= self.state.global_step:  # what was loaded is the last checkpoint
            self.control.should_training_stop = True
            return [], None
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batch = 0
        if not batches:
            return batches, None
        batches = [self._drawing(batch, self._config, self.state.global_step) for batch in batches]
        count = torch.stack([predicted(batch) for batch in batches]).sum().to(device)
        count = self.accelerator.reduce(count) // self.args.context_parallel_size
        self.cost.count(count)
        return batches, count.clamp(min=1)  # by which is divided, also where rows have come to their end

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device, but for which rows start afresh: that is asked before their layers run."""
        starts = {name: x for name, x in inputs.items() if name == "starts_document"}
        return super()._prepare_inputs({name: x for name, x in inputs.items() if name not in starts}) | starts

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Forward and backward of one drawn batch: shared out, with the memory carried to it."""
        inputs = self._context.share(self._prepare_inputs(inputs), self._segment_length)
        if self.args.carry_memory:
            inputs = self._carried[self._batch].continued(self.model, inputs)
        else:
            inputs.pop("starts_document", None)
        observed = dict(inputs)
        if self.args.carry_memory:
            observed[CACHE_ARGUMENT] = inputs[CACHE_ARGUMENT].copy()  # the step moves its own on
        if self._captures:
            loss = self._graphed_step(model, inputs, num_items_in_batch)
        else:
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._losses.append(loss)
        if self.args.carry_memory:
            self._carried[self._batch].keep(inputs[CACHE_ARGUMENT])
            self._batch += 1
        self._throughput.count(inputs["input_ids"].shape)
        self._rates = {group.get("name"): group["lr"] for group in self._groups}
        if self._observes():
            with self.compute_loss_context_manager():
                seen = observe(self.model, observed)
            self.observation = self._everywhere(seen, int(predicted(inputs)))
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Mean cross entropy a token; of the whole step's tokens where `num_items_in_batch` counts them."""
        inputs = {name: value for name, value in inputs.items() if name not in FOR_TRAINING}
        loss = self._loss_of(model, inputs | {"num_items_in_batch": num_items_in_batch})
        if num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # losses and gradients are averaged over processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def _loss_of(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        if self._teacher is not None and model.training:
            inputs["teaching"] = self._teacher.teach(inputs["input_ids"], inputs.get("attention_mask"))
        settings: dict[str, Any] = {"use_cache": False, "loss_chunk": self.args.loss_chunk}
        settings |= {"stop_gradient": True} if self.args.stop_gradient else {}
        loss: Tensor = model(**inputs, **settings).loss
        return loss

    @property
    def _captures(self) -> bool:
        return self.args.cuda_graphs and self.args.device.type == "cuda"

    def _graphed_step(self, model: Any, inputs: dict[str, Any], count: Tensor | int | None) -> Tensor:
        """Forward and backward of one batch as one graph."""
        if self._graphs is None:
            self._graphs = GraphedSteps(model, partial(self._captured_step, model))
        model.train()
        layers: list[Any] = inputs[CACHE_ARGUMENT].layers if CACHE_ARGUMENT in inputs else []
        carried = [layer.contents() for layer in layers]
        loss, left = self._graphs(inputs | {"num_items_in_batch": count, CACHE_ARGUMENT: carried})
        for layer, contents in zip(layers, left, strict=True):
            layer.fill(contents)
        return loss

    def _captured_step(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """The loss of a batch with the contents of its cache's layers, if it has any, and those after it."""
        cache = empty_cache(model) if batch[CACHE_ARGUMENT] else None
        layers: list[Any] = [] if cache is None else cache.layers
        for layer, contents in zip(layers, batch[CACHE_ARGUMENT], strict=True):
            layer.fill(contents)
        with self.compute_loss_context_manager():  # here, so that what it casts is cast in the graph
            loss = self._loss_of(model, batch | {CACHE_ARGUMENT: cache})
        return loss, [layer.contents() for layer in layers]

    def evaluation_loop(self, *arguments: Any, **settings: Any) -> EvalLoopOutput:
        """As ever: losses that are no number, of batches with nothing to predict, can be filtered out."""
        in_training, self.args.logging_nan_inf_filter = self.args.logging_nan_inf_filter, self._filters
        try:
            return super().evaluation_loop(*arguments, **settings)
        finally:
            self.args.logging_nan_inf_filter = in_training

    def log(self, logs: dict[str, float], *arguments: Any, **settings: Any) -> None:
        """Log, and with every loss what the gates, the memory and the clock say."""
        if "loss" in logs:
            logs |= self._figures()
        super().log(logs, *arguments, **settings)

    def _figures(self) -> dict[str, float]:
        model: Any = self.model
        logs: dict[str, float] = {}
        if gated_layers(model):
            shares = gate_logits(model).sigmoid()
            figures = {"gate_min": shares.min(), "gate_mean": shares.mean(), "gate_max": shares.max()}
            logs = {name: round(value.item(), 4) for name, value in figures.items()}
        if "gates" in self._rates:
            logs["gate_learning_rate"] = self._rates["gates"]
        if self.observation is not None and self.observation is not self._logged:
            self._logged = self.observation
            logs |= _observed(self.observation)
        return logs | self._throughput.figures()

    def _everywhere(self, seen: Observation, tokens: int) -> Observation:
        """The observation with losses of all processes' tokens; of which this one predicted so many."""
        losses = torch.tensor([seen.loss, seen.loss_memory_off, 1.0], device=self.args.device)
        sums = self.accelerator.reduce(losses * tokens if tokens else torch.zeros_like(losses)).tolist()
        return replace(seen, loss=sums[0] / sums[2], loss_memory_off=sums[1] / sums[2]) if sums[2] else seen

    @property
    def _groups(self) -> list[dict[str, Any]]:
        optimizer: Any = self.optimizer
        return [] if optimizer is None else optimizer.param_groups

    def _observes(self) -> bool:
        """Whether this step is one to be looked at: once, however many batches it has."""
        every, step = self.args.observe_steps, self.state.global_step
        due = every > 0 and step % every == 0 and step != self._observed_at
        self._observed_at = step if due else self._observed_at
        return due

    def _nothing_carried(self) -> list[CarriedMemory]:
        again, count = self._reads_again(), self.args.gradient_accumulation_steps
        return [CarriedMemory(read_again=again) for _ in range(count)]

    def _reads_again(self) -> bool:
        """`args.read_again`, or what stands for None; ValueError for a model without a memory."""
        again = self.args.read_again
        if again is not None and not isinstance(self._config, InfiniConfigMixin):
            raise ValueError(
                f"read_again is {again}, and a {type(self._config).__name__} has no memory that could be "
                "read again; leave it out"
            )
        if again is None:
            again = getattr(self._config, "local_attention", "segment") != "segment"
        return again

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        if self.args.carry_memory:
            dataset: Any = self.train_dataset if train_dataset is None else train_dataset
            self._check_rows(getattr(dataset, "rows", None))
            return SequentialSampler(dataset)
        return super()._get_train_sampler(train_dataset)

    def _check_rows(self, rows: int | None) -> None:
        """Raise ValueError where a step would not read one part of each of the dataset's rows."""
        args = self.args
        read = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        if rows is not None and rows != read:
            raise ValueError(
                f"the dataset has {rows} rows, and a step reads {read}: {args.train_batch_size} a batch, "
                f"{args.gradient_accumulation_steps} accumulated, {args.world_size} processes; make it with "
                f"rows={read}"
            )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: Any = self._signature_columns
        columns += [name for name in BATCH_COLUMNS if name not in columns]

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._check_losses()
        # Now, before the optimiser spreads it; the gradient scaler of fp16 leaves such steps out by itself.
        if not math.isfinite(norm) and self.accelerator.scaler is None:
            raise FloatingPointError(f"the gradient's norm is {float(norm)} {self._where()}")
        return norm

    def _check_losses(self) -> None:
        """Raise FloatingPointError for a loss that is no number. Once a step: a look waits for the device."""
        losses, self._losses = self._losses, []
        for loss in torch.stack(losses).tolist() if losses else []:
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss is {loss} {self._where()}")

    def _where(self) -> str:
        """At which step, and what to go on from."""
        good, _ = newest_checkpoint(self._folder)
        remedy = (
            "start anew" if good is None else f"start from the weights of {good}, the last good checkpoint,"
        )
        return f"at step {self.state.global_step}; {remedy} with a lower learning rate"

    def _newest(self) -> Path:
        folder = self._folder
        good, wrong = newest_checkpoint(folder)
        if good is None:
            raise ValueError(
                f"{folder} holds no whole checkpoint; start without resume_from_checkpoint"
                + "".join(f" ({reason})" for reason in wrong)
            )
        for reason in wrong:
            logger.warning("%s; %s is taken", reason, good)
        return good

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """transformers' checkpoint and our own state; whole only once the manifest is there."""
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            unseal(checkpoint)
        with _unlimited(self.args) as limit:
            super()._save_checkpoint(model, trial)
        checkpoint.mkdir(parents=True, exist_ok=True)
        torch.save(self._own_state(), checkpoint / self._own_state_name)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            (checkpoint / LAYOUT).write_text(json.dumps(self._layout()))
            seal(checkpoint)
            if limit is not None and limit > 0:
                best = self.state.best_model_checkpoint
                keep_newest(folder, limit, also=None if best is None else Path(best))
        self.accelerator.wait_for_everyone()

    # Before the first batch is drawn: random states, which transformers loads after it, come too late.
    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._check_layout(Path(checkpoint))
            path = Path(checkpoint) / self._own_state_name
            state = torch.load(path, map_location="cpu", weights_only=True)
            self._drawing.random.set_state(state["random"])
            if self.args.carry_memory:
                for carried, saved in zip(self._carried, state["carried"], strict=True):
                    carried.load(saved, self.args.device)
            self.cost.load(state.get("cost", {}))
            if self._average is not None:
                self._average.load(state["average"])

    def _check_layout(self, checkpoint: Path) -> None:
        """Raise ValueError where rows would not go on as they were dealt out to processes and steps."""
        saved = json.loads((checkpoint / LAYOUT).read_text())
        for name, number in self._layout().items():
            if number != saved[name]:
                raise ValueError(
                    f"{name} is {number}, and {checkpoint} was saved with {saved[name]}; go on with the "
                    "same, or start anew from its weights"
                )

    def _layout(self) -> dict[str, int]:
        return {name: getattr(self.args, name) for name in LAYOUT_FIELDS}

    @property
    def _own_state_name(self) -> str:
        return f"infini_{self.args.process_index}.pt"

    def _own_state(self) -> dict[str, Any]:
        return {
            "random": self._drawing.random.get_state(),
            "carried": [carried.save() for carried in self._carried],
            "cost": self.cost.figures(),
            "average": [] if self._average is None else self._average.save(),
        }

    @property
    def _folder(self) -> Path:
        assert self.args.output_dir is not None
        return Path(self.args.output_dir)

    @property
    def _config(self) -> Any:
        model: Any = self.model
        return model.config

    @property
    def _segment_length(self) -> int:
        return int(self._config.segment_length)


@contextmanager
def _unlimited(args: InfiniTrainingArguments) -> Iterator[int | None]:
    """Keep transformers from deleting old checkpoints before the new one is whole; yields the limit."""
    limit, args.save_total_limit = args.save_total_limit, None
    try:
        yield limit
    finally:
        args.save_total_limit = limit


def _observed(observation: Observation) -> dict[str, float]:
    """The figures of an observation that stand in a log."""
    return {
        "memory_share": observation.share.mean().item(),
        "memory_norm": observation.memory_norm.mean().item(),
        "memory_saturation": observation.saturation.mean().item(),
        "loss_memory_on": observation.loss,
        "loss_memory_off": observation.loss_memory_off,
        "memory_gain": observation.memory_gain,
    }


def _gates_factor(body: Callable[[int], float], warmup: int, own: int) -> Callable[[int], float]:
    def factor(step: int) -> float:
        return min(1.0, (step + 1) / own if own else 1.0) * (body(step) if step >= warmup else 1.0)

    return factor
