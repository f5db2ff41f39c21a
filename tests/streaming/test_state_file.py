"""State files come back bit for bit, or are refused in words."""

import hashlib
import json
import multiprocessing
import os
import random
import stat
import time
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file, save, save_file
from torch import Tensor

from infini_attention.streaming import state_file
from infini_attention.streaming.fingerprint import Fingerprint
from infini_attention.streaming.state_file import (
    OPTIONAL,
    OpenSegment,
    Shapes,
    Snapshot,
    StateContents,
    StateFileError,
    copy_state,
    read_header,
    read_state,
    write_state,
)

SEGMENT = 8
SHAPES = Shapes(
    layers=2,
    kv_heads=1,
    feature_dim=3,
    head_dim=3,
    value_dim=2,
    recent=2,
    recent_channels=5,
    context=4,
    earlier=True,
    vocab_size=11,
    most_tail=20,
    most_snapshots=4,
)
PRINT = Fingerprint(
    model_type="infini_llama",
    weights="a1" * 32,
    adapter="none",
    tokenizer="b2" * 32,
    segment_length=SEGMENT,
    update_rule="linear",
    feature_map="elu1",
    normalization="sum",
    empty_memory="local",
    local_attention="sliding",
    sink_tokens=0,
    dtype="bfloat16",
)
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
KIND = "infini-attention state"
UNSEALED = "0" * 64


