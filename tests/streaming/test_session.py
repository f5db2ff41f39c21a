import gc
import io
import multiprocessing
import random
import re
import sys
import threading
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.streaming import Decoder, Session, SessionPool

MakeSession = Callable[..., Session]
GREEDY = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None}


def words(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(60), k=count)


def said(session: Session, **options: object) -> list[int]:
    return list(session.generate(**{**GREEDY, **options}))


def same_state(first: Session, second: Session) -> bool:
    """Whether two sessions are alike to the last bit, in all that decides what comes next."""
    for session in (first, second):
        session._read_all()
    pairs = zip(first._own_cache().layers, second._own_cache().layers, strict=True)
    for ours, theirs in pairs:
        for name, value in vars(ours.state).items():
            if isinstance(value, torch.Tensor) and not torch.equal(value, getattr(theirs.state, name)):
                return False
    return torch.equal(first._logits, second._logits) and first.history == second.history


def test_generation_equals_greedy_decoding_by_the_model(make_session: MakeSession) -> None:
    session = make_session()
    session.feed(words(29))
    ids, cache = torch.tensor([words(29)]), InfiniCache(session.model.config)
    expected = []
    with torch.inference_mode():
        for _ in range(20):
            output = session.model(ids, use_cache=True, **{CACHE_ARGUMENT: cache})
            ids = output.logits[:, -1:].argmax(-1)
            expected.append(int(ids))
    assert said(session) == expected


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 40, 61])
def test_pieces_of_feeding_change_no_bit(make_session: MakeSession, length: int) -> None:
    whole, pieces = make_session(), make_session()
    ids, cuts = words(length), random.Random(length)
    whole.feed(ids)
    while ids:
        size = cuts.randint(1, 11)
        pieces.feed(ids[:size])
        ids = ids[size:]
    assert same_state(whole, pieces)


def test_every_kind_of_source_is_the_same_text(
    make_session: MakeSession, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ids = words(50)
    text = " ".join(f"w{number}" for number in ids)
    path = tmp_path / "text.txt"
    path.write_text(text)
    expected = make_session()
    expected.feed(ids)
    sources = [
        text,
        path,
        torch.tensor(ids),
        iter(ids),
        (text[start : start + 7] for start in range(0, len(text), 7)),
        io.StringIO(text),
        io.BytesIO(text.encode()),
    ]
    for source in sources:
        session = make_session()
        assert session.feed(source) == 50
        assert session.history == expected.history


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("cut", [0, 1, 8, 13, 16, 24, 29])
def test_a_loaded_session_goes_on_as_if_it_had_never_stopped(
    make_session: MakeSession, tmp_path: Path, exact: bool, cut: int
) -> None:
    ids, path = words(50), tmp_path / "a.state"
    whole, first = make_session(), make_session()
    whole.feed(ids)
    first.feed(ids[:cut])
    first.save(path, exact=exact)
    loaded = Session.load(path, first.model, first.tokenizer, chunk_length=first.chunk_length)
    assert loaded.history == first.history
    loaded.feed(ids[cut:])
    assert said(loaded.fork()) == said(whole.fork())
    if exact:
        assert same_state(whole, loaded)


def test_a_file_of_whole_segments_can_be_written_after_autocast(
    make_session: MakeSession, tmp_path: Path
) -> None:
    session, path = make_session(), tmp_path / "text.state"
    with torch.autocast("cpu", torch.bfloat16):
        session.feed(words(40))
    session.save(path, exact=False)
    loaded = Session.load(path, session.model, session.tokenizer)
    assert loaded.tokens == 40


@pytest.mark.parametrize("spoken", [1, 5, 14])
def test_an_exact_file_keeps_what_was_generated_bit_for_bit(
    make_session: MakeSession, tmp_path: Path, spoken: int
) -> None:
    session, path = make_session(), tmp_path / "a.state"
    session.feed(words(21))
    said(session, max_new_tokens=spoken)
    session.save(path, exact=True)
    loaded = Session.load(path, session.model, session.tokenizer, chunk_length=session.chunk_length)
    assert same_state(session.fork(), loaded.fork())
    assert said(loaded) == said(session)


def _load_and_say(
    path: Path, make: Callable[[], Session], results: "multiprocessing.Queue[list[int]]"
) -> None:
    torch.set_num_threads(1)
    fresh = make()
    session = Session.load(path, fresh.model, fresh.tokenizer, chunk_length=fresh.chunk_length)
    session.feed(words(9, seed=5))
    results.put(said(session))


@pytest.mark.parametrize("exact", [False, True])
def test_another_process_goes_on_with_the_same_tokens(
    make_session: MakeSession, tmp_path: Path, exact: bool
) -> None:
    session, path = make_session(), tmp_path / "a.state"
    session.feed(words(37))
    session.save(path, exact=exact)
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=_load_and_say, args=(path, make_session, results))
    child.start()
    theirs = results.get(timeout=60)
    child.join()
    session.feed(words(9, seed=5))
    assert theirs == said(session)


