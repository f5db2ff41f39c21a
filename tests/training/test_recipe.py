import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.baselines import BASELINES
from infini_attention.cli import main
from infini_attention.data.tokenizers import open_tokenizer
from infini_attention.data.windows import CarriedWindows, FlowingWindows
from infini_attention.models import FAMILIES, load_model
from infini_attention.models.adapters import is_adapter, save_config
from infini_attention.training.estimate import _counting, _kept
from infini_attention.training.material import load_material
from infini_attention.training.models import make_model, segment_length_of
from infini_attention.training.recipe import LoraRecipe, ModelRecipe, read_recipe
from infini_attention.training.run import dry_run, train

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted([*FOLDER.glob("*.yaml"), *FOLDER.glob("retrofit/*.yaml")])
COPY = next(path for path in RECIPES if path.stem == "copy-task")

COMMAND = "import torch; torch.set_num_threads(1); from infini_attention.cli import main; main()"
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def write(folder: Path, **changes: dict[str, Any]) -> Path:
    """A recipe for a tiny model on two texts that are written for it."""
    (folder / "texts").mkdir()
    for name in ("one", "two", "three", "four"):
        (folder / "texts" / f"{name}.txt").write_text(f"What {name} said, and said again. " * 30)
    recipe: dict[str, dict[str, Any]] = {
        "model": {"sizes": SIZES, "segment_length": 16},
        "data": {
            "documents": {"source": f"{folder}/texts/*.txt"},
            "validation": {"source": f"{folder}/texts/one.txt"},
            "tokenizer": "bytes",
            "length": 64,
            "shards": f"{folder}/tokens",
        },
        "training": {
            "output_dir": f"{folder}/run",
            "max_steps": 6,
            "per_device_train_batch_size": 2,
            "logging_steps": 2,
            "save_steps": 2,
            "learning_rate": 0.01,
            "use_cpu": True,
            "report_to": "none",
        },
    }
    for part, fields in changes.items():
        recipe[part] |= fields
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_reads_and_comes_back_from_its_own_text(path: Path, tmp_path: Path) -> None:
    reading = read_recipe(path)
    again = tmp_path / "again.yaml"
    again.write_text(reading.text)
    assert read_recipe(again).text == reading.text
    assert read_recipe(again).recipe.model == reading.recipe.model


@pytest.mark.parametrize("name", ["lm-small", "lm-paper"])
@pytest.mark.parametrize("baseline", [None, *BASELINES])
def test_recipes_of_language_models_are_for_every_system(name: str, baseline: str | None) -> None:
    path = next(path for path in RECIPES if path.stem == name)
    chosen = [] if baseline is None else [f"--model.baseline={baseline}"]
    chosen += ["--model.sizes.window=512"] * (baseline == "sliding_window")
    chosen += ["--model.sizes.memory_tokens=50"] * (baseline == "recurrent_memory")
    chosen += ["--training.checkpoint_segments=null"] * (baseline == "full")
    recipe = read_recipe(path, chosen).recipe
    with torch.device("meta"):
        model = make_model(recipe.model, 32_768)
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert {"lm-small": 26 < millions < 28, "lm-paper": 234 < millions < 236}[name]
    assert recipe.data.length % model.config.segment_length == 0
    if baseline == "sliding_window":
        assert (model.config.window, model.config.sinks) == (512, 0)
    if baseline == "recurrent_memory":
        assert model.config.memory_tokens == 50