def make(
    *, exact: bool = False, dtype: torch.dtype = torch.bfloat16, tail: int = 5, end: int = 24, seed: int = 0
) -> StateContents:
    """A state of `end` tokens in whole segments and `tail` more, of which 3 are computed in exact mode."""
    noise = torch.Generator().manual_seed(seed)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def some(*sizes: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(sizes, generator=noise, dtype=torch.float64).to(dtype)

    def logits() -> Tensor:
        return some(11, dtype=dtype)

    opened = None
    if exact:
        opened = OpenSegment(
            some(2, 1, 3, 2),
            some(2, 1, 3),
            some(2, 1, 3, 3, dtype=dtype),
            some(2, 1, 3, 2, dtype=dtype),
            some(2, 2, 5, dtype=dtype),
            some(2, 1, 3, 3, dtype=dtype),
        )

    def outside() -> dict[str, Tensor]:
        return {
            "recent": some(2, 2, 5, dtype=dtype),
            "context_key": some(2, 1, 4, 3, dtype=dtype),
            "context_value": some(2, 1, 4, 2, dtype=dtype),
            "earlier_memory": some(2, 1, 3, 2),
            "earlier_normalizer": some(2, 1, 3),
        }

    return StateContents(
        fingerprint=replace(PRINT, dtype=str(dtype).removeprefix("torch.")),
        tokens=end + tail,
        digest="c3" * 32,
        memory=some(2, 1, 3, 2),
        normalizer=some(2, 1, 3),
        tail=torch.randint(11, (tail,), generator=noise, dtype=torch.int32),
        logits=logits() if exact or (end and not tail) else None,
        open_segment=opened,
        snapshots=[
            Snapshot(
                place,
                f"{place:064x}",
                some(2, 1, 3, 2),
                some(2, 1, 3),
                logits(),
                **outside(),
            )
            for place in range(SEGMENT, end + 1, 2 * SEGMENT)
        ],
        **outside(),
    )


def same(one: Any, other: Any) -> bool:
    """Equal to the last bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or one.shape != other.shape:
            return False
        return (
            one.numpy(force=True).tobytes() == other.numpy(force=True).tobytes()
            if (one.dtype != torch.bfloat16)
            else torch.equal(one.view(torch.int16), other.view(torch.int16))
        )
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, StateContents | OpenSegment | Snapshot):
        names = [field.name for field in fields(one)]
        return type(one) is type(other) and all(same(getattr(one, n), getattr(other, n)) for n in names)
    return bool(one == other)


def read(path: Path, *, dtype: str = "bfloat16") -> StateContents:
    return read_state(path, replace(PRINT, dtype=dtype), SHAPES)


def forge(
    path: Path,
    *,
    facts: Callable[[dict[str, Any]], object] = lambda facts: None,
    tensors: Callable[[dict[str, Tensor]], object] = lambda tensors: None,
) -> None:
    """Change what is in a file and give it a hash that is right again."""
    held, data = load_file(path), path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    metadata = json.loads(header["__metadata__"][KIND])
    held = {name: x.clone() for name, x in held.items()}
    facts(metadata)
    tensors(held)
    metadata["sha256"] = UNSEALED
    path.write_bytes(sealed(save(held, {KIND: json.dumps(metadata, separators=(",", ":"))})))


def sealed(data: bytes) -> bytes:
    mark = rb"\"sha256\":\""
    return data.replace(mark + UNSEALED.encode(), mark + hashlib.sha256(data).hexdigest().encode())


def damage(path: Path) -> None:
    """Flip the last bit."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "book.state"


# --- what is written comes back --------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tail", "end"), [(5, 24), (15, 24), (3, 0), (7, 8)])
def test_a_state_comes_back_bit_for_bit(
    path: Path, exact: bool, dtype: torch.dtype, tail: int, end: int
) -> None:
    contents = make(exact=exact, dtype=dtype, tail=tail, end=end)
    size = write_state(path, contents)
    assert size == path.stat().st_size
    assert same(read(path, dtype=contents.fingerprint.dtype), contents)


@pytest.mark.parametrize("end", [0, 24])
def test_a_state_at_a_segments_end_comes_back(path: Path, end: int) -> None:
    contents = make(tail=0, end=end)
    write_state(path, contents)
    assert same(read(path), contents)


def test_an_open_segment_may_have_no_token_yet(path: Path) -> None:
    opened = OpenSegment(
        torch.zeros(2, 1, 3, 2),
        torch.zeros(2, 1, 3),
        *(torch.zeros(2, 1, 0, n).bfloat16() for n in (3, 2)),
        torch.zeros(2, 2, 5).bfloat16(),
        torch.zeros(2, 1, 0, 3).bfloat16(),
    )
    contents = replace(make(exact=True), open_segment=opened)
    write_state(path, contents)
    assert same(read(path), contents)


def plain() -> StateContents:
    """An exact state of a model as in the paper: no convolution, and nothing seen outside a segment."""
    whole, nothing = make(exact=True), dict.fromkeys(OPTIONAL)
    assert whole.open_segment is not None
    return replace(
        whole,
        fingerprint=replace(PRINT, local_attention="segment"),
        open_segment=replace(whole.open_segment, open_recent=None, open_context_key=None),
        snapshots=[replace(snapshot, **nothing) for snapshot in whole.snapshots],
        **nothing,
    )


PLAIN_SHAPES = replace(SHAPES, recent=0, recent_channels=0, context=0, earlier=False)


def test_without_a_short_convolution_and_with_segments_alone_a_file_holds_no_more(path: Path) -> None:
    contents = plain()
    write_state(path, contents)
    assert same(read_state(path, contents.fingerprint, PLAIN_SHAPES), contents)
    with pytest.raises(StateFileError, match="recent"):
        read_state(path, contents.fingerprint, replace(PLAIN_SHAPES, recent=2, recent_channels=5))
    with pytest.raises(StateFileError, match="context_key"):
        read_state(path, contents.fingerprint, replace(PLAIN_SHAPES, context=4))


def test_a_file_of_the_format_before_loads_as_one_of_segments_alone(path: Path) -> None:
    def older(facts: dict[str, Any]) -> None:
        facts["format"] = 2
        del facts["fingerprint"]["local_attention"], facts["fingerprint"]["sink_tokens"]

    contents = plain()
    write_state(path, contents)
    forge(path, facts=older)
    assert read_header(path)["format"] == 2
    assert same(read_state(path, contents.fingerprint, PLAIN_SHAPES), contents)
    with pytest.raises(StateFileError, match="local_attention is segment in the file and sliding here"):
        read(path)


def test_the_same_state_makes_the_same_bytes(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    write_state(one, make(exact=True))
    write_state(other, make(exact=True))
    assert one.read_bytes() == other.read_bytes()


def test_tensors_may_be_views_of_one_another(path: Path) -> None:
    memory = torch.randn(2, 1, 2, 3).transpose(2, 3)
    contents = replace(make(), memory=memory, normalizer=memory[..., 0], snapshots=[])
    write_state(path, contents)
    assert torch.equal(read(path).memory, memory)


def test_safetensors_reads_the_file_too(path: Path) -> None:
    contents = make()
    write_state(path, contents)
    assert torch.equal(load_file(path)["memory"], contents.memory)


@pytest.mark.parametrize("exact", [False, True])
def test_the_header_says_what_a_file_holds(path: Path, exact: bool) -> None:
    contents = make(exact=exact)
    size = write_state(path, contents)
    assert read_header(path) == {
        "tokens": 29,
        "tail": 5,
        "mode": "exact" if exact else "compact",
        "snapshots": [8, 24],
        "bytes": size,
        "format": 3,
        **vars(PRINT),
    }


def test_a_copy_is_the_same_file_and_replaces_none(tmp_path: Path, path: Path) -> None:
    size = write_state(path, make())
    target = tmp_path / "copy.state"
    assert copy_state(path, target) == size
    assert target.read_bytes() == path.read_bytes()
    with pytest.raises(StateFileError, match="exists; choose another name"):
        copy_state(path, target)


def test_a_damaged_file_is_not_copied(tmp_path: Path, path: Path) -> None:
    write_state(path, make())
    damage(path)
    with pytest.raises(StateFileError, match=r"book\.state cannot be loaded: it was tampered with"):
        copy_state(path, tmp_path / "copy.state")
    assert os.listdir(tmp_path) == ["book.state"]


# --- writing ---------------------------------------------------------------------------------------------


def test_only_the_owner_can_read_the_file(path: Path) -> None:
    path.touch(0o644)
    write_state(path, make())
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert os.listdir(path.parent) == ["book.state"]


def test_writing_refuses_what_it_would_destroy(tmp_path: Path, path: Path) -> None:
    write_state(path, make())
    link, dangling, pipe = tmp_path / "link", tmp_path / "dangling", tmp_path / "pipe"
    link.symlink_to(path)
    dangling.symlink_to(tmp_path / "nowhere")
    os.mkfifo(pipe)
    before = path.read_bytes()
    for place, words in [
        (link, "is a link"),
        (dangling, "is a link"),
        (pipe, "is no regular file"),
        (tmp_path, "is a folder"),
        (tmp_path / "missing" / "a.state", "there is no folder"),
        (path / "a.state", "there is no folder|cannot be written"),
        (tmp_path / ("x" * 300), "cannot be written: File name too long"),
    ]:
        with pytest.raises(StateFileError, match=words):
            write_state(place, make())
    assert path.read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["book.state", "dangling", "link", "pipe"]


def test_names_may_be_as_long_as_the_system_allows(tmp_path: Path) -> None:
    place = tmp_path / ("é" * 127)
    write_state(place, make())
    assert same(read(place), make())


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: BaseException
) -> None:
    write_state(path, make())

    def fail(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(state_file.os, step, fail)
    with pytest.raises(StateFileError if isinstance(error, OSError) else KeyboardInterrupt):
        write_state(path, make(seed=1))
    monkeypatch.undo()
    assert os.listdir(path.parent) == ["book.state"]
    assert same(read(path), make())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"memory": torch.full((2, 1, 3, 2), float("nan"))}, "its memory holds NaN"),
        ({"normalizer": torch.zeros(2, 1, 4)}, "its normalizer is"),
        ({"tokens": 28}, "do not make segments of 8"),
        ({"logits": torch.zeros(11).bfloat16()}, "where .* belong"),
        ({"digest": "none"}, "damaged"),
        ({"fingerprint": replace(PRINT, adapter="a\x1b[2J")}, "its adapter cannot be"),
        ({"fingerprint": replace(PRINT, dtype="int8")}, "its dtype cannot be 'int8'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_a_state_that_could_not_be_read_again_is_not_written(
    path: Path, changes: dict[str, Any], words: str
) -> None:
    write_state(path, make())
    with pytest.raises(StateFileError, match=rf"(?s)book\.state cannot be written: .*{words}"):
        write_state(path, replace(make(), **changes))
    assert same(read(path), make())


