"""Training on several processes is training on one: data parallel, sharded, and over segments."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from torch._dynamo.backends.distributed import DDPOptimizer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention import cli
from infini_attention.baselines import BASELINES
from infini_attention.models import retrofit
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.carrying import CarriedMemory
from infini_attention.training.trainer import InfiniTrainer

from ..distributed import run_on

RECIPES = Path(__file__).parents[2] / "recipes"
ROWS, SEGMENT, LENGTH = 4, 8, 44  # a step's rows over all processes; five whole segments and a half
LAYERS_TOO = "over segments, layers checkpointed"
SETTINGS: dict[str, dict[str, Any]] = {
    "data parallel": {},
    "sharded": {
        "fsdp": "full_shard auto_wrap",
        "fsdp_config": {"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"},
    },
    "over segments": {"context_parallel_size": 2},
    LAYERS_TOO: {"context_parallel_size": 2, "gradient_checkpointing": True},
}


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(0, 64, (LENGTH,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % 13] = -100  # rows and processes that predict different numbers of tokens
        return {"input_ids": ids, "labels": labels}


@contextmanager
def sharding_allowed() -> Iterator[None]:
    """Have accelerate shard weights, which it does on devices of other kinds than a CPU alone."""
    prepare_backend = PartialState._prepare_backend

    def prepared(self: PartialState, *arguments: Any, **settings: Any) -> tuple[str, DistributedType]:
        prepare_backend(self, *arguments, **settings)
        return "gloo", DistributedType.MULTI_HPU

    def on_cpu(self: PartialState) -> None:
        self.device = torch.device("cpu")

    with (
        mock.patch.object(PartialState, "_prepare_backend", prepared),
        mock.patch.object(PartialState, "set_device", on_cpu),
    ):
        yield


def train_sharded(folder: str, rule: str, settings: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    with sharding_allowed():
        return train(folder, rule, settings)


def train(folder: str, rule: str, settings: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of a few steps, and the parameters and gates afterwards, whole."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    base = LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **sizes))
    model = retrofit(base, segment_length=SEGMENT, update_rule=rule, gate_init=0.0, short_convolution=3)
    args = InfiniTrainingArguments(
        output_dir=folder,
        max_steps=3,
        logging_steps=1,
        learning_rate=1e-2,
        gate_learning_rate=0.1,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **settings,
    )
    trainer = InfiniTrainer(model=model, args=args, train_dataset=Rows())
    trainer.train()
    assert all(isinstance(x, DTensor) == ("fsdp" in settings) for x in trainer.model.parameters())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    state: dict[str, Any] = trainer.model.state_dict()
    whole = {name: x.full_tensor() if hasattr(x, "full_tensor") else x for name, x in state.items()}
    return losses, {name: x.detach().clone() for name, x in whole.items()}


@pytest.fixture(scope="module", params=["linear", "delta"])
def alone(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any]:
    folder = str(tmp_path_factory.mktemp("alone"))
    settings = {"per_device_train_batch_size": ROWS}
    return request.param, run_on(1, train, folder, request.param, settings)[0]


@pytest.mark.parametrize(
    ("how", "processes"),
    [("data parallel", 2), ("sharded", 2), ("over segments", 2), ("over segments", 4), (LAYERS_TOO, 2)],
)
def test_several_processes_train_as_one_does(
    alone: tuple[str, Any], tmp_path: Path, how: str, processes: int
) -> None:
    rule, (losses, parameters) = alone
    share = processes // SETTINGS[how].get("context_parallel_size", 1)
    settings = {"per_device_train_batch_size": ROWS // share} | SETTINGS[how]
    found = run_on(processes, train_sharded if how == "sharded" else train, str(tmp_path), rule, settings)
    for ours, theirs in found:
        assert ours == pytest.approx(losses, abs=1e-4)
        for name, expected in parameters.items():
            torch.testing.assert_close(theirs[name], expected, rtol=1e-3, atol=1e-4, msg=name)


def train_uncut(folder: str, rule: str, settings: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """Of `train`, where nothing may cut what is compiled."""
    with mock.patch.object(DDPOptimizer, "compile_fn", side_effect=AssertionError("a layer is cut")):
        return train(folder, rule, settings)


@pytest.mark.parametrize("alone", ["delta"], indirect=True)
def test_layers_are_compiled_as_a_whole_on_several_processes(alone: tuple[str, Any], tmp_path: Path) -> None:
    """torch would cut each where a bucket of gradients is full: more graphs, and none the sooner."""
    rule, (losses, _) = alone
    settings = {"per_device_train_batch_size": ROWS // 2, "torch_compile": True}
    for ours, _ in run_on(2, train_uncut, str(tmp_path), rule, settings, timeout=300):
        assert ours == pytest.approx(losses, abs=1e-4)


def carried_gradients(rule: str, starting: int, segments: int) -> dict[str, Tensor]:
    """Of a second step, of so many segments, in which the last rows start afresh and the others go on.

    Of a rank's share of the rows; on several ranks weights are sharded.
    """
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"vocab_size": 64, "num_key_value_heads": 2}
    if rule in BASELINES:
        model_class = BASELINES[rule][LlamaForCausalLM]
        model = model_class(model_class.config_class(**sizes, segment_length=SEGMENT))
    else:
        base = LlamaForCausalLM(LlamaConfig(**sizes))
        model = retrofit(base, segment_length=SEGMENT, update_rule=rule, gate_init=0.0, short_convolution=3)
    ranks, rank = dist.get_world_size(), dist.get_rank()
    if ranks > 1:
        units = [each for each in model.modules() if type(each).__name__ in model._no_split_modules]
        for module in reversed(units):  # gates before the layers that they are in
            fully_shard(module, mesh=init_device_mesh("cpu", (ranks,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)))
    tokens = ROWS, 2 * segments * SEGMENT
    ids = torch.randint(0, 64, tokens, generator=torch.Generator().manual_seed(0)).chunk(ranks)
    carried = CarriedMemory(read_again=True)
    for number, step in enumerate(ids[rank].split(segments * SEGMENT, dim=1)):
        starts = torch.arange(ROWS).chunk(ranks)[rank] >= (ROWS - starting if number else 0)
        inputs = carried.continued(model, {"starts_document": starts, "input_ids": step})
        model.zero_grad()
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
        carried.keep(inputs[CACHE_ARGUMENT])
    assert all(isinstance(x, DTensor) == (ranks > 1) for x in model.parameters())
    found = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    return {name: x.full_tensor() if isinstance(x, DTensor) else x for name, x in found.items()}


@pytest.mark.parametrize(("starting", "segments"), [(1, 2), (2, 1)])  # of one process a row, or all
@pytest.mark.parametrize("rule", ["linear", "delta", "transformer_xl", "memorizing", "recurrent_memory"])
def test_sharded_weights_learn_as_whole_ones_do(rule: str, starting: int, segments: int) -> None:
    (whole,) = run_on(1, carried_gradients, rule, starting, segments)
    assert rule in BASELINES or any("memory_gate" in name for name in whole)
    assert len(whole) >= 20
    for sharded in run_on(2, carried_gradients, rule, starting, segments):
        assert sharded.keys() == whole.keys()
        for name, expected in whole.items():
            torch.testing.assert_close(sharded[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_the_start_matters_to_what_is_compared(alone: tuple[str, Any]) -> None:
    _, (losses, parameters) = alone
    assert len(set(losses)) == 3
    gates = torch.cat([x for name, x in parameters.items() if "memory_gate" in name])
    assert (gates.abs() > 1e-3).all() and gates.abs().max() > 0.1


def divided(folder: str, length: int, settings: dict[str, Any]) -> str:
    try:
        args = InfiniTrainingArguments(output_dir=folder, report_to="none", use_cpu=True, **settings)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = retrofit(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), segment_length=SEGMENT)
        trainer = InfiniTrainer(model=model, args=args, train_dataset=Rows())
        ids = torch.zeros(1, length, dtype=torch.int64)
        trainer.training_step(model.train(), {"input_ids": ids, "labels": ids}, num_items_in_batch=1)
    except ValueError as error:
        return str(error)
    return ""


def test_wrong_divisions_are_refused_in_words(tmp_path: Path) -> None:
    for length, settings, expected in (
        (SEGMENT, {"context_parallel_size": 2}, "1 segment"),
        (LENGTH, {"context_parallel_size": 3}, "context_parallel_size is 3, which does not divide the 2"),
        (LENGTH, {"context_parallel_size": 2, "carry_memory": True}, "carry_memory has no meaning"),
        (LENGTH, {"context_parallel_size": 2, "least_segments": 1}, "set least_segments to at least 2"),
        (
            LENGTH,
            {"fsdp": "full_shard"},
            "fsdp is set, and accelerate shards no weights of 2 processes on cpu",
        ),
    ):
        for error in run_on(2, divided, str(tmp_path), length, settings):
            assert expected in error


def resumed(folder: str, settings: dict[str, Any]) -> list[float]:
    """Losses of four steps, cut in the middle where `settings` say so."""
    losses: dict[int, float] = {}
    for stop in (2, 4) if settings.pop("cut") else (4,):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
        model = retrofit(LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), segment_length=SEGMENT)
        args = InfiniTrainingArguments(
            output_dir=folder,
            max_steps=4,
            logging_steps=1,
            save_steps=2,
            lr_scheduler_type="constant",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **settings,
        )
        trainer = InfiniTrainer(model=model, args=args, train_dataset=Told())
        if stop == 2:
            trainer.args.max_steps = 2
        trainer.train(resume_from_checkpoint=stop == 4 and "cut" in folder)
        losses |= {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return [losses[step] for step in sorted(losses)]


class Told(Rows):
    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = {name: x[: 4 * SEGMENT] for name, x in super().__getitem__(index).items()}
        return item | {"starts_document": torch.tensor(index % 8 == 0)}


@pytest.mark.parametrize("settings", [{"carry_memory": True}, {"repeat_ceiling": 30.0}], ids=str)
def test_several_processes_go_on_where_they_were_cut_off(tmp_path: Path, settings: dict[str, Any]) -> None:
    settings = {"per_device_train_batch_size": 2} | settings
    whole, cut = (
        run_on(2, resumed, str(tmp_path / name), settings | {"cut": name == "cut"})
        for name in ("whole", "cut")
    )
    assert len(whole[0]) == 4
    assert cut == whole


def command(folder: str) -> tuple[bool, list[str]]:
    """Whether a group is there when the command has run, and which of its threads are, where Linux tells."""
    settings = {"output_dir": folder, "max_steps": 1, "per_device_train_batch_size": 2, "use_cpu": True}
    cli.train(RECIPES / "copy-task.yaml", [f"--training.{name}={value}" for name, value in settings.items()])
    names = []
    for each in Path("/proc/self/task").glob("*/comm"):
        with suppress(OSError):  # of one that ends meanwhile
            names.append(each.read_text())
    return dist.is_initialized(), [name for name in names if "gloo" in name]


def test_the_command_leaves_its_group_before_its_process_ends(tmp_path: Path) -> None:
    """Or threads of the group abort some processes, and torchrun calls a run failed that was not."""
    assert run_on(2, command, str(tmp_path)) == [(False, [])] * 2
    assert (tmp_path / "model" / "config.json").exists()
