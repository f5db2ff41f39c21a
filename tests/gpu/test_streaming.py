"""Sessions and captured steps on a GPU."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infini_attention.models import retrofit
from infini_attention.streaming import Decoder, Session, SessionPool

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

pytestmark = pytest.mark.gpu
GREEDY = {"do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module", params=["linear", "delta"])
def model(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    base = LlamaForCausalLM(config).to("cuda").eval()
    return retrofit(base, segment_length=64, gate_init=0.5, update_rule=request.param)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a")))


def session_of(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, length: int) -> Session:
    session = Session(model, tokenizer, chunk_length=256)
    session.feed(torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(length)))
    return session


def test_captured_steps_equal_reading(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    session = session_of(model, tokenizer, 700)
    branch = session.fork()
    said = list(branch.generate(max_new_tokens=150, **GREEDY))  # more than two segments
    assert branch._seat is not None
    assert branch._seat[0]._graph is not None
    session.feed(said)
    for each in (session, branch):
        each._read_all()
    assert torch.allclose(session._logits, branch._logits, atol=2e-2)
    assert session.history == branch.history


def test_a_pool_says_what_sessions_say_alone(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    sessions = [session_of(model, tokenizer, 300 + 17 * number) for number in range(5)]
    expected = [list(session.fork().generate(max_new_tokens=80, **GREEDY)) for session in sessions]
    pool = SessionPool(Decoder(model, rows=8))
    for session in sessions:
        pool.admit(session, max_new_tokens=80, **GREEDY)
    said: dict[int, list[int]] = {id(session): [] for session in sessions}
    while len(pool):
        for session, token in pool.step():
            said[id(session)].append(token)
    same = [said[id(session)] == wanted for session, wanted in zip(sessions, expected, strict=True)]
    assert sum(same) >= 4  # a near tie may fall either way in a batch of another size


@pytest.mark.parametrize("exact", [False, True])
def test_files_and_snapshots_and_parking(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, exact: bool
) -> None:
    session = session_of(model, tokenizer, 1500)
    session.save(tmp_path / "a.state", exact=exact, snapshots=True)
    loaded = Session.load(tmp_path / "a.state", model, tokenizer, chunk_length=256)
    expected = list(session.fork().generate(max_new_tokens=30, **GREEDY))
    assert list(loaded.fork().generate(max_new_tokens=30, **GREEDY)) == expected
    session.park()
    assert session.info().device == "cpu"
    assert list(session.fork().generate(max_new_tokens=30, **GREEDY)) == expected
    place = session.info().snapshots[1]
    for each in (session, loaded):
        each.rewind(place)
    first, second = (list(each.generate(max_new_tokens=30, **GREEDY)) for each in (session, loaded))
    assert first == second