def _save_forever(path: Path, states: list[StateContents]) -> None:
    torch.set_num_threads(1)
    while True:
        for contents in states:
            write_state(path, contents)


def test_a_process_killed_while_saving_leaves_a_whole_state(path: Path) -> None:
    states = [make(exact=True), make(seed=1)]
    write_state(path, states[0])
    written = set()
    for number in range(12):
        before = path.stat().st_ino
        child = multiprocessing.get_context("fork").Process(target=_save_forever, args=(path, states))
        child.start()
        while path.stat().st_ino == before:
            time.sleep(0.001)
        time.sleep(random.Random(number).uniform(0, 0.01))
        child.kill()
        child.join()
        assert child.exitcode == -9
        contents = read(path)
        found = [same(contents, each) for each in states]
        assert any(found)
        written.add(found.index(True))
        assert read_header(path)["tokens"] == 29
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_state(path, states[1])  # whatever is left over
    assert same(read(path), states[1])


# --- files that are refused ------------------------------------------------------------------------------


def refused(path: Path, words: str, *, header_too: bool = True) -> None:
    with pytest.raises(StateFileError, match=rf"(?s){path.name} cannot be loaded: .*{words}"):
        read(path)
    if header_too:
        with pytest.raises(StateFileError, match=rf"(?s){path.name} cannot be loaded: "):
            read_header(path)


