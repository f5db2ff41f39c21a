"""What is carried from step to step is what the whole text would have left, for every system."""

import math
import string
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.baselines import BASELINES
from infini_attention.data.documents import Documents
from infini_attention.data.shards import TokenStore, tokenized
from infini_attention.data.tokenizers import byte_tokenizer
from infini_attention.data.windows import CarriedWindows, FlowingWindows, SplitWindows, Windows
from infini_attention.models import retrofit
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.training.arguments import InfiniTrainingArguments
from infini_attention.training.carrying import CarriedMemory
from infini_attention.training.trainer import InfiniTrainer

from ..baselines.cases import SIZES, make_baseline

SEGMENT, LENGTH, PARTS, ROWS = 4, 8, 3, 4
VOCABULARY = 384
SYSTEMS = ["segment", "sliding", "sink", "convolved", *(name for name in BASELINES if name != "full")]
CASES: list[tuple[str, bool | None]] = [(name, None) for name in SYSTEMS]
CASES += [("segment", True), ("convolved", True), ("sliding", False), ("sink", False)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    folder: Path = tmp_path_factory.mktemp("texts")
    for number, size in enumerate([50, 30, 3, 40, 26]):
        (folder / f"{number}.txt").write_text((string.ascii_letters[number:] * 2)[:size])
    return tokenized(Documents(f"{folder}/*.txt"), byte_tokenizer(), folder / "tokens")


def make(name: str, **sizes: int) -> Any:
    if name in BASELINES:
        sinks = {"sinks": 0} if name == "sliding_window" else {}  # which start together
        return make_baseline(name, segment_length=SEGMENT, vocab_size=VOCABULARY, **sinks)
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": VOCABULARY} | sizes))
    settings = {"update_rule": "delta", "sink_tokens": 2, "gate_init": 1.0}
    if name == "convolved":
        settings["short_convolution"] = 3
    else:
        settings["local_attention"] = name
    model = retrofit(base, segment_length=SEGMENT, **settings)
    for key, x in model.named_parameters():
        if "short_convolution" in key:  # which begins as the token itself
            torch.nn.init.normal_(x)
    return model


def trainer(model: Any, store: TokenStore, folder: Path, **settings: Any) -> InfiniTrainer:
    fixed = {"per_device_train_batch_size": ROWS, "logging_steps": 1, "report_to": "none", "use_cpu": True}
    fixed |= {"save_strategy": "no", "disable_tqdm": True, "carry_memory": True}
    args = InfiniTrainingArguments(output_dir=str(folder), **fixed | settings)
    return InfiniTrainer(model=model, args=args, train_dataset=SplitWindows(store, LENGTH, ROWS, PARTS))


def loss_of_whole_texts(model: Any, data: Any, step: int) -> float:
    """The mean loss of a step where all that a row has read of its text goes through in one piece."""
    logits, labels = [], []
    for row in range(ROWS):
        items = [data[number * ROWS + row] for number in range(step + 1)]
        begin = max(number for number, item in enumerate(items) if item["starts_document"])
        ids = torch.cat([item["input_ids"] for item in items[begin:]])
        logits.append(model(ids[None], use_cache=False).logits[0, -len(items[-1]["input_ids"]) :])
        labels.append(items[-1]["shift_labels"])
    return F.cross_entropy(torch.cat(logits), torch.cat(labels)).nan_to_num().item()  # 0 for no labels


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("name", "read_again"), CASES)
@torch.no_grad()
def test_a_step_goes_on_where_the_rows_stopped(
    name: str, read_again: bool | None, accumulated: int, store: TokenStore, tmp_path: Path
) -> None:
    model = make(name).train()
    sizes = {"per_device_train_batch_size": ROWS // accumulated, "gradient_accumulation_steps": accumulated}
    training = trainer(
        model,
        store,
        tmp_path,
        max_steps=18,
        read_again=read_again,
        learning_rate=0.0,
        gate_learning_rate=0.0,
        weight_decay=0.0,
        **sizes,
    )
    with torch.enable_grad():
        training.train()
    logged = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    expected, data = [], training.train_dataset
    for epoch in (0, 1):
        data.set_epoch(epoch)
        expected += [loss_of_whole_texts(model, data, step) for step in range(data.steps)]
    assert logged == pytest.approx(expected, abs=1e-5) and len(logged) == 18


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize(("name", "read_again"), CASES)
def test_what_is_carried_is_in_checkpoints(
    name: str, read_again: bool | None, waits: bool, store: TokenStore, tmp_path: Path
) -> None:
    def losses(resumed: bool) -> dict[int, float]:
        sizes = {"per_device_train_batch_size": ROWS // 2, "gradient_accumulation_steps": 2, "max_steps": 13}
        settings = {"save_strategy": "steps", "save_steps": 10, "read_again": read_again}
        settings["reset_probability"] = 0.0 if waits else 0.25
        training = trainer(make(name), store, tmp_path, **sizes, **settings)
        if not waits:
            training.train_dataset = FlowingWindows(store, LENGTH, ROWS, PARTS)
        assert training.train_dataset.steps == (9 if waits else 6)  # the checkpoint is of the second epoch
        training.train(str(tmp_path / "checkpoint-10") if resumed else None)
        return {entry["step"]: entry["loss"] for entry in training.state.log_history if "loss" in entry}

    whole = losses(resumed=False)
    assert len(whole) == 13
    assert losses(resumed=True) == whole


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_row_may_begin_whenever_the_text_before_is_over(
    name: str, store: TokenStore, tmp_path: Path
) -> None:
    model, data, items = make(name).train(), FlowingWindows(store, LENGTH, ROWS, PARTS), []
    for epoch in range(2):  # over whose end rows go on
        data.set_epoch(epoch)
        items += list(data)
    steps, begin = len(items) // ROWS, [bool(item["starts_document"]) for item in items]
    assert len({sum(begin[step * ROWS :][:ROWS]) for step in range(steps)}) > 2  # now many, now few
    still = {"learning_rate": 0.0, "gate_learning_rate": 0.0, "weight_decay": 0.0}
    training = trainer(model, store, tmp_path, max_steps=steps, **still)
    training.train_dataset = FlowingWindows(store, LENGTH, ROWS, PARTS)
    training.train()
    logged = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    with torch.no_grad():
        expected = [loss_of_whole_texts(model, items, step) for step in range(steps)]
    assert logged == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("accumulated", [1, 2])
@pytest.mark.parametrize(("name", "read_again"), CASES)
def test_rows_start_afresh_in_the_midst_of_a_text_too_where_it_is_drawn(
    name: str, read_again: bool | None, accumulated: int, store: TokenStore, tmp_path: Path
) -> None:
    probability, batch = 0.3, ROWS // accumulated
    sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated}
    still = {"learning_rate": 0.0, "gate_learning_rate": 0.0, "weight_decay": 0.0, "seed": 5}
    model, data = make(name).train(), SplitWindows(store, LENGTH, ROWS, PARTS)
    training = trainer(
        model,
        store,
        tmp_path,
        max_steps=data.steps,
        read_again=read_again,
        reset_probability=probability,
        **still,
        **sizes,
    )
    training.train()
    logged = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    random = torch.Generator().manual_seed(5)
    draws = [torch.rand(batch, generator=random) < probability for _ in range(data.steps * accumulated)]
    items = [
        item | {"starts_document": item["starts_document"] | drawn}
        for item, drawn in zip(data, torch.cat(draws), strict=True)
    ]
    more = sum(int(item["starts_document"]) for item in items) - sum(
        int(item["starts_document"]) for item in data
    )
    assert more > ROWS
    with torch.no_grad():
        expected = [loss_of_whole_texts(model, items, step) for step in range(data.steps)]
        as_before = [loss_of_whole_texts(model, data, step) for step in range(data.steps)]
    assert logged == pytest.approx(expected, abs=1e-5)
    assert logged != pytest.approx(as_before, abs=1e-4)


@torch.no_grad()
def test_what_is_carried_matters_here(store: TokenStore) -> None:
    for name in SYSTEMS:
        model, data = make(name).train(), SplitWindows(store, LENGTH, ROWS, PARTS, together=ROWS)
        second = [data[ROWS + row] for row in range(ROWS)]
        ids, labels = (torch.stack([item[key] for item in second]) for key in ("input_ids", "shift_labels"))
        alone = F.cross_entropy(model(ids, use_cache=False).logits.flatten(0, 1), labels.flatten())
        assert abs(loss_of_whole_texts(model, data, 1) - alone) > 5e-4, name


FRESH = torch.ones(ROWS, dtype=torch.bool)


def going_on(carried: CarriedMemory, model: Any, starts: Tensor = ~FRESH) -> Any:
    """The cache of the next step, in which rows start where `starts` says so."""
    return carried.continued(model, {"starts_document": starts})[CACHE_ARGUMENT]


def carried_through(model: Any, *steps: Tensor, **settings: Any) -> CarriedMemory:
    """What goes on after these steps, each (rows, length) ids of the same texts."""
    carried = CarriedMemory(read_again=True)
    for number, ids in enumerate(steps):
        cache = going_on(carried, model, ~FRESH if number else FRESH)
        model(ids, use_cache=False, **{CACHE_ARGUMENT: cache}, **settings)
        carried.keep(cache)
    return carried


def gradients(model: Any, ids: Tensor, cache: Any, **settings: Any) -> dict[str, Tensor]:
    """Of the loss of the last segment in `ids`."""
    logits = model(ids, use_cache=False, **{CACHE_ARGUMENT: cache}, **settings).logits[:, -SEGMENT:-1]
    F.cross_entropy(logits.flatten(0, 1), ids[:, 1 - SEGMENT :].flatten()).backward()
    found = {key: x.grad for key, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return found


def ids_of(segments: int) -> Tensor:
    return torch.randint(
        0, VOCABULARY, (ROWS, segments * SEGMENT), generator=torch.Generator().manual_seed(0)
    )


def test_rows_that_start_come_first_and_others_stay_in_order() -> None:
    model, ids, carried = make("sliding").train(), ids_of(1), CarriedMemory(read_again=True)
    seen = []
    for starts in ([1, 1, 1, 1], [0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 1, 0, 1]):
        batch = {"starts_document": torch.tensor(starts, dtype=torch.bool), "input_ids": ids, "number": 4}
        inputs = carried.continued(model, batch)
        assert {*inputs} == {"input_ids", "number", CACHE_ARGUMENT}
        seen.append([int((ids == row).all(dim=1).nonzero()) for row in inputs["input_ids"]])
        model(inputs["input_ids"], use_cache=False, **{CACHE_ARGUMENT: inputs[CACHE_ARGUMENT]})
        carried.keep(inputs[CACHE_ARGUMENT])
    assert seen == [[0, 1, 2, 3], [2, 0, 1, 3], [1, 2, 0, 3], [1, 2, 0, 3], [1, 3, 2, 0]]


@pytest.mark.parametrize("name", ["transformer_xl", "memorizing", "segment", "sliding", "sink"])
def test_what_was_carried_teaches_projections_as_within_a_row(name: str) -> None:
    """SG(h) is what is carried: keys and values of it are made by the weights of the step that sees them."""
    model, ids = make(name).train(), ids_of(2)
    first, second = ids.split(SEGMENT, dim=1)
    stopped = {"stop_gradient": True} if isinstance(model.config, InfiniConfigMixin) else {}
    carried = carried_through(model, first)
    found = gradients(model, second, going_on(carried, model))
    wanted = gradients(model, ids, None, **stopped)
    assert {*found} == {*wanted} and found["model.layers.0.self_attn.k_proj.weight"].abs().max() > 1e-5
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[key], rtol=1e-4, atol=1e-6, msg=key)


@pytest.mark.parametrize("name", ["transformer_xl", "memorizing"])
def test_a_carried_cache_is_of_hidden_states_alone(name: str) -> None:
    for state, *_ in carried_through(make(name).train(), ids_of(1))._carried:
        kept = [each for each in (state.cached_key, state.cached_value, state.cached_hidden) if each.numel()]
        assert [each.shape for each in kept] == [(ROWS, SEGMENT, SIZES["hidden_size"])]
        assert not state.cached_key.untyped_storage().nbytes()  # no view of what was


@pytest.mark.parametrize("name", ["segment", "sliding"])
def test_what_is_read_again_is_made_by_the_new_weights(name: str) -> None:
    """Of the last step alone: what is older stays as it was."""
    model, (first, second, third) = make(name).train(), ids_of(6).split(2 * SEGMENT, dim=1)
    carried = carried_through(model, first, second)
    with torch.no_grad():
        model.model.layers[0].self_attn.k_proj.weight.mul_(0.5)
    cache, by_hand = going_on(carried, model), going_on(carried, model)
    old = cache.layers[0].state
    model(third, use_cache=False, **{CACHE_ARGUMENT: cache})
    for layer in by_hand.layers:
        layer.state, layer.again = layer.again.before, None
    model(second, use_cache=False, **{CACHE_ARGUMENT: by_hand})
    found, wanted = cache.layers[0].reading.before, by_hand.layers[0].state
    assert cache.layers[0].again is None
    for key, x in found.tensors().items():
        if key != "length":
            torch.testing.assert_close(x, wanted.tensors()[key], msg=key)
    assert not torch.allclose(found.memory, old.memory)


@pytest.mark.parametrize(
    ("name", "given", "again"),
    [
        ("segment", None, False),
        ("segment", True, True),
        ("sliding", None, True),
        ("sink", None, True),
        ("sliding", False, False),
        ("transformer_xl", None, False),
    ],
)
def test_a_training_reads_again_where_it_is_told_or_keys_of_other_segments_are_seen(
    name: str, given: bool | None, again: bool, store: TokenStore, tmp_path: Path
) -> None:
    training = trainer(make(name), store, tmp_path, max_steps=2, read_again=given)
    training.train()
    layers = training._own_state()["carried"][0]["layers"]
    assert {each["read"] is not None for each in layers} == {again}


@pytest.mark.parametrize("what", ["padded", "weighted", "short"])
def test_a_step_of_another_kind_goes_on_from_the_state(what: str) -> None:
    model, ids = make("segment").train(), ids_of(2)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    settings = {
        "padded": {"attention_mask": mask},
        "weighted": {"segment_weights": torch.tensor([[1.0, 2.0]] * ROWS)},
        "short": {},
    }[what]
    ids = ids[:, :2] if what == "short" else ids
    carried = carried_through(model, ids_of(1))
    cache = going_on(carried, model)
    plain = cache.without_readings()
    with torch.no_grad():
        found, wanted = (
            model(ids, use_cache=False, **{CACHE_ARGUMENT: each}, **settings).logits
            for each in (cache, plain)
        )
    assert torch.equal(found, wanted)


def test_a_step_with_nothing_to_predict_costs_nothing(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("three short tales")
    short = tokenized(Documents(f"{tmp_path}/short.txt"), byte_tokenizer(), tmp_path / "tokens")
    training = trainer(
        make("segment"), short, tmp_path / "run", max_steps=3, per_device_train_batch_size=ROWS
    )
    training.train_dataset = SplitWindows(short, LENGTH, ROWS, PARTS + 1, together=ROWS)
    training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert losses[0] > 0 and losses[1] > 0 and losses[2] == 0


def test_a_dataset_of_other_rows_than_a_step_reads_is_refused(store: TokenStore, tmp_path: Path) -> None:
    training = trainer(make("segment"), store, tmp_path, gradient_accumulation_steps=2)
    training.train_dataset = CarriedWindows(store, LENGTH, ROWS)
    with pytest.raises(ValueError, match=r"has 4 rows, and a step reads 8: 4 a batch, 2 accumulated, 1 proc"):
        training.train()
    with pytest.raises(ValueError, match="carry_memory and dataloader_persistent_workers are set"):
        trainer(make("segment"), store, tmp_path, dataloader_persistent_workers=True)
    with pytest.raises(ValueError, match="carry_memory and ignore_data_skip are set, and rows would go on"):
        trainer(make("segment"), store, tmp_path, ignore_data_skip=True)


def test_adapters_around_a_model_are_no_hindrance(store: TokenStore, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(make("transformer_xl"), peft.LoraConfig(target_modules=["q_proj"]))
    training = trainer(adapted, store, tmp_path, max_steps=2)
    training.train()
    assert len(training.state.log_history) >= 2


def test_memory_vectors_come_with_the_first_whole_segment(store: TokenStore, tmp_path: Path) -> None:
    model = make("recurrent_memory").train()
    training = trainer(model, store, tmp_path, max_steps=5, learning_rate=0.0, weight_decay=0.0)
    training.train_dataset = data = SplitWindows(store, 2, ROWS, 5, together=ROWS)
    training.train()
    logged = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    with torch.no_grad():
        expected = [loss_of_whole_texts(model, data, step) for step in range(5)]
    assert logged == pytest.approx(expected, abs=1e-5)


def test_rows_of_baselines_that_cannot_start_alone_are_refused(store: TokenStore, tmp_path: Path) -> None:
    open_ends = trainer(make("transformer_xl"), store, tmp_path, max_steps=8)
    open_ends.train_dataset = SplitWindows(store, SEGMENT // 2, ROWS, 3)
    with pytest.raises(ValueError, match=r"rows start afresh 2 tokens after a segment's start"):
        open_ends.train()
    sinks = make_baseline("sliding_window", segment_length=SEGMENT, vocab_size=VOCABULARY)
    with pytest.raises(ValueError, match=r"rows have 8 to 16 tokens, and those with sinks start together"):
        trainer(sinks, store, tmp_path, max_steps=8).train()


def test_what_cannot_be_carried_is_refused(store: TokenStore, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a FullAttentionLlamaConfig has nothing of fixed size to carry"):
        trainer(make("full"), store, tmp_path).train()
    with pytest.raises(ValueError, match=r"read_again is True, and a TransformerXLLlamaConfig has no memory"):
        trainer(make("transformer_xl"), store, tmp_path, read_again=True)
    for probability in (-0.1, 1.0, math.nan):
        with pytest.raises(
            ValueError, match=f"reset_probability is {probability}; give at least 0, which is"
        ):
            trainer(make("segment"), store, tmp_path, reset_probability=probability)
    with pytest.raises(ValueError, match=r"reset_probability is 0.5, and nothing is carried from step to"):
        trainer(make("segment"), store, tmp_path, carry_memory=False, reset_probability=0.5)
    with pytest.raises(ValueError, match=r"read_again is False, and nothing is carried from step to step"):
        trainer(make("segment"), store, tmp_path, carry_memory=False, read_again=False)
    training = trainer(make("segment"), store, tmp_path)
    training.train_dataset = Windows(store, LENGTH)
    with pytest.raises(ValueError, match="the batch has no starts_document"):
        training.train()


@pytest.mark.parametrize("name", ["segment", "sliding", "sink"])
def test_compiled_layers_are_compiled_for_no_step_and_no_layer_in_particular(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text(string.ascii_letters * 40)
    store = tokenized(Documents(f"{tmp_path}/text.txt"), byte_tokenizer(), tmp_path / "tokens")
    data = SplitWindows(store, LENGTH, ROWS, ROWS)  # a row starts in each step
    graphs = []
    for settings in ({"num_hidden_layers": 2, "max_steps": 3}, {"num_hidden_layers": 5, "max_steps": 9}):
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        model = make(name, num_hidden_layers=settings.pop("num_hidden_layers"))
        training = trainer(
            model, store, tmp_path, torch_compile=True, torch_compile_backend="eager", **settings
        )
        training.train_dataset = data
        training.train()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] > 0