def test_a_value_on_the_command_line_comes_before_the_files() -> None:
    reading = read_recipe(COPY, ["--training.max_steps=7", "--model.gate_init", "-3", "--dry-run"])
    assert reading.recipe.training.max_steps == 7
    assert reading.recipe.model.gate_init == -3
    assert reading.dry_run and not reading.json


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("--model.segment_lenght=8", "segment_lenght"),
        ("--training.max_steps=many", "max_steps"),
        ("--data.copy_task.keys=eight", "keys"),
    ],
)
def test_a_wrong_name_or_type_is_named(capsys: pytest.CaptureFixture[str], override: str, named: str) -> None:
    with pytest.raises(SystemExit) as ended:
        read_recipe(COPY, [override])
    assert ended.value.code == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (
            ["--data.copy_task=null"],
            "data has no source; give one of documents, copy_task, associative_recall, passkey, summaries",
        ),
        (["--model.sizes={}"], "model has neither base nor sizes"),
        (["--model.base=smollm2"], "model.sizes are set, and model.base 'smollm2' has its own"),
        (["--model.segment_length=16"], "data.copy_task.keys is 8, model.segment_length 16"),
        (["--data.pack=true", "--data.length=77"], "data.length, data.pack belong to documents"),
        (["--data.more_documents=[{source: x}]"], "data.more_documents belong to documents"),
        (["--training.gate_warmup_steps=-5"], "gate_warmup_steps is -5; give at least 0"),
        (["--training.loss_chunk=0"], "loss_chunk is 0; give at least 1"),
        (
            ["--model.baseline=transformer_xl", "--training.observe_steps=0", "--model.memory=false"],
            r"model.baseline is 'transformer_xl', which has no use for model.feature_map, model.memory, "
            r"model.gate_init; leave out",
        ),
        (
            [
                "--model.baseline=transformer_xl",
                "--training.observe_steps=0",
                "--training.stop_gradient=true",
            ],
            r"'transformer_xl', which has no use for .*training.stop_gradient; leave out",
        ),
        (
            [
                "--model.base=x",
                "--model.sizes={}",
                "--model.lora.dropout=0.1",
                "--training.stop_gradient=true",
            ],
            "model.lora.dropout is 0.1, and training.stop_gradient makes keys and values twice",
        ),
        (
            ["--model.baseline=full", "--training.detach_every=2", "--training.repeat_ceiling=9"],
            r"'full', which has no use for .*training.observe_steps, training.repeat_ceiling, "
            r"training.detach_every",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_in_words(overrides: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_recipe(COPY, overrides)


def test_the_extra_that_a_training_needs_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("infini_attention.training.recipe.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["train", str(COPY)])
    assert "pip install 'infini-attention[train]'" in capsys.readouterr().err


def test_sizes_and_families_that_are_not_there_are_named() -> None:
    recipe = read_recipe(COPY).recipe.model
    recipe.sizes = {**recipe.sizes, "hiden_size": 3}
    with pytest.raises(ValueError, match=r"model.sizes has hiden_size, which are no sizes of"):
        make_model(recipe, 64)
    recipe.sizes = {"hidden_size": 64, "num_attention_heads": 5}
    with pytest.raises(ValueError, match=r"model.sizes make no llama: (.|\n)*not a multiple of"):
        make_model(recipe, 64)
    recipe.family = "bert"
    with pytest.raises(ValueError, match=r"model.family is 'bert'; choose one of llama, mistral"):
        make_model(recipe, 64)


def test_a_baseline_has_sizes_of_its_own(tmp_path: Path) -> None:
    recipe = read_recipe(write(tmp_path)).recipe.model
    recipe.baseline, recipe.gate_init = "memorizing", -1.0
    recipe.sizes = {**SIZES, "memory_size": 100}
    config = make_model(recipe, 64).config
    assert (config.segment_length, config.memory_size, config.gate_init) == (16, 100, -1.0)
    recipe.baseline, recipe.gate_init = "linear_attention", None
    recipe.feature_map, recipe.short_convolution, recipe.sizes = "exp", 4, SIZES
    config = make_model(recipe, 64).config
    assert (config.feature_map, config.short_convolution) == ("exp", 4)
    recipe.baseline, recipe.sizes = "transformer_xl", {**SIZES, "memory_size": 100}
    with pytest.raises(ValueError, match=r"memory_size, which are no sizes of TransformerXLLlamaConfig"):
        make_model(recipe, 64)
    recipe.baseline = "memorising"
    with pytest.raises(ValueError, match=r"model.baseline is 'memorising'; choose one of 'full', 'sliding_"):
        make_model(recipe, 64)
    recipe.baseline, recipe.family, recipe.sizes = "full", "qwen3", SIZES
    with pytest.raises(ValueError, match=r"model.family is 'qwen3', and model.baseline 'full'; .* of llama"):
        make_model(recipe, 64)


def test_the_recipes_memory_is_the_models() -> None:
    settings = {"feature_map": "relu2", "normalization": "root", "local_attention": "sink", "sink_tokens": 3}
    options = [f"--model.{name}={value}" for name, value in settings.items()]
    config = make_model(read_recipe(COPY, options).recipe.model, 64).config
    assert {name: getattr(config, name) for name in settings} == settings


def test_a_dry_run_says_what_there_would_be_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    main(["train", str(path), "--dry-run", "--json"])
    figures = json.loads(capsys.readouterr().out)
    model = make_model(read_recipe(path).recipe.model, 256)
    assert figures["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert figures["tokens_a_step"] == 128
    assert figures["steps"] == 6
    assert figures["state_gb"] == pytest.approx(16 * figures["parameters"] / 1e9)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("settings", [{}, {"checkpoint_segments": 2}], ids=str)
def test_activations_are_counted_without_making_them(tmp_path: Path, settings: dict[str, int]) -> None:
    recipe = read_recipe(write(tmp_path)).recipe
    model = make_model(recipe.model, 256).train()
    ids = torch.zeros(2, 64, dtype=torch.int64)
    with _counting(model) as sizes:
        model(input_ids=ids, labels=ids, use_cache=False, loss_chunk=2048, **settings)
    hollow = make_model(recipe.model, 256).train().to("meta")
    # SDPA keeps other things on other devices, such as a random state.
    assert _kept(hollow, 2, 64, recipe.training, **settings) == pytest.approx(sum(sizes.values()), rel=0.1)


def test_a_recipe_trains_and_goes_on_where_it_was_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    main(["train", str(path), "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["steps"] == 6
    assert 5 * 128 < figures["tokens"] <= 6 * 128 and figures["seconds"] > 0  # but for ends of documents
    assert 0 < figures["validation_loss"] < 6 and "validation_loss_memory_off" in figures
    recipe = read_recipe(path).recipe
    assert figures["learning_rate"] == recipe.training.learning_rate
    assert figures["row_tokens"] == recipe.data.length
    folder = tmp_path / "run"
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary.pop("provenance")) >= {"command", "commit", "versions", "processor", "card"}
    assert summary == figures
    assert (folder / "model" / "model.safetensors").exists() and (
        folder / "model" / "tokenizer.json"
    ).exists()
    kept = (folder / "checkpoint-6" / "model.safetensors").read_bytes()
    for name in ("checkpoint-4", "checkpoint-6"):
        for file in sorted((folder / name).iterdir(), reverse=True):
            file.unlink()
        (folder / name).rmdir()
    main(["train", str(path), "--json"])  # from step 2
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step")] == ["4/6", "6/6", "6/6"]
    again = json.loads(lines[-1])
    assert again["validation_loss"] == figures["validation_loss"]
    assert again["tokens"] == figures["tokens"]  # those before the checkpoint count
    assert (folder / "checkpoint-6" / "model.safetensors").read_bytes() == kept


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pre-trained model for bytes."""
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=256, **SIZES)).save_pretrained(tmp_path / "base")
    open_tokenizer("bytes").save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_an_adapter_is_trained_and_goes_on_and_is_trained_on(
    tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    path = write(tmp_path, model={"base": str(base), "sizes": {}, "lora": {"rank": 2}})

    def trained(*overrides: str) -> dict[str, Any]:
        main(["train", str(path), "--json", *overrides])
        figures: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
        return figures

    figures, folder = trained(), tmp_path / "run"
    weights = [folder / name / "adapter_model.safetensors" for name in ("checkpoint-6", "model")]
    kept = [each.read_bytes() for each in weights]
    assert kept[0] == kept[1]
    shutil.rmtree(folder / "checkpoint-4")
    shutil.rmtree(folder / "checkpoint-6")
    assert trained()["validation_loss"] == figures["validation_loss"]  # from step 2
    assert [each.read_bytes() for each in weights] == kept
    assert is_adapter(folder / "model") and not (folder / "model" / "model.safetensors").exists()
    model: Any = load_model(folder / "model")
    assert not torch.allclose(model.model.layers[0].self_attn.memory_gate.logits, torch.tensor(-4.0))
    before = load_model(base).model.layers[0].mlp.up_proj.weight
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    onto = [f"--model.base={folder}/model", "--model.lora=null", f"--training.output_dir={tmp_path}/on"]
    with pytest.raises(SystemExit):
        trained(*onto, "--model.update_rule=delta")
    assert "has memories already, and model.update_rule would change" in capsys.readouterr().err
    onto += ["--data.tokenizer=null", "--model.segment_length=4"]
    assert trained(*onto)["validation_loss"] < figures["validation_loss"]
    assert is_adapter(tmp_path / "on" / "model")
    assert load_model(tmp_path / "on" / "model").config.segment_length == 4
    with pytest.raises(ValueError, match=r"has memories already, and model.lora would change them"):
        recipe = read_recipe(path, [*onto, "--model.lora={rank: 4}"]).recipe
        make_model(recipe.model, 256)
    shutil.copytree(folder / "model", tmp_path / "smollm2-books")  # by its alias it is trained on, too
    monkeypatch.setattr("infini_attention.models.loading.PRETRAINED", tmp_path)
    by_alias = make_model(replace(recipe.model, base="smollm2-books", lora=None, segment_length=None), 256)
    assert any(each.requires_grad for name, each in by_alias.named_parameters() if "lora" in name)


def test_lora_is_for_a_base(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model.lora is set, and fresh weights have no base to adapt"):
        read_recipe(write(tmp_path), ["--model.lora={rank: 4}"])


def test_packing_and_what_it_excludes(tmp_path: Path) -> None:
    path = write(tmp_path, data={"pack": True})
    with pytest.raises(ValueError, match=r"data.pack and training.carry_memory exclude each other"):
        read_recipe(path, ["--training.carry_memory=true"])
    with pytest.raises(ValueError, match=r"data.pack and training.least_segments exclude each other"):
        read_recipe(path, ["--training.least_segments=2"])


def test_a_memory_is_carried_through_whole_rows_or_not_at_all(tmp_path: Path) -> None:
    path, carries = write(tmp_path), "--training.carry_memory=true"
    wrong = {
        (
            "--data.carried_length=128",
        ): "data.carried_length is 128, and nothing is carried from step to step",
        (carries, "--data.carried_length=160"): "data.carried_length is 160; give twice data.length, 64",
        (carries, "--data.carried_length=64"): "data.carried_length is 64; give twice data.length, 64, or",
        (carries, "--data.carried_together=true"): "carried_together is set without data.carried_length",
        (carries, "--data.carried_packed=true"): "carried_packed is set without data.carried_length",
        (
            carries,
            "--data.carried_length=128",
            "--data.carried_packed=true",
            "--data.carried_together=true",
        ): "data.carried_packed and data.carried_together exclude each other",
        (
            carries,
            "--data.carried_length=128",
            "--data.carried_packed=true",
            "--training.torch_compile=true",
            "--model.local_attention=sliding",
        ): "data.carried_packed and training.torch_compile are set, and layers with model.local_attenti",
        (
            carries,
            "--training.reset_probability=0.1",
            "--training.torch_compile=true",
            "--model.local_attention=sliding",
        ): "training.reset_probability and training.torch_compile are set, and layers with model.local_att",
    }
    for options, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            read_recipe(path, options)
    (tmp_path / "xl").mkdir()
    xl = write(tmp_path / "xl", model={"baseline": "transformer_xl"}, training={"carry_memory": True})
    open_ends = "--model.segment_length=48"
    through = ["--data.carried_length=128"]
    for options in (
        [],
        [*through, "--data.carried_packed=true"],
        [*through, "--training.reset_probability=0.1"],
    ):
        with pytest.raises(ValueError, match=r"rows of model.baseline 'transformer_xl' start together where"):
            load_material(read_recipe(xl, [open_ends, *options]).recipe)
    assert isinstance(load_material(read_recipe(xl).recipe).train, CarriedWindows)
    with pytest.raises(ValueError, match=r"which has no use for training.read_again; leave out"):
        read_recipe(xl, [*through, "--training.read_again=true"])
    for recipe, together in (
        (read_recipe(path, [carries, *through]).recipe, 1),
        (read_recipe(path, [carries, *through, "--data.carried_together=true"]).recipe, 8),
        (read_recipe(path, [carries, *through, "--model.local_attention=sliding"]).recipe, 1),
        (read_recipe(xl, through).recipe, 1),
        (read_recipe(xl, [*through, open_ends, "--training.gradient_accumulation_steps=2"]).recipe, 4),
    ):
        recipe.training.per_device_train_batch_size = 8 // recipe.training.gradient_accumulation_steps
        material = load_material(recipe)
        rows = material.train
        assert (rows.rows, rows.parts, rows.together) == (8, 2, together)
        assert len(material.validation[0]["input_ids"]) == 128
    packed = read_recipe(path, [carries, *through, "--data.carried_packed=true"]).recipe
    rows = load_material(packed).train
    assert isinstance(rows, FlowingWindows) and rows.parts == 2
    copy = ["--training.carry_memory=true", "--training.observe_steps=0"]
    for more in (
        [],
        ["--model.baseline=transformer_xl", "--model.feature_map=elu1", "--model.gate_init=null"],
    ):
        with pytest.raises(
            ValueError, match=r"carry_memory is True, and every row of data\.copy_task is a whole by itself"
        ):
            read_recipe(COPY, [*copy, *more])


def test_rows_of_all_sources_are_trained_on(tmp_path: Path) -> None:
    more = [{"source": f"{tmp_path}/texts/{name}.txt"} for name in ("three", "four")]
    one = {"source": f"{tmp_path}/texts/one.txt"}
    path = write(tmp_path, data={"documents": one, "more_documents": more})
    rows = load_material(read_recipe(path).recipe).train
    texts = "".join(bytes(row["input_ids"].tolist()).decode(errors="ignore") for row in rows)
    assert [name for name in ("one", "two", "three", "four") if f"What {name}" in texts] == [
        "one",
        "three",
        "four",
    ]
    assert "one.txt, " in dry_run(read_recipe(path).recipe)["data"]
    with pytest.raises(ValueError, match=r"data.more_documents and training.carry_memory exclude each other"):
        read_recipe(path, ["--training.carry_memory=true"])


def test_a_run_that_never_finished_a_checkpoint_starts_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path)
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "recipe.yaml").write_text(read_recipe(path).text)
    main(["train", str(path), "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["steps"] == 6


def test_a_base_that_has_memories_keeps_its_own_but_for_the_segments_length(tmp_path: Path) -> None:
    reading = read_recipe(write(tmp_path))
    train(reading.recipe, reading.text)
    base = ["--model.sizes={}", f"--model.base={tmp_path}/run/model", "--data.tokenizer=null"]
    for given, expected in (("null", reading.recipe.model.segment_length), ("4", 4)):
        recipe = read_recipe(
            tmp_path / "recipe.yaml", [*base, f"--model.segment_length={given}"]
        ).recipe.model
        assert make_model(recipe, 256).config.segment_length == segment_length_of(recipe) == expected
    with pytest.raises(ValueError, match=r"segment_length is 0; give a whole number of at least 1"):
        make_model(replace(recipe, segment_length=0), 256)
    with_adapter = make_model(replace(recipe, lora=LoraRecipe(rank=2)), 256)
    with_adapter.save_pretrained(tmp_path / "adapter")
    save_config(with_adapter, tmp_path / "adapter")
    assert load_model(tmp_path / "adapter").config.segment_length == 4  # the base's is another
    packaged = ModelRecipe(base="passkey")
    assert make_model(packaged, 256).config.segment_length == segment_length_of(packaged) == 128
    with pytest.raises(ValueError, match=r"memories already, and model.normalization would change them"):
        other = [*base, "--model.normalization=none"]
        make_model(read_recipe(tmp_path / "recipe.yaml", other).recipe.model, 256)
    recipe = read_recipe(tmp_path / "recipe.yaml", base).recipe
    assert make_model(recipe.model, 256).config.segment_length == 16
    with pytest.raises(ValueError, match=r"the data has 999 tokens and model.base .* knows 256"):
        make_model(recipe.model, 999)


def test_a_loss_that_is_no_number_ends_the_command_in_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path, training={"learning_rate": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(SystemExit) as ended:
        main(["train", str(path)])
    assert ended.value.code == 1
    assert "with a lower learning rate" in capsys.readouterr().err


def test_a_folder_with_a_run_of_another_recipe_is_refused(tmp_path: Path) -> None:
    reading = read_recipe(write(tmp_path))
    train(reading.recipe, reading.text)
    other = read_recipe(tmp_path / "recipe.yaml", ["--training.learning_rate=0.5"])
    with pytest.raises(ValueError, match="holds a run of another recipe"):
        train(other.recipe, other.text)


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    place = tmp_path / "taken"
    place.write_text("")
    reading = read_recipe(write(tmp_path), [f"--training.output_dir={place}"])
    with pytest.raises(ValueError, match="taken, which is a file; name a folder"):
        train(reading.recipe, reading.text)


CARRIED = {"length": 32, "carried_length": 64}


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"pack": True}},
        {"training": {"carry_memory": True}},
        {"training": {"carry_memory": True, "read_again": True}},
        {
            "training": {"carry_memory": True, "reset_probability": 0.25},
            "data": CARRIED | {"carried_packed": True},
        },
        {"training": {"carry_memory": True, "gradient_accumulation_steps": 2}, "data": CARRIED},
        {"training": {"least_segments": 2, "repeat_ceiling": 10.0, "curriculum_steps": 3}},
        {"training": {"checkpoint_segments": 1, "detach_every": 2, "gradient_accumulation_steps": 2}},
        {"training": {"optim": "adafactor", "observe_steps": 1}},
        {"training": {"stop_gradient": True, "checkpoint_segments": 2, "observe_steps": 1}},
        {"model": {"memory": False}},
        {"model": {"family": "qwen3", "update_rule": "delta", "sizes": {**SIZES, "head_dim": 16}}},
        {"model": {"gate_init": -2.0}},
        {"model": {"gate_init": 0.0}},
        {"model": {"gate_init": -2.0, "memory": False}},
    ],
    ids=str,
)
def test_every_way_to_train_ends_with_figures(tmp_path: Path, changes: dict[str, Any]) -> None:
    reading = read_recipe(write(tmp_path, **changes))
    figures = train(reading.recipe, reading.text)
    assert figures["steps"] == 6
    assert figures["validation_loss"] < 6
    assert figures.get("stop_gradient", False) == reading.recipe.training.stop_gradient
    through = reading.recipe.data.carried_length or "documents"
    assert figures.get("carried_through") == (through if reading.recipe.training.carry_memory else None)
    assert figures.get("carried_packed", False) == reading.recipe.data.carried_packed
    assert figures.get("reset_probability", 0.0) == reading.recipe.training.reset_probability
    assert figures.get("read_again") == reading.recipe.training.read_again
    assert figures.get("gate_init") == (-2.0 if changes == {"model": {"gate_init": -2.0}} else None)
    without = not reading.recipe.model.memory
    assert (figures["gate_max"] == 0) == without
    assert (figures["validation_loss"] == figures["validation_loss_memory_off"]) == without


@pytest.mark.parametrize(
    ("baseline", "changes"),
    [
        ("full", {"training": {"gradient_checkpointing": True}}),
        ("sliding_window", {"training": {"checkpoint_segments": 2, "optim": "adafactor"}}),
        ("transformer_xl", {"training": {"least_segments": 2, "curriculum_steps": 3}}),
        ("memorizing", {"training": {"checkpoint_segments": 1, "gradient_accumulation_steps": 2}}),
        ("recurrent_memory", {"training": {"detach_every": 2, "optim": "adafactor"}}),
    ],
)
def test_every_baseline_trains_and_loads_again(
    tmp_path: Path, baseline: str, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"recurrent_memory": {"memory_tokens": 4}, "sliding_window": {"window": 24, "sinks": 3}}
    model = {"baseline": baseline, "sizes": SIZES | own.get(baseline, {})}
    path = write(tmp_path, model=model, **changes)
    main(["train", str(path), "--dry-run", "--json"])
    needs = json.loads(capsys.readouterr().out)
    assert needs["activations_gb"] > 0
    main(["train", str(path), "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["steps"] == 6 and figures["validation_loss"] < 6
    gated = baseline == "memorizing"
    assert ("gate_max" in figures) == ("validation_loss_memory_off" in figures) == gated
    loaded = load_model(tmp_path / "run" / "model")
    assert type(loaded).__name__ == needs["model"]
    assert sum(parameter.numel() for parameter in loaded.parameters()) == needs["parameters"]


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_a_checkpoint(
    tmp_path: Path, signal_number: signal.Signals, code: int
) -> None:
    path = write(tmp_path, training={"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1})
    command = [sys.executable, "-c", COMMAND, "train", str(path)]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith("step 3/"):
            assert process.poll() is None, process.stderr.read()
        process.send_signal(signal_number)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == code, errors
    assert f"stopped by {signal_number.name} after step" in errors
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    assert (checkpoint / "manifest.json").exists()


def test_a_signal_to_the_whole_process_group_does_not_take_the_data_away(tmp_path: Path) -> None:
    training = {"max_steps": 100_000, "save_steps": 100_000, "logging_steps": 1, "dataloader_num_workers": 1}
    command = [sys.executable, "-c", COMMAND, "train", str(write(tmp_path, training=training))]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        assert process.stdout is not None and process.stderr is not None
        while not process.stdout.readline().startswith("step 3/"):
            assert process.poll() is None, process.stderr.read()
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert len(list((tmp_path / "run").glob("checkpoint-*/manifest.json"))) == 1


def test_a_training_that_fails_ends_its_data_workers(tmp_path: Path) -> None:
    training = {"max_steps": 100_000, "learning_rate": 1e30, "dataloader_num_workers": 1}
    command = [sys.executable, "-c", COMMAND, "train", str(write(tmp_path, training=training))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 1
    assert "infini: the " in ended.stderr and "with a lower learning rate" in ended.stderr


def test_prompts_are_cut_as_a_base_with_memories_is(tmp_path: Path) -> None:
    family = next(each for each in FAMILIES.values() if each.__name__ == "InfiniLlamaForCausalLM")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = family(family.config_class(vocab_size=256, segment_length=200, **sizes))
    base.save_pretrained(tmp_path / "base")
    assert segment_length_of(ModelRecipe(base=str(tmp_path / "base"))) == 200
    assert segment_length_of(ModelRecipe(base="a name on the Hub", segment_length=64)) == 64
    assert segment_length_of(ModelRecipe(sizes=sizes, segment_length=32)) == 32


def summaries(folder: Path) -> Path:
    """A recipe for a tiny model on summaries of two talks."""
    row = {"text": "We ship in May. " * 9, "queries": ["When?", "What?"], "summaries": ["In May.", "Ships."]}
    other = {"text": "Too late. " * 3, "queries": ["Is it?"], "summaries": ["It is."]}
    (folder / "talks.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (row, other)))
    talks = {"source": f"{folder}/talks.jsonl"}
    data = {"summaries": {"documents": talks, "validation": talks, "max_tokens": 256}}
    rest = {"documents": None, "validation": None, "length": 32_768}
    return write(folder, data=data | rest, training={"loss_chunk": 64})


def test_summaries_train_and_leave_a_model_that_can_be_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = summaries(tmp_path)
    main(["train", str(path), "--dry-run", "--json"])
    needs = json.loads(capsys.readouterr().out)
    assert needs["data"] == f"summaries of {tmp_path}/talks.jsonl" and needs["length"] == 256
    main(["train", str(path), "--training.max_steps=30", "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["validation_loss"] < 4.5  # a guess costs log(257) = 5.55
    assert figures["validation_loss"] != figures["validation_loss_memory_off"]
    model = ["--model", str(tmp_path / "run" / "model"), "--device", "cpu"]
    main(["summaries", f"{tmp_path}/talks.jsonl", *model, "--max_new_tokens", "8", "--json"])
    told = json.loads(capsys.readouterr().out)
    assert [len(document["answers"]) for document in told["documents"]] == [2, 1]


@pytest.mark.parametrize("override", ["--training.least_segments=2", "--training.carry_memory=true"])
def test_settings_that_would_take_summaries_from_documents_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ValueError, match=r"every row of data\.summaries is a whole by itself"):
        read_recipe(summaries(tmp_path), [override])