def test_what_is_no_state_file_is_refused(tmp_path: Path, path: Path) -> None:
    write_state(path, make())
    link, pipe, folder = tmp_path / "link", tmp_path / "pipe", tmp_path / "folder"
    link.symlink_to(path)
    os.mkfifo(pipe)
    folder.mkdir()
    refused(link, "it is a link")
    refused(pipe, "no regular file")
    refused(folder, "directory")
    refused(tmp_path / "missing", "No such file")
    for content in [b"", b"{}", b"x" * 7, b"\0" * 8, b"\0" * 100, b"text " * 100, b"\x80\x04." * 40]:
        path.write_bytes(content)
        refused(path, "truncated|no state file|damaged")
    save_file({"memory": torch.zeros(2)}, path, metadata={"format": "pt"})
    refused(path, "no state file; give one that Session.save wrote")


def test_a_link_is_not_followed_even_if_it_appears_meanwhile(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_state(path, make())
    link = tmp_path / "link"
    link.symlink_to(path)
    monkeypatch.setattr(Path, "is_symlink", lambda self: False)
    refused(link, "symbolic links")


def test_a_file_larger_than_any_state_is_not_read(path: Path) -> None:
    write_state(path, make())
    os.truncate(path, 2**40)
    refused(path, "has 1,099,511,627,776 bytes, and a state of this model at most")


def test_every_truncation_is_refused(path: Path) -> None:
    write_state(path, make(exact=True))
    data = path.read_bytes()
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refused(path, "truncated", header_too=length % 50 == 0)


def test_one_flipped_bit_anywhere_is_refused(path: Path) -> None:
    write_state(path, make(exact=True))
    data = path.read_bytes()
    bits = random.Random(0)
    for place in range(len(data)):
        changed = bytearray(data)
        changed[place] ^= 1 << bits.randrange(8)
        path.write_bytes(changed)
        refused(path, "", header_too=place % 50 == 0)


def test_no_random_damage_loads_or_raises_anything_else(path: Path) -> None:
    write_state(path, make(exact=True))
    data, choose = path.read_bytes(), random.Random(1)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(2000):
        changed = bytearray(data)
        for _ in range(choose.choice([1, 1, 2, 8])):
            place = choose.randrange(choose.choice([10, header, len(data)]))
            length = choose.choice([1, 1, 2, 8, 64])
            noise = choose.choice([choose.randbytes(length), b"0" * length, b" " * length, b"[" * length])
            kind = choose.randrange(4)
            if kind == 0:
                changed[place : place + length] = noise[: len(changed[place : place + length])]
            elif kind == 1:
                changed[place:place] = noise
            elif kind == 2:
                del changed[place : place + length]
            else:
                other = choose.randrange(len(data))
                changed[place:place] = data[other : other + length]
        if changed == data:
            continue
        path.write_bytes(changed)
        for reader in (read, read_header):
            with pytest.raises(StateFileError):
                reader(path)


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 2**20 + 1, 2**20, 0, 1])
def test_a_lie_about_the_headers_length_is_refused(path: Path, length: int) -> None:
    write_state(path, make())
    data = path.read_bytes()
    path.write_bytes(length.to_bytes(8, "little") + data[8:])
    refused(path, "truncated|damaged")
    os.truncate(path, 2**21)
    with pytest.raises(StateFileError):
        read_header(path)


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"a":' + b"9" * 100_000 + b"}",
        b'{"__metadata__":{"infini-attention state":"\\ud800"}}',
        b'{"__metadata__":{"infini-attention state":"[]"}}',
        b'{"__metadata__":[],"__metadata__":{}}',
        b'{"__metadata__":{"infini-attention state":{}}}',
        b'{"__metadata__":NaN}',
        "{}".encode("utf-16"),
        b"\xff\xfe",
        b"null",
    ],
    ids=range(11),
)
def test_a_header_made_to_hurt_is_refused(path: Path, header: bytes) -> None:
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(StateFileError, match=r"no state file|damaged"):
        read_header(path)
    with pytest.raises(StateFileError):
        read(path)