def test_a_fork_and_its_origin_go_separate_ways(make_session: MakeSession) -> None:
    session = make_session()
    session.feed(words(27))
    branch = session.fork()
    expected = said(session.fork())
    branch.feed(words(30, seed=1))
    said(branch)
    assert said(session) == expected
    fresh = make_session()
    fresh.feed(words(27))
    assert said(fresh) == expected


@pytest.mark.parametrize("to_token", [0, 1, 16, 32, 48, 70, 72, 75, 77])
def test_a_rewound_session_equals_a_fresh_one_at_that_point(make_session: MakeSession, to_token: int) -> None:
    session, fresh = make_session(), make_session()
    session.feed(words(77))
    possible = {0, *session.info().snapshots, *range(65, 78)}
    if to_token not in possible:
        with pytest.raises(ValueError, match="those from 65 to 77"):
            session.rewind(to_token)
        return
    session.rewind(to_token)
    fresh.feed(words(77)[:to_token])
    assert session.tokens == fresh.tokens == to_token
    assert session.history == fresh.history
    for each in (session, fresh):
        each.feed(words(12, seed=3))
    assert said(session) == said(fresh)


def test_generation_can_go_on_right_after_a_rewind(make_session: MakeSession) -> None:
    session, fresh = make_session(), make_session()
    session.feed(words(77))
    session.rewind(32)
    fresh.feed(words(32))
    assert said(session) == said(fresh)


def test_snapshots_survive_a_file_and_generation_takes_them(
    make_session: MakeSession, tmp_path: Path
) -> None:
    session, path = make_session(), tmp_path / "a.state"
    session.feed(words(33))
    said(session, max_new_tokens=25)
    assert session.info().snapshots == [16, 32, 40, 48, 56]
    session.save(path, snapshots=True)
    loaded = Session.load(path, session.model, session.tokenizer, chunk_length=session.chunk_length)
    for each in (session, loaded):
        each.rewind(48)
    assert said(session) == said(loaded)


def test_snapshots_are_bounded_and_thin_out_with_age(make_session: MakeSession) -> None:
    session = make_session(snapshots=6)
    session.feed(words(1600))
    places = session.info().snapshots
    gaps = [after - before for before, after in zip([0, *places], places, strict=False)]
    assert len(places) == 6
    assert places[-1] == 1600
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] <= 2 * session.chunk_length


def test_asking_leaves_the_session_as_it_was(make_session: MakeSession) -> None:
    session = make_session()
    session.feed(words(20))
    before = session.history
    first = session.ask("w3 w4", max_new_tokens=5)
    assert session.ask("w3 w4", max_new_tokens=5) == first
    assert session.history == before
    session.ask("w3 w4", max_new_tokens=5, remember=True)
    assert session.tokens > 20


def test_sampling_is_repeatable_and_takes_transformers_names(make_session: MakeSession) -> None:
    session = make_session()
    session.feed(words(20))
    drawn = {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9, "max_new_tokens": 12}
    first, again, other = (said(session.fork(), seed=seed, **drawn) for seed in (1, 1, 2))
    assert first == again != other
    with pytest.raises(ValueError, match="num_beams are not supported"):
        session.generate(num_beams=4)
    for wrong in (
        {"top_p": 1.5},
        {"top_p": None},
        {"max_new_tokens": 2.5},
        {"do_sample": "no"},
        {"eos_token_id": "w1"},
        {"temperature": 0, "do_sample": True},
        {"seed": "x"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))} is"):
            session.ask("w1", remember=True, **wrong)
    assert session.tokens == 20


