import random
from collections.abc import Callable

import pytest
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from infini_attention.streaming import Decoder, Session, SessionPool

MakeSession = Callable[..., Session]
GREEDY = {"do_sample": False, "eos_token_id": None}


def words(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(60), k=count)


def test_sessions_side_by_side_say_what_they_would_say_alone(make_session: MakeSession) -> None:
    sessions = [make_session() for _ in range(4)]
    for number, session in enumerate(sessions):
        session.feed(words(5 + 3 * number, number))
    expected = [list(session.fork().generate(max_new_tokens=20, **GREEDY)) for session in sessions]
    pool, said = SessionPool(Decoder(sessions[0].model, rows=3)), {session: [] for session in sessions}
    pool.admit(sessions[0], max_new_tokens=20, **GREEDY)
    joining = iter(sessions[1:])
    for number in range(200):
        if number % 3 == 1 and len(pool) < 3:  # sessions come in while others generate
            session = next(joining, None)
            if session is not None:
                pool.admit(session, max_new_tokens=20, **GREEDY)
        for session, token in pool.step():
            said[session].append(token)
        if not len(pool):
            break
    assert [said[session] for session in sessions] == expected


def test_an_evicted_session_goes_on_elsewhere(make_session: MakeSession) -> None:
    session, other = make_session(), make_session()
    session.feed(words(11, 1))
    other.feed(words(14, 2))
    expected = list(session.fork().generate(max_new_tokens=20, **GREEDY))
    pool = SessionPool(Decoder(session.model, rows=2))
    pool.admit(session, max_new_tokens=50, **GREEDY)
    pool.admit(other, max_new_tokens=50, **GREEDY)
    said = [token for _ in range(7) for member, token in pool.step() if member is session]
    with pytest.raises(RuntimeError, match="in use"):
        session.feed([1])
    pool.evict(session)
    said += session.generate(max_new_tokens=13, **GREEDY)
    assert said == expected
    assert len(pool) == 1


def test_a_full_pool_and_a_stranger_are_named(make_session: MakeSession) -> None:
    session, other = make_session(), make_session()
    session.feed([1])
    other.feed([2])
    pool = SessionPool(Decoder(session.model, rows=1))
    pool.admit(session)
    with pytest.raises(ValueError, match="all 1 rows are taken"):
        pool.admit(other)
    with pytest.raises(ValueError, match="not in the pool"):
        pool.evict(other)
    pool.evict(session)
    with pytest.raises(ValueError, match="nothing was fed"):
        pool.admit(make_session())
    assert len(pool) == 0


def test_sampling_in_a_pool_equals_sampling_alone(make_session: MakeSession) -> None:
    session, greedy = make_session(), make_session()
    session.feed(words(11, 1))
    greedy.feed(words(9, 2))
    options = {"do_sample": True, "temperature": 2.0, "seed": 5, "max_new_tokens": 15, "eos_token_id": None}
    expected = list(session.fork().generate(**options))
    pool = SessionPool(Decoder(session.model, rows=2))
    pool.admit(greedy, max_new_tokens=30, **GREEDY)
    pool.admit(session, **options)
    assert [token for _ in range(15) for member, token in pool.step() if member is session] == expected


def test_a_thousand_sessions_never_show_each_others_text(
    make_model: Callable[..., LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Random feeds, forks, parks, generations and drops; each session is compared with one that was alone."""
    chance = random.Random(0)
    model = make_model(update_rule="delta")
    pool = SessionPool(Decoder(model, rows=5))

    def make_session() -> Session:
        return Session(model, tokenizer, chunk_length=16, snapshots=0)

    live: list[tuple[Session, list[int]]] = []  # a session, and all tokens of its text
    made, checked = 0, 0
    while made < 1000 or live:
        if made < 1000 and len(live) < 12:
            text = words(chance.randint(1, 40), made)
            session = make_session()
            session.feed(text)
            live.append((session, text))
            made += 1
        number = chance.randrange(len(live))
        session, text = live[number]
        (act,) = chance.choices(["feed", "fork", "park", "generate", "drop"], [4, 1, 1, 1, 8])
        if act == "feed":
            more = words(chance.randint(1, 12), chance.randrange(10**6))
            session.feed(more)
            text += more
        elif act == "fork" and len(live) < 20:
            live.append((session.fork(), list(text)))
        elif act == "park":
            session.park()
        elif act == "generate":
            group = chance.sample(live, min(len(live), 5))
            for member, _ in group:
                pool.admit(member, max_new_tokens=2, **GREEDY)
            by_session = {id(member): member_text for member, member_text in group}
            while len(pool):
                for member, token in pool.step():
                    by_session[id(member)].append(token)
        elif act == "drop" or made == 1000:
            if chance.random() < 0.1:  # alone from the start, it says the same
                alone = make_session()
                alone.feed(text)
                assert alone.history == session.history
                ours = list(session.generate(max_new_tokens=4, **GREEDY))
                assert ours == list(alone.generate(max_new_tokens=4, **GREEDY))
                checked += 1
            del live[number]
    assert checked > 50


def test_pools_and_sessions_may_share_a_decoder(make_session: MakeSession) -> None:
    sessions = [make_session() for _ in range(3)]
    for number, session in enumerate(sessions):
        session.feed(words(9 + number, number))
    expected = [list(session.fork().generate(max_new_tokens=15, **GREEDY)) for session in sessions]
    decoder = Decoder(sessions[0].model, rows=2)
    pools = [SessionPool(decoder), SessionPool(decoder)]
    for pool, session in zip(pools, sessions, strict=False):
        pool.admit(session, max_new_tokens=15, **GREEDY)
    sessions[2]._decoder = decoder
    stream, said = sessions[2].generate(max_new_tokens=15, **GREEDY), [[], [], []]
    for _ in range(15):
        for number, pool in enumerate(pools):
            said[number] += [token for _, token in pool.step()]
        said[2].append(next(stream))
    assert said == expected


def test_one_that_cannot_go_on_spoils_nobody(
    make_session: MakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = [make_session() for _ in range(3)]
    for number, session in enumerate(sessions):
        session.feed(words(9 + number, number))
    expected = [list(session.fork().generate(max_new_tokens=15, **GREEDY)) for session in sessions]
    pool, said = SessionPool(Decoder(sessions[0].model, rows=3)), {id(session): [] for session in sessions}
    for session in sessions:
        pool.admit(session, max_new_tokens=15, **GREEDY)
    pick, calls = Session.pick, []

    def picky(session: Session, *arguments: object) -> int:
        calls.append(session)
        if session is sessions[1] and len(calls) > 12:
            raise ZeroDivisionError
        return pick(session, *arguments)

    monkeypatch.setattr(Session, "pick", picky)
    failures = 0
    while len(pool):
        try:
            made = pool.step()
        except ZeroDivisionError:
            failures += 1
            pool.evict(sessions[1])
            continue
        for session, token in made:
            said[id(session)].append(token)
    assert failures == 1
    assert said[id(sessions[0])] == expected[0]
    assert said[id(sessions[2])] == expected[2]
    monkeypatch.undo()
    rest = sessions[1].generate(max_new_tokens=15 - len(said[id(sessions[1])]), **GREEDY)
    assert said[id(sessions[1])] + list(rest) == expected[1]