@pytest.mark.parametrize("name", [field.name for field in fields(Fingerprint)])
def test_a_file_of_another_model_or_setting_is_refused_in_words(path: Path, name: str) -> None:
    ours = getattr(PRINT, name)
    theirs = {"dtype": "float32", "segment_length": 4, "sink_tokens": 2}.get(name, f"another {name}")
    write_state(path, make(dtype=torch.float32) if name == "dtype" else make())
    forge(path, facts=lambda facts: facts["fingerprint"].update({name: theirs}))
    words = f"{name} is {theirs} in the file and {ours if len(str(ours)) < 64 else ours[:12]} here"
    refused(path, words, header_too=False)
    assert read_header(path)[name] == theirs


def test_every_difference_is_named_before_any_tensor_is_looked_at(path: Path) -> None:
    write_state(path, make(exact=True))
    damage(path)
    other = replace(PRINT, update_rule="delta", segment_length=16, dtype="float32")
    words = (
        "segment_length is 8 in the file and 16 here; update_rule is linear in the file and delta here; "
        "dtype is bfloat16 in the file and float32 here"
    )
    with pytest.raises(StateFileError, match=words):
        read_state(path, other, SHAPES)


@pytest.mark.parametrize("field", [field.name for field in fields(Shapes)])
def test_a_file_of_other_sizes_is_refused(path: Path, field: str) -> None:
    write_state(path, make(exact=True))
    right = getattr(SHAPES, field)
    sizes = {0, 1} if field.startswith("most") else {0, right - 1, right + 1}
    sizes = {False} if field == "earlier" else sizes
    for size in sizes:
        with pytest.raises(StateFileError, match=r"book\.state cannot be loaded"):
            read_state(path, PRINT, replace(SHAPES, **{field: size}))


