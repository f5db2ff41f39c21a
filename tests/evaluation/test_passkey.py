"""`infini passkey` from the prompts to the report: with a reader that knows every answer, and with models."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor
from transformers import LlamaForCausalLM

from infini_attention.baselines import BASELINES
from infini_attention.cli import main
from infini_attention.data.passkey import PasskeyPrompts, Prompt
from infini_attention.data.texts import Text
from infini_attention.data.tokenizers import byte_tokenizer
from infini_attention.evaluation import passkey as module
from infini_attention.evaluation.passkey import Outcome, PasskeyReport, even_depths, passkey
from infini_attention.evaluation.passkey_report import plot, tables
from infini_attention.models import FAMILIES
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.ops import MemoryState
from infini_attention.training import figures as training_figures
from infini_attention.training import material

SEGMENT = 128
LENGTH = 5 * SEGMENT - 1  # the question and the sentence before it end in one segment
DEPTHS = [0.0, 0.5, 1.0]
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
BYTES = byte_tokenizer()
LLAMA = next(family for family in FAMILIES.values() if family.__name__ == "InfiniLlamaForCausalLM")


def config(**settings: Any) -> Any:
    return LLAMA.config_class(vocab_size=256, segment_length=SEGMENT, **SIZES | settings)


class KnowsEveryAnswer:
    """In place of a model: its memory is the text so far, in which it looks up what it was told."""

    config, device, dtype, training = config(), torch.device("cpu"), torch.float32, False
    name_or_path = "knowing"

    def __init__(self) -> None:
        self.read: list[Tensor] = []

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def logits_of(self, hidden: Tensor) -> Tensor:
        return hidden

    def base_model(self, ids: Tensor, **arguments: Any) -> Any:
        self.read.append(ids)
        layer = arguments[CACHE_ARGUMENT].layers[0]
        past = ids[:, :0] if layer.state is None else remembered(layer.state)
        text, logits = torch.cat([past, ids], dim=1), torch.zeros(*ids.shape, 256)
        for row, said in enumerate(map(bytes, text.tolist())):
            told = re.findall(rb"The pass key is (\d+)\. Remember", said)
            first = said.rfind(b"The pass key is ") + 15 - past.shape[1]
            for place, digit in enumerate(told[-1] if told else b"", start=first):
                if 0 <= place < ids.shape[1]:
                    logits[row, place, digit] = 1
        layer.advance(remembering(text, (layer.seen + ids.shape[1]) % SEGMENT), ids.shape[1])
        return SimpleNamespace(last_hidden_state=logits)


def remembering(text: Tensor, opened: int) -> MemoryState:
    """A state whose memory is a text, with an open segment that is its end."""
    whole, end = (x.float()[:, None, :, None] for x in (text, text[:, text.shape[1] - opened :]))
    zeros = torch.zeros(len(text), 1, whole.shape[2])
    lengths = torch.full((len(text),), text.shape[1])
    return MemoryState(whole, zeros, torch.zeros_like(whole), zeros, end, end, lengths, SEGMENT)


def remembered(state: MemoryState) -> Tensor:
    """The text; what the open segment has of it where the memory is empty."""
    return (state.memory if state.memory.any() else state.local_value)[:, 0, :, 0].long()


def ask(model: Any, **settings: Any) -> PasskeyReport:
    exactly = {"lengths": [LENGTH], "depths": DEPTHS, "samples": 4, "exact_lengths": True}
    return passkey(model, BYTES, **exactly | settings)


def test_questions_end_at_all_places_of_a_segment_unless_lengths_are_exact() -> None:
    model = KnowsEveryAnswer()
    report = ask(model, depths=[0.5], samples=32, batch_rows=1, exact_lengths=False)
    assert report.score(LENGTH).exact_match.share == 1
    reads = len(model.read) // 32
    ends = [sum(part.shape[1] for part in model.read[n * reads : (n + 1) * reads - 1]) for n in range(32)]
    assert LENGTH - SEGMENT < min(ends) - 3 < LENGTH - 0.9 * SEGMENT
    assert LENGTH - 0.1 * SEGMENT < max(ends) - 3 <= LENGTH
    assert len(set(ends)) > 28


@pytest.fixture(scope="module")
def untrained() -> Any:
    """A model that says nothing but digits, and those at random."""
    torch.manual_seed(0)
    model = LLAMA(config(initializer_range=0.5)).eval()
    with torch.no_grad():
        model.lm_head.weight[[token for token in range(256) if not chr(token).isdigit()]] = 0
    return model


@pytest.fixture(scope="module")
def knowing() -> PasskeyReport:
    return ask(KnowsEveryAnswer(), lengths=[LENGTH, 2 * LENGTH], batch_rows=5)


def test_who_knows_every_answer_scores_everything(knowing: PasskeyReport) -> None:
    assert len(knowing.outcomes) == 2 * 3 * 4
    for length in (LENGTH, 2 * LENGTH):
        score = knowing.score(length)
        assert (score.exact_match.share, score.exact_match.trials) == (1.0, 12)
        assert score.token_accuracy.share == 1.0
        assert score.exact_match.low < 0.8  # twelve prompts prove no more


def test_without_memory_only_what_attention_reaches_is_known(knowing: PasskeyReport) -> None:
    for outcome in knowing.outcomes:
        assert outcome.in_reach == (outcome.depth == 1.0)
        assert (outcome.right_without_memory == outcome.tokens) == outcome.in_reach
    control = knowing.score(LENGTH).control
    assert control is not None and (control.share, control.trials) == (0.0, 8)
    assert knowing.score(LENGTH, 1.0).control is None


def test_who_guesses_scores_chance(untrained: Any) -> None:
    score = ask(untrained, samples=40).score(LENGTH)
    assert score.exact_match.share <= 0.02
    assert 0.02 < score.token_accuracy.share < 0.25
    assert score.control is not None and score.control.share <= 0.02


@pytest.mark.parametrize("length", [LENGTH, 4 * SEGMENT + 39])
def test_answers_are_those_of_the_whole_prompt_in_one_pass(untrained: Any, length: int) -> None:
    report = ask(untrained, samples=12, lengths=[length], batch_rows=7, chunk_tokens=100)
    right = {(outcome.depth, outcome.sample): outcome.right for outcome in report.outcomes}
    for (depth, sample), prompt in asked(length, 12).items():
        assert likeliest(untrained, prompt, 0) == right[depth, sample]
    assert any(right.values())


def test_the_control_is_the_question_by_itself_where_it_begins_a_segment(untrained: Any) -> None:
    question = len("What is the pass key? The pass key is  ")
    report = ask(untrained, samples=12, lengths=[4 * SEGMENT + question])
    right = {(outcome.depth, outcome.sample): outcome.right_without_memory for outcome in report.outcomes}
    for (depth, sample), prompt in asked(4 * SEGMENT + question, 12).items():
        assert prompt.question_start == 4 * SEGMENT
        assert likeliest(untrained, prompt, 4 * SEGMENT) == right[depth, sample]
    assert any(right.values())


def asked(length: int, samples: int) -> dict[tuple[float, int], Prompt]:
    """The prompts of `ask`, by depth and sample."""
    prompts, cells = PasskeyPrompts(BYTES), [(depth, sample) for sample in range(samples) for depth in DEPTHS]
    return {
        cell: prompts.draft(number).prompt(length=length, depth=cell[0]) for number, cell in enumerate(cells)
    }


@torch.no_grad()
def likeliest(model: Any, prompt: Prompt, start: int) -> int:
    """How much of the answer is likeliest to a model that reads the prompt from `start` at once."""
    logits = model(torch.from_numpy(prompt.tokens(start, prompt.whole - 1))[None]).logits[0]
    return int((logits[prompt.length - 1 - start :].argmax(dim=-1).numpy() == prompt.answer).sum())


@pytest.mark.parametrize("chunk_tokens", [None, 128, 77, 10_000])
def test_every_token_is_read_once_and_no_answer_is(chunk_tokens: int | None) -> None:
    model = KnowsEveryAnswer()
    ask(model, samples=1, chunk_tokens=chunk_tokens)
    *reading, question, control = model.read
    assert question.equal(control)
    for row, prompt in zip(torch.cat([*reading, question], dim=1), asked(LENGTH, 1).values(), strict=True):
        np.testing.assert_array_equal(row, prompt.tokens(0, prompt.whole - 1))


def test_answers_of_different_lengths_stand_side_by_side() -> None:
    report = ask(KnowsEveryAnswer(), variant="landmark", samples=20)
    assert {outcome.tokens for outcome in report.outcomes} >= {4, 5}
    assert report.score(LENGTH).exact_match.share == 1.0


def test_prose_is_read_around_the_key(tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("To be, or not to be, that is the question. " * 9)
    model = KnowsEveryAnswer()
    report = ask(model, variant="varied", prose=Text("prose", (tmp_path / "prose.txt",)), samples=1)
    assert report.setting.prose == "prose"
    assert b"that is the question" in bytes(model.read[0][0].tolist())
    assert report.score(LENGTH).exact_match.share == 1.0


def test_what_was_cut_off_goes_on_and_ends_the_same(
    knowing: PasskeyReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, settings = tmp_path / "new" / "figures.json", {"lengths": [LENGTH, 2 * LENGTH], "batch_rows": 5}
    write, model = module.write_whole, KnowsEveryAnswer()

    def write_and_stop(*arguments: Any) -> None:
        write(*arguments)
        if sum(len(ids) for ids in model.read) >= 3 * 5 * 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module, "write_whole", write_and_stop)
        ask(model, output=output, **settings)
    kept = json.loads(output.read_text())
    assert 0 < len(kept["outcomes"]) < 24 and len(kept["outcomes"]) % 5 == 0
    model = KnowsEveryAnswer()
    report = ask(model, output=output, **settings)
    assert report.outcomes == knowing.outcomes
    rows = [len(ids) for ids in model.read if ids.shape[1] < 50]  # a question and its control
    assert sum(rows) == 2 * (24 - len(kept["outcomes"]))
    assert [path.name for path in output.parent.iterdir()] == ["figures.json"]
    model = KnowsEveryAnswer()
    assert ask(model, output=output, **settings).outcomes == knowing.outcomes and not model.read


def test_a_file_with_something_else_is_refused_in_words(tmp_path: Path, untrained: Any) -> None:
    output = tmp_path / "figures.json"
    ask(KnowsEveryAnswer(), samples=1, output=output)
    written = output.read_text()
    with pytest.raises(
        ValueError, match=r"holds other figures: seed is 0 there and 1 here; name another file"
    ):
        ask(KnowsEveryAnswer(), samples=1, output=output, seed=1)
    with pytest.raises(ValueError, match=r"fingerprint is '\w+' there"):
        ask(untrained, samples=1, output=output)
    assert output.read_text() == written
    output.write_text("{}")
    with pytest.raises(ValueError, match="was not written by infini passkey"):
        ask(untrained, samples=1, output=output)


def test_a_changed_weight_is_another_model(tmp_path: Path) -> None:
    model = LLAMA(config()).eval()
    ask(model, samples=1, output=tmp_path / "figures.json")
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    with pytest.raises(ValueError, match="holds other figures: fingerprint"):
        ask(model, samples=1, output=tmp_path / "figures.json")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lengths": [LENGTH, 200]}, "a prompt of 200 tokens has no room"),
        ({"lengths": []}, "lengths are []; give at least one"),
        ({"depths": [0.5, 0.5]}, "depths are [0.5, 0.5]; give at least one, and each once"),
        ({"depths": [2.0]}, "depth is 2.0; give a share"),
        ({"samples": 0}, "samples is 0; give at least 1"),
        ({"batch_rows": 0}, "batch_rows is 0; give at least 1"),
        ({"chunk_tokens": -1}, "chunk_tokens is -1; give at least 1"),
        ({"prose": Text("nothing", (Path("/dev/null"),)), "variant": "varied"}, "nothing is empty"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_read(settings: dict[str, Any], words: str) -> None:
    model = KnowsEveryAnswer()
    with pytest.raises(ValueError, match=re.escape(words)):
        ask(model, **settings)
    assert not model.read


def test_a_model_without_memories_is_refused() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    family = BASELINES["sliding_window"][LlamaForCausalLM]
    model = family(family.config_class(vocab_size=256, **sizes)).eval()
    with pytest.raises(ValueError, match="is of type sliding_window_llama, which has no memory to reset"):
        passkey(model, BYTES)


def test_a_model_in_training_mode_is_refused(untrained: Any) -> None:
    model = LLAMA(config()).train()
    with pytest.raises(ValueError, match=r"call model\.eval"):
        ask(model)


def test_depths_are_even() -> None:
    assert even_depths(5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    with pytest.raises(ValueError, match="depths is 1; give at least 2"):
        even_depths(1)


@pytest.fixture
def mixed(knowing: PasskeyReport) -> PasskeyReport:
    """Figures that differ from cell to cell."""
    outcomes = [
        Outcome(length, depth, sample, 4, 4 if sample < hits else 2, 0, depth == 1.0)
        for length, row in ((LENGTH, (4, 3, 4)), (2 * LENGTH, (1, 0, 4)))
        for depth, hits in zip(DEPTHS, row, strict=True)
        for sample in range(4)
    ]
    return PasskeyReport(knowing.setting, knowing.provenance, outcomes, 1.5)


def printed(report: PasskeyReport) -> str:
    console = Console(width=120)
    with console.capture() as capture:
        for table in tables(report):
            console.print(table)
    return re.sub(r" +", " ", capture.get())


def test_tables_show_every_cell_and_every_interval(mixed: PasskeyReport) -> None:
    shown = printed(mixed)
    assert "639 100 75 100" in shown and "1,278 25 0 100" in shown
    assert "639 91.7 (64.6 to 98.5) 95.8" in shown
    assert "0.0 (0.0 to 32.4)" in shown  # the control, of eight
    for words in (
        "4 prompts a cell",
        "over 12 prompts",
        "knowing (llama)",
        "segments of 128",
        "linear rule, elu1",
    ):
        assert words in shown.replace("infini_", "")


def test_json_has_everything_in_one_line(mixed: PasskeyReport) -> None:
    line = mixed.to_json()
    content = json.loads(line)
    assert "\n" not in line
    assert [cell["exact_match"]["share"] for cell in content["cells"]] == [1, 0.75, 1, 0.25, 0, 1]
    assert content["by_length"][0]["token_accuracy"]["share"] == pytest.approx(23 / 24)
    assert len(content["outcomes"]) == 24
    assert {"command", "commit", "date"} <= set(content["provenance"])


def test_the_heat_map_is_written_where_asked(mixed: PasskeyReport, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib: pip install 'infini-attention[demo]'")
    path = tmp_path / "new" / "passkey.png"
    plot(mixed, path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_recipe_trains_a_model_and_the_command_asks_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("accelerate", reason="needs accelerate: pip install 'infini-attention[train]'")
    monkeypatch.setattr(material, "HELD_OUT_PROMPTS", 3)
    recipe = {
        "model": {"sizes": SIZES, "segment_length": 64},
        "data": {"tokenizer": "bytes", "passkey": {"examples": 8, "least_segments": 4, "most_segments": 5}},
        "training": {
            "output_dir": str(tmp_path / "run"),
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "use_cpu": True,
            "report_to": "none",
        },
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    main(["train", str(tmp_path / "recipe.yaml"), "--json"])
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    for segments in (5, 20):
        for memory in ("", "_memory_off"):
            assert 0 <= figures[f"exact_match_{segments}_segments{memory}"] <= 1
    command = ["passkey", "--model", figures["output"], "--device", "cpu", "--lengths", "[300, 400]"]
    command += ["--depths", "2", "--samples", "1", "--keys", "1", "-o", str(tmp_path / "figures.json")]
    main([*command, "--json"])
    line = capsys.readouterr().out.strip()
    assert json.loads(line) == json.loads((tmp_path / "figures.json").read_text())
    assert json.loads(line)["setting"]["depths"] == [0.0, 1.0]
    main(command)
    assert "exact match by depth, %" in re.sub(r"\s+", " ", capsys.readouterr().out)


def test_the_exact_match_after_training_is_of_whole_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = torch.full((3, 6), -100)
    wanted[:, 2:4] = torch.tensor([[1, 2], [1, 2], [3, 4]])
    said = torch.nn.functional.one_hot(wanted.clamp(min=0), 8).float()
    said[1, 3] = said[1, 0]  # one of the second's two tokens is wrong

    class Model(torch.nn.Module):
        def forward(self, logits_to_keep: torch.Tensor, **_: Any) -> SimpleNamespace:
            return SimpleNamespace(logits=said[:, logits_to_keep])

    trainer: Any = SimpleNamespace(
        model=Model(),
        get_eval_dataloader=lambda part: [{"input_ids": wanted, "shift_labels": wanted}],
        accelerator=SimpleNamespace(reduce=lambda counts: counts),
        args=SimpleNamespace(device="cpu"),
    )
    assert training_figures._exact_match(trainer, None) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"training": {"least_segments": 2}}, "would cut answers off"),
        ({"data": {"copy_task": {"examples": 1}}}, "data has copy_task and passkey; give one of"),
        ({"data": {"tokenizer": None}}, "data.tokenizer is not set"),
    ],
    ids=str,
)
def test_recipes_that_cannot_be_right_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str, read: Callable[..., Any]
) -> None:
    with pytest.raises(ValueError, match=words):
        read(changes)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Any]:
    from infini_attention.training.recipe import read_recipe

    def call(changes: dict[str, dict[str, Any]]) -> Any:
        recipe: dict[str, dict[str, Any]] = {
            "model": {"sizes": SIZES, "segment_length": 64},
            "data": {"tokenizer": "bytes", "passkey": {"examples": 8}},
            "training": {"output_dir": str(tmp_path / "run"), "use_cpu": True},
        }
        for part, fields in changes.items():
            recipe[part] |= fields
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        return read_recipe(tmp_path / "recipe.yaml")

    return call