def test_an_end_of_sequence_token_is_the_last(make_session: MakeSession) -> None:
    session = make_session()
    session.feed(words(20))
    tokens = said(session.fork())
    assert said(session, eos_token_id=tokens[3]) == tokens[: tokens.index(tokens[3]) + 1]


def test_a_session_in_use_refuses_everything_else(make_session: MakeSession) -> None:
    session = make_session()
    session.feed(words(20))
    stream = session.generate(**GREEDY)
    next(stream)
    for call in (lambda: session.feed([1]), session.fork, session.reset, lambda: next(session.generate())):
        with pytest.raises(RuntimeError, match="in use"):
            call()
    stream.close()
    assert session.tokens == 21
    session.feed([1])


def test_another_thread_is_refused_while_one_feeds(make_session: MakeSession) -> None:
    session, inside, over = make_session(), threading.Event(), threading.Event()

    def source() -> object:
        yield 1
        inside.set()
        over.wait(20)
        yield 2

    thread = threading.Thread(target=session.feed, args=(source(),))
    thread.start()
    inside.wait(20)
    with pytest.raises(RuntimeError, match="in use"):
        session.feed([3])
    over.set()
    thread.join()
    assert session.tokens == 2


def test_sessions_that_generate_in_turns_do_not_disturb_each_other(make_session: MakeSession) -> None:
    sessions = [make_session() for _ in range(3)]
    for number, session in enumerate(sessions):
        session.feed(words(20 + number, seed=number))
    expected = [said(session.fork()) for session in sessions]
    streams = [session.generate(**GREEDY) for session in sessions]
    turns = list(zip(*streams, strict=True))
    assert [list(tokens) for tokens in zip(*turns, strict=True)] == expected


def test_an_interrupted_feed_has_fed_what_was_read(make_session: MakeSession) -> None:
    def source() -> object:
        yield from words(50)
        raise KeyboardInterrupt

    session, fresh = make_session(), make_session()
    with pytest.raises(KeyboardInterrupt):
        session.feed(source())
    fresh.feed(words(session.tokens))
    assert session.tokens in (48, 50)
    assert session.history == fresh.history


def test_a_parked_session_comes_back_by_itself(make_session: MakeSession) -> None:
    session = make_session()
    session.feed(words(20))
    expected = said(session.fork())
    session.park()
    assert session.info().device == "cpu"
    assert said(session) == expected


def test_mistakes_are_named(
    make_session: MakeSession, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    session = make_session()
    with pytest.raises(ValueError, match="token id 99 is outside the vocabulary of 64"):
        session.feed([1, 99])
    with pytest.raises(ValueError, match="there is no file"):
        session.feed(tmp_path / "nothing.txt")
    for source in ([1.5], [1, 2.7], [True], [1, "w1"], ["w1", 1], [2**70], b"abc", {"ids": [1]}, 7, [[1]]):
        with pytest.raises(ValueError, match="cannot feed"):
            session.feed(source)
    for tensor in (torch.ones(3), torch.ones(2, 2, dtype=torch.int64), torch.ones(2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="cannot feed a tensor"):
            session.feed(tensor)
    session.reset()
    with pytest.raises(ValueError, match="nothing was fed yet"):
        session.generate()
    with pytest.raises(ValueError, match="has no memory"):
        Session(
            LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, vocab_size=64, hidden_size=32)).eval(),
            tokenizer,
        )
    with pytest.raises(ValueError, match="chunk_length is 0"):
        make_session(chunk_length=0)
    with pytest.raises(ValueError, match="cannot rewind to token 5"):
        session.rewind(5)


def test_the_state_does_not_grow_with_the_text(make_session: MakeSession) -> None:
    session = make_session(snapshots=2)
    sizes = set()
    for _ in range(5):
        session.feed(words(160))
        sizes.add(session.info().state_bytes)
    assert len(sizes) == 1


