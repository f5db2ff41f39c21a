"""`infini gates` from the model to the tables: against gates set by hand and figures computed directly."""

import inspect
import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

from infini_attention import cli
from infini_attention.data.passkey import ANSWER, DIGITS, ECHO, HEADING, PasskeyPrompts, Prompt
from infini_attention.data.tokenizers import byte_tokenizer
from infini_attention.evaluation.gates import KINDS, GatesReport, Kind, Prompts, gates
from infini_attention.evaluation.gates_report import plot, tables
from infini_attention.models import FAMILIES
from infini_attention.ops import infini_attention

SEGMENT, LENGTH, SAMPLES = 64, 5 * 64 + 23, 2
HEADS = 4
SIZES = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}
BYTES = byte_tokenizer()
LLAMA = next(family for family in FAMILIES.values() if family.__name__ == "InfiniLlamaForCausalLM")


def make(logit: float | None = None, **settings: Any) -> Any:
    """A tiny model, its gates all at `logit` or each somewhere else."""
    torch.manual_seed(0)
    model = LLAMA(LLAMA.config_class(**SIZES | {"segment_length": SEGMENT} | settings)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("memory_gate.logits"):
            torch.nn.init.normal_(parameter, std=2) if logit is None else torch.nn.init.constant_(
                parameter, logit
            )
    return model


def measure(model: Any, **settings: Any) -> GatesReport:
    return gates(model, BYTES, **{"prompts": Prompts(samples=SAMPLES), "length": LENGTH} | settings)


def by_name(report: GatesReport) -> dict[str, Kind]:
    return {kind.name: kind for kind in report.kinds}


def read_prompts() -> list[Prompt]:
    """The prompts of `measure`, made directly."""
    drawn = PasskeyPrompts(BYTES)
    return [drawn.draft(n).prompt(length=LENGTH, depth=depth) for n, depth in enumerate((0.25, 0.75))]


def whole(prompt: Prompt) -> tuple[Tensor, Tensor]:
    """All ids and kinds of a prompt."""
    ids, kinds = prompt.tokens(0, prompt.whole), prompt.kinds(0, prompt.whole)
    return torch.from_numpy(ids), torch.from_numpy(kinds).long()


@pytest.fixture(scope="module")
def model() -> Any:
    return make()


@pytest.fixture(scope="module")
def report(model: Any) -> GatesReport:
    return measure(model)


def test_gates_set_by_hand_are_shown_exactly() -> None:
    model, logits = make(), torch.linspace(-6, 6, 2 * HEADS).view(2, HEADS)
    with torch.no_grad():
        for layer, row in zip(model.model.layers, logits, strict=True):
            layer.self_attn.memory_gate.logits.copy_(row)
    assert measure(model).gates == logits.sigmoid().tolist()


@pytest.mark.parametrize(
    "settings",
    [{"empty_memory": "local"}, {"empty_memory": "gated"}, {"local_attention": "sliding"}],
    ids=str,
)
@pytest.mark.parametrize(("logit", "share"), [(-1e4, 0.0), (1e4, 1.0)])
def test_shut_gates_give_the_memory_no_share_and_open_ones_all(
    logit: float, share: float, settings: dict[str, str]
) -> None:
    report = measure(make(logit, **settings))
    assert [kind.name for kind in report.kinds] == [*KINDS]
    for kind in report.kinds:
        torch.testing.assert_close(kind.share, [[share] * HEADS] * 2, rtol=0, atol=1e-12)


def test_shut_gates_have_nothing_to_take_off_the_loss() -> None:
    for kind in measure(make(-1e4)).kinds:
        assert kind.memory_gain == 0


@pytest.mark.parametrize("update_rule", ["linear", "delta"])
def test_shares_are_those_of_the_reference(update_rule: str) -> None:
    model = make(num_hidden_layers=1, update_rule=update_rule)
    kinds = by_name(measure(model))
    prompts = read_prompts()
    shares = torch.cat([shares_of_reference(model, whole(prompt)[0])[SEGMENT:] for prompt in prompts])
    read = torch.cat([whole(prompt)[1][SEGMENT:] for prompt in prompts])
    for number, name in enumerate(KINDS):
        expected = shares[read == number].mean(dim=0)
        torch.testing.assert_close(torch.tensor(kinds[name].share), expected[None], rtol=1e-4, atol=1e-5)
        assert kinds[name].with_memory == (read == number).sum()


def shares_of_reference(model: Any, ids: Tensor) -> Tensor:
    """(tokens, heads) of a model of one layer."""
    attention, kept = model.model.layers[0].self_attn, {}
    hook = attention.register_forward_pre_hook(lambda _, a, given: kept.update(given), with_kwargs=True)
    with torch.no_grad():
        model(ids[None])
        hook.remove()
        query, key, value = attention._project(kept["hidden_states"])
        rotation = kept["segment_context"].rotations["full_attention"]
        local_query, local_key = attention._rotate(query, key, rotation)
        settings = {
            "segment_length": SEGMENT,
            "update_rule": model.config.update_rule,
            "backend": "reference",
        }
        settings |= {"local_query": local_query, "local_key": local_key, "empty_memory": "gated"}
        local, memory = (
            infini_attention(query, key, value, torch.full((HEADS,), logit), **settings)[0][0].norm(dim=-1)
            for logit in (-1e4, 1e4)
        )
        gate = attention.memory_gate.logits.sigmoid()[:, None]
        return (gate * memory / (gate * memory + (1 - gate) * local)).T


def test_losses_are_those_of_the_model_as_it_is_and_with_shut_gates(model: Any, report: GatesReport) -> None:
    kinds = by_name(report)
    for name, reader in (("loss", model), ("loss_memory_off", make(-1e4))):
        nats, predicted = (
            torch.cat(x) for x in zip(*(nats_of(reader, p) for p in read_prompts()), strict=True)
        )
        for number, kind in enumerate(KINDS):
            expected = nats[predicted == number].mean().item()
            assert getattr(kinds[kind], name) == pytest.approx(expected, rel=1e-5)
            assert kinds[kind].predicted == (predicted == number).sum()
    assert kinds["answer"].loss != kinds["answer"].loss_memory_off


@torch.no_grad()
def nats_of(model: Any, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Each token's loss but the first's, all read at once, and its kind."""
    ids, kinds = whole(prompt)
    return F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none"), kinds[1:]


def test_every_token_counts_once(report: GatesReport) -> None:
    prompts = read_prompts()
    everything = sum(prompt.whole for prompt in prompts)
    assert sum(kind.tokens for kind in report.kinds) == everything
    assert sum(kind.predicted for kind in report.kinds) == everything - SAMPLES
    assert sum(kind.with_memory for kind in report.kinds) == everything - SAMPLES * SEGMENT
    heading, *numbers = (by_name(report)[KINDS[kind]] for kind in (HEADING, DIGITS, ECHO, ANSWER))
    assert [kind.tokens for kind in numbers] == [SAMPLES * 4] * 3
    assert heading.with_memory == heading.tokens - SAMPLES * SEGMENT


@pytest.mark.parametrize("chunk_tokens", [SEGMENT, 77, 29])
def test_chunking_changes_no_figure(model: Any, report: GatesReport, chunk_tokens: int) -> None:
    for kind, other in zip(report.kinds, measure(model, chunk_tokens=chunk_tokens).kinds, strict=True):
        figures, expected = asdict(other), asdict(kind)
        assert figures.pop("name") == expected.pop("name")
        torch.testing.assert_close(figures, expected, rtol=1e-4, atol=1e-5)


def test_no_more_than_a_chunk_is_read_at_once(model: Any) -> None:
    lengths = []
    hook = model.model.register_forward_pre_hook(lambda _, given: lengths.append(given[0].shape[1]))
    measure(model, chunk_tokens=2 * SEGMENT)
    hook.remove()
    assert max(lengths) == 2 * SEGMENT
    assert sum(lengths) == 2 * sum(prompt.whole for prompt in read_prompts())  # with the memory, and without


def test_the_model_stays_as_it_was() -> None:
    model = make()
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    measure(model)
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_of_a_text_all_is_prose(model: Any, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("To be, or not to be, that is the question. " * 9)
    report = gates(model, BYTES, text=str(tmp_path / "prose.txt"), length=3 * SEGMENT)
    (kind,) = report.kinds
    assert (kind.name, kind.tokens, kind.predicted) == ("prose", 3 * SEGMENT, 3 * SEGMENT - 1)
    assert kind.with_memory == 2 * SEGMENT
    assert (report.setting.text, report.setting.prompts) == (str(tmp_path / "prose.txt"), None)
    longer = gates(model, BYTES, text=str(tmp_path / "prose.txt"), length=10_000)
    assert longer.kinds[0].tokens == longer.setting.length == 9 * 43


def test_the_background_of_varied_is_prose(model: Any, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("To be, or not to be, that is the question. " * 9)
    prompts = Prompts("varied", samples=1, prose=str(tmp_path / "prose.txt"))
    assert [kind.name for kind in measure(model, prompts=prompts).kinds] == ["prose", *KINDS[1:]]


def test_what_stands_in_the_first_segment_has_no_share() -> None:
    report = measure(make(segment_length=256), length=400)
    assert by_name(report)["heading"].share is None
    assert by_name(report)["answer"].share is not None
    assert "heading" in printed(report)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"length": 200}, "a prompt of 200 tokens has no room"),
        ({"length": 1}, "length is 1; give at least 2"),
        ({"chunk_tokens": 0}, "chunk_tokens is 0; give at least 1"),
        ({"prompts": Prompts(samples=0)}, "samples is 0; give at least 1"),
        ({"prompts": Prompts("varied")}, "prose is missing; name a text"),
        ({"prompts": Prompts("varied", prose="/dev/null")}, "/dev/null has 0 tokens; name a text"),
        ({"text": "a.txt"}, "text is a.txt, which is read as it is; leave the settings of prompts out"),
        ({"text": "/dev/null", "prompts": Prompts()}, "/dev/null has 0 tokens; name a text of at least 2"),
    ],
    ids=str,
)
def test_mistakes_are_named(model: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        measure(model, **settings)


def test_a_model_without_memories_or_in_training_mode_is_refused() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    with pytest.raises(ValueError, match="LlamaForCausalLM has no memories; give an infini"):
        measure(LlamaForCausalLM(LlamaConfig(**SIZES)).eval())
    with pytest.raises(ValueError, match=r"call model\.eval"):
        measure(make().train())


def printed(report: GatesReport) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        for table in tables(report):
            console.print(table)
    return re.sub(r" +", " ", capture.get())


def test_tables_say_everything(report: GatesReport) -> None:
    text = printed(report)
    for layer, row in enumerate(report.gates):
        assert f"\n {layer} {' '.join(f'{100 * gate:.1f}' for gate in row)}" in text
    share = torch.tensor([kind.share for kind in report.kinds])
    for layer in range(2):
        means = share[:, layer].mean(dim=1).tolist()
        assert f"\n {layer} {' '.join(f'{100 * mean:.1f}' for mean in means)}" in text
    for kind in report.kinds:
        assert f"{kind.name} {kind.tokens:,} {kind.with_memory:,} {kind.loss:.3f}" in text


def test_a_layer_without_memory_is_shown_as_such(tmp_path: Path) -> None:
    report = measure(make(num_hidden_layers=3, infini_layers=[0, 2]))
    assert (report.layers, report.layer_count, len(report.gates)) == ([0, 2], 3, 2)
    assert "Without memory: layers 1." in printed(report)
    assert re.search(r"\n 1( -){4} ", printed(report))
    plot(report, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_many_heads_take_several_tables(tmp_path: Path) -> None:
    report = measure(make(num_attention_heads=26, hidden_size=104))
    assert len(tables(report)) == 3 + 2
    assert f"{100 * report.gates[1][25]:.1f}" in printed(report)
    plot(report, tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")


def test_the_report_is_a_line_of_json(report: GatesReport) -> None:
    line = report.to_json()
    assert "\n" not in line
    read = json.loads(line)
    assert read["gates"] == report.gates
    assert read["kinds"] == [asdict(kind) for kind in report.kinds]
    assert read["setting"]["prompts"]["variant"] == "paper"


def test_the_command_shows_a_model_by_name(
    base_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["gates", "--model", str(base_folder), "--segment_length", "64", "--device", "cpu"]
    command += ["--length", "300", "--samples", "1", "--plot", str(tmp_path / "new" / "gates.png")]
    cli.main([*command, "--json"])
    report = json.loads(capsys.readouterr().out)
    torch.testing.assert_close(report["gates"], torch.full((2, 4), -4.0).sigmoid().tolist())
    assert (tmp_path / "new" / "gates.png").exists()
    cli.main(command)
    assert "gates, %" in capsys.readouterr().out


def test_the_command_reads_what_the_function_reads_by_default() -> None:
    command, function = (inspect.signature(each).parameters for each in (cli.gates, gates))
    for name in ("text", "length", "chunk_tokens"):
        assert command[name].default == function[name].default
    for field in fields(Prompts):
        assert command[field.name].default == field.default