def _set(name: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].__setitem__(place, value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_set("memory", (0, 0, 0, 0), float("nan")), "its memory holds NaN or infinity"),
        (_set("normalizer", (0, 0, 0), float("inf")), "its normalizer holds NaN or infinity"),
        (_set("snapshot_memory", (1, 0, 0, 0, 0), float("nan")), "its snapshot_memory holds NaN"),
        (_set("local_key", (0, 0, 0, 0), float("nan")), "its local_key holds NaN"),
        (_set("logits", (0,), float("-inf")), "its logits holds NaN or infinity"),
        (_set("tail", (0,), 11), "token id 11, outside the vocabulary of 11"),
        (_set("tail", (2,), -1), "token id -1, outside the vocabulary of 11"),
        (lambda x: x.pop("memory"), "no memory of 4 dimensions|where .* belong"),
        (lambda x: x.pop("tail"), "no tail"),
        (lambda x: x.pop("local_value"), "where .* belong"),
        (lambda x: x.pop("snapshot_normalizer"), "where .* belong"),
        (lambda x: x.update(stranger=torch.zeros(1)), "'stranger'"),
        (lambda x: x.update(memory=x["memory"].double()), "its memory is F64"),
        (lambda x: x.update(tail=x["tail"].long()), "of dtype 'I64'"),
        (lambda x: x.update(tail=x["tail"].float()), "its tail is F32"),
        (lambda x: x.update(tail=x["tail"][None]), "no tail of 1 dimensions"),
        (lambda x: x.update(tail=torch.zeros(0, dtype=torch.int32)), "do not make segments|open segment"),
        (lambda x: x.update(memory=x["memory"].transpose(2, 3).contiguous()), "its memory is F32"),
        (lambda x: x.update(local_key=x["local_key"].float()), "its local_key is F32"),
        (lambda x: x.update(local_key=torch.zeros(2, 1, 6, 3).bfloat16()), "its open segment has 6 of 5 ids"),
        (lambda x: x.update(local_value=x["local_value"][:, :, :1].clone()), "its local_value is"),
        (lambda x: x.update(snapshot_logits=torch.zeros(3, 11).bfloat16()), "its snapshot_logits is"),
        (lambda x: x.update(memory=torch.zeros(1, 1, 1, 1, 1, 1)), "6 dimensions"),
    ],
    ids=range(23),
)
def test_forged_tensors_are_refused_although_the_hash_is_right(
    path: Path, change: Callable[[dict[str, Tensor]], object], words: str
) -> None:
    write_state(path, make(exact=True))
    forge(path, tensors=change)
    refused(path, words, header_too=False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": 1}, "it is of format 1, and this version reads 2"),
        ({"more": 1}, "damaged"),
        ({"tokens": 28}, "do not make segments of 8"),
        ({"tokens": 4}, "do not make segments of 8"),
        ({"tokens": -3}, "damaged"),
        ({"tokens": "29"}, "damaged"),
        ({"tokens": 29.0}, "damaged"),
        ({"tokens": 2**80}, "damaged"),
        ({"digest": "C3" * 32}, "damaged"),
        ({"digest": None}, "damaged"),
        ({"snapshots": []}, "where .* belong"),
        ({"snapshots": [[8, "0" * 64]]}, "its snapshot_memory is"),
        ({"snapshots": [[8, "0" * 64], [8, "0" * 64]]}, "its snapshots are at"),
        ({"snapshots": [[24, "0" * 64], [8, "0" * 64]]}, "its snapshots are at"),
        ({"snapshots": [[0, "0" * 64], [8, "0" * 64]]}, "its snapshots are at"),
        ({"snapshots": [[8, "0" * 64], [9, "0" * 64]]}, "its snapshots are at"),
        ({"snapshots": [[8, "0" * 64], [32, "0" * 64]]}, "its snapshots are at"),
        ({"snapshots": [[8 * n, "0" * 64] for n in range(1, 6)], "tokens": 85}, "5 snapshots, and 4"),
        ({"snapshots": [8, 24]}, "damaged"),
        ({"snapshots": {"8": "0"}}, "damaged"),
        ({"fingerprint": {}}, "damaged"),
        ({"fingerprint": None}, "damaged"),
        ({"fingerprint": {**vars(PRINT), "segment_length": "8"}}, "its segment_length cannot be '8'"),
        ({"fingerprint": {**vars(PRINT), "segment_length": True}}, "its segment_length cannot be True"),
        ({"fingerprint": {**vars(PRINT), "segment_length": 0}}, "its segment_length cannot be 0"),
        ({"fingerprint": {**vars(PRINT), "adapter": "\x1b[2J"}}, "its adapter cannot be"),
        ({"fingerprint": {**vars(PRINT), "dtype": "__class__"}}, "its dtype cannot be"),
    ],
    ids=range(27),
)
def test_forged_facts_are_refused_although_the_hash_is_right(
    path: Path, change: dict[str, Any], words: str
) -> None:
    write_state(path, make(exact=True))
    forge(path, facts=lambda facts: facts.update(change))
    refused(path, words, header_too="belong" not in words and "5 snapshots" not in words)


def test_a_name_that_stands_twice_is_refused_although_the_hash_is_right(path: Path) -> None:
    write_state(path, make())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(
        b'"tail":', b'"tail":{"dtype":"I32","shape":[5],"data_offsets":[0,20]},"tail":'
    )
    facts = json.loads(json.loads(header)["__metadata__"][KIND])
    header = header.replace(facts["sha256"].encode(), UNSEALED.encode())
    path.write_bytes(sealed(len(header).to_bytes(8, "little") + header + data[8 + length :]))
    refused(path, "damaged")


def test_gaps_and_overlaps_are_refused_although_the_hash_is_right(path: Path) -> None:
    write_state(path, make())
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    facts = json.loads(header["__metadata__"][KIND]) | {"sha256": UNSEALED}
    header["__metadata__"][KIND] = json.dumps(facts, separators=(",", ":"))
    header["normalizer"]["data_offsets"] = [at - 4 for at in header["normalizer"]["data_offsets"]]
    text = json.dumps(header).encode()
    path.write_bytes(sealed(len(text).to_bytes(8, "little") + text + data[8 + length :]))
    refused(path, "damaged")


def test_what_was_read_is_what_is_used(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes after its hash was taken changes nothing."""
    write_state(path, make())

    def exchange(data: bytes) -> dict[str, Tensor]:
        write_state(path, make(seed=1))
        return load(data)

    monkeypatch.setattr(state_file, "load", exchange)
    assert same(read(path), make())