def test_the_readmes_example_runs(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n([^`]*Session\(model.*?)```", readme, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda name: tokenizer)
    names = {"model": model}
    exec(compile(example, "README.md", "exec"), names)
    assert names["session"].tokens == len(Path("book.txt").read_text().split())
    assert Path("book.state").stat().st_size > 0


def test_sessions_in_several_threads_share_a_decoder(make_session: MakeSession) -> None:
    sessions = [make_session() for _ in range(4)]
    for number, session in enumerate(sessions):
        session.feed(words(20 + number, seed=number))
    expected = [said(session.fork()) for session in sessions]
    found: dict[int, list[int]] = {}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [
            threading.Thread(target=lambda n=n, s=s: found.update({n: said(s)}))
            for n, s in enumerate(sessions)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert [found[number] for number in range(4)] == expected


def test_a_step_that_fails_loses_and_repeats_nothing(make_session: MakeSession) -> None:
    session = make_session()
    session.feed(words(21))
    expected = said(session.fork())
    layer = session.model.model.layers[1]

    def fail(*_: object) -> None:
        raise MemoryError

    stream = session.generate(**GREEDY)
    tokens = [next(stream) for _ in range(5)]
    hook = layer.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError):
        next(stream)
    hook.remove()
    assert session.tokens == 26
    tokens += said(session, max_new_tokens=15)
    assert tokens == expected


def test_a_chunk_that_fails_is_read_again(make_session: MakeSession) -> None:
    session, fresh = make_session(), make_session()
    hook = session.model.model.layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        session.feed(words(40))
    hook.remove()
    assert session.tokens == 16  # of a list, what had been taken
    session.feed(words(40)[16:])
    fresh.feed(words(40))
    assert said(session) == said(fresh)


def test_what_a_source_gave_before_it_broke_is_fed(make_session: MakeSession) -> None:
    def ids() -> object:
        yield from words(10)
        raise OSError("gone")

    def text() -> object:
        yield "w1 w2 w3 "
        raise OSError("gone")

    session = make_session()
    for source, tokens in ((ids(), 10), (text(), 13)):
        with pytest.raises(OSError, match="gone"):
            session.feed(source)
        assert session.tokens == tokens


def test_repetition_is_judged_by_all_that_was_generated(make_session: MakeSession) -> None:
    session = make_session()
    session.feed(words(16))
    tokens = said(session, no_repeat_ngram_size=2, max_new_tokens=60)
    pairs = list(pairwise(tokens))
    assert len(set(pairs)) == len(pairs)


def test_a_generation_in_inference_mode_is_not_the_last(make_session: MakeSession) -> None:
    session = make_session(decoder=Decoder(make_session().model))
    session.feed(words(20))
    with torch.inference_mode():
        first = said(session.fork())
    assert said(session) == first


def test_another_models_decoder_is_refused(
    make_session: MakeSession, make_model: Callable[..., LlamaForCausalLM]
) -> None:
    other = make_model(seed=1)
    with pytest.raises(ValueError, match="the decoder is of another model"):
        make_session(decoder=Decoder(other))
    session = make_session()
    session.feed([1])
    with pytest.raises(ValueError, match="the decoder is of another model"):
        SessionPool(Decoder(other)).admit(session)
    session.feed([2])


def test_a_model_that_has_generated_can_be_freed(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = make_model()
    session = Session(model, tokenizer)
    session.feed(words(5))
    said(session)
    gone = weakref.ref(model)
    del model, session
    gc.collect()
    assert gone() is None


def test_numbers_that_a_file_could_not_hold_are_refused(make_session: MakeSession) -> None:
    with pytest.raises(ValueError, match="chunk_length is 2097152"):
        make_session(chunk_length=2**21)
    with pytest.raises(ValueError, match="snapshots is 2000"):
        make_session(snapshots=2000)


def test_rewinding_to_where_it_is_does_nothing(make_session: MakeSession) -> None:
    session = make_session(snapshots=0)
    session.feed(words(32))
    session.rewind(32)
    assert session.tokens == 32
