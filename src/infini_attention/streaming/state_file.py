"""State files: safetensors, written whole or not at all, and believed only after every check.

A file holds the memory at the end of a text's last whole segment and the ids of the tokens since; in exact
mode also the open segment as it was computed; and, if wanted, snapshots of earlier segment ends. The header
says what the state belongs to and holds a hash of every byte. Nothing in a file names code or another file.
"""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import stat
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from infini_attention.ops.state import state_dtype
from infini_attention.streaming.fingerprint import Fingerprint

KIND, FORMAT = "infini-attention state", 3
OLDER = {2: {"local_attention": "segment", "sink_tokens": 0}}  # formats read too, and what they leave out
MOST_HEADER = 2**20  # bytes
BLOCK = 2**20  # bytes that are read at once
MOST_NUMBER, MOST_DIMENSIONS = 2**62, 5
# safetensors' names
DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
SIZES = {"BF16": 2, "F16": 2, "F32": 4, "F64": 8, "I32": 4}
MODEL_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

Layout = dict[str, tuple[str, tuple[int, ...]]]  # tensors' dtypes, in safetensors' names, and shapes


class StateFileError(ValueError):
    """A file that is no state, not a whole one, or not one for this model; the text says what is wrong."""


@dataclass(frozen=True)
class Shapes:
    """Sizes that a model gives its states; `most_tail` ids and `most_snapshots` are what a file may hold.

    `recent` tokens of `recent_channels` are what a short convolution looks back at, 0 of 0 without one.
    `context` tokens outside the segment are what local attention sees; where it slides, there are `earlier`
    sums beside the memory's own.
    """

    layers: int
    kv_heads: int
    feature_dim: int
    head_dim: int
    value_dim: int
    recent: int
    recent_channels: int
    context: int
    earlier: bool
    vocab_size: int
    most_tail: int
    most_snapshots: int


@dataclass(frozen=True)
class OpenSegment:
    """The open segment as it was computed.

    Attributes:
        pending_memory: (layers, kv_heads, feature_dim, value_dim), of the dtype of `StateContents.memory`.
        pending_normalizer: (layers, kv_heads, feature_dim), likewise.
        local_key: (layers, kv_heads, open, head_dim) in the model's dtype, of the first `open` ids of the
            tail, fewer than a segment.
        local_value: (layers, kv_heads, open, value_dim), likewise.
        open_recent: what short convolutions look back at from the next token, (layers, width - 1, channels)
            in the model's dtype; None without them.
        open_context_key: the keys as later segments will see them, of as many tokens of `open` as those see,
            (layers, kv_heads, seen, head_dim) in the model's dtype; None where they see none.
    """

    pending_memory: Tensor
    pending_normalizer: Tensor
    local_key: Tensor
    local_value: Tensor
    open_recent: Tensor | None = None
    open_context_key: Tensor | None = None


@dataclass(frozen=True)
class Snapshot:
    """The state after `tokens` tokens, which are whole segments; fields as in `StateContents`."""

    tokens: int
    digest: str
    memory: Tensor
    normalizer: Tensor
    logits: Tensor
    recent: Tensor | None = None
    context_key: Tensor | None = None
    context_value: Tensor | None = None
    earlier_memory: Tensor | None = None
    earlier_normalizer: Tensor | None = None


@dataclass(frozen=True)
class StateContents:
    """All that a file holds.

    Attributes:
        fingerprint: what the state belongs to.
        tokens: fed so far, the tail included.
        digest: of the tokens up to the last whole segment, 64 hexadecimal digits; see `history`.
        memory: (layers, kv_heads, feature_dim, value_dim) fp32 (fp64 if the model is), at that segment's end.
        normalizer: (layers, kv_heads, feature_dim), likewise.
        tail: (n,) int32 ids of the tokens since.
        logits: (vocab_size,) in the model's dtype, after the last token that went through the model. None
            where that token is in the tail and will be read again, or nothing was read.
        open_segment: what was computed of the tail; None in compact mode.
        snapshots: earlier states, in order, up to the end of the last whole segment.
        recent: what short convolutions look back at from the end of that segment, (layers, width - 1,
            channels) in the model's dtype; None without them.
        context_key: what local attention sees outside the segment from the end of that segment on, (layers,
            kv_heads, context, head_dim) in the model's dtype; None where it sees nothing there.
        context_value: the values, (layers, kv_heads, context, value_dim), likewise.
        earlier_memory: `memory` without the segment that is seen, where there is one; None elsewhere.
        earlier_normalizer: `normalizer` without it, likewise.
    """

    fingerprint: Fingerprint
    tokens: int
    digest: str
    memory: Tensor
    normalizer: Tensor
    tail: Tensor
    logits: Tensor | None
    open_segment: OpenSegment | None
    snapshots: list[Snapshot]
    recent: Tensor | None = None
    context_key: Tensor | None = None
    context_value: Tensor | None = None
    earlier_memory: Tensor | None = None
    earlier_normalizer: Tensor | None = None


def write_state(path: str | PathLike[str], contents: StateContents) -> int:
    """Write `contents` to `path`, readable by its owner alone; returns the file's size in bytes.

    The file is written beside its place and moved there once it is safely on the disk, so that at any moment
    there is the old or the new one, whole. If a process is killed meanwhile, a file named `.*.unfinished` may
    stay behind, and can be removed.

    Raises:
        StateFileError: the path is a link, a folder or a device, or cannot be written; or contents that
            `read_state` would refuse, such as NaN. An older file then stays as it is.
    """
    path = Path(path)
    tensors = _tensors_of(contents)
    blocks = _sealed(save(tensors, {KIND: _metadata_of(contents)}))
    try:
        header = _parsed(b"".join(blocks[:2]) + blocks[2][: MOST_HEADER + 8], sum(map(len, blocks)))
        _check_layout(header, _own_shapes(header))
        _check_values(tensors)
    except _Wrong as wrong:
        raise StateFileError(f"{path} cannot be written: {wrong}") from None
    return _write_whole(path, blocks)


def read_state(path: str | PathLike[str], fingerprint: Fingerprint, shapes: Shapes) -> StateContents:
    """What is in the file `path`, for the model that `fingerprint` and `shapes` describe; tensors on the CPU.

    Raises:
        StateFileError: a file of another model or setting (the text says what differs), a link, a file larger
            than a state of this model can be, or anything that is not exactly what `write_state` writes.
    """
    with _opened(Path(path)) as file:
        header = _read_header(file, most=_most_bytes(fingerprint, shapes))
        if differences := header.fingerprint.differences(fingerprint):
            raise _Wrong(
                f"it belongs to another model or setting: {'; '.join(differences)}; "
                "use the model, tokenizer and settings that it was saved with (on the command line, --model)"
            )
        _check_layout(header, shapes)
        tensors = _loaded(b"".join(_verified(file, header)))
        _check_values(tensors, shapes.vocab_size)
        return _contents_of(header, tensors)


def read_header(path: str | PathLike[str]) -> dict[str, Any]:
    """What the file says of itself, checked as far as that is possible without its model.

    Every byte is read, a little at a time. Returns `tokens`, `tail` (how many ids), `mode` ("exact" or
    "compact"), `snapshots` (their tokens), `bytes` (the file's size), `format`, and the fingerprint's fields.

    Raises:
        StateFileError: as `read_state`.
    """
    with _opened(Path(path)) as file:
        header = _checked_header(file)
        for _ in _verified(file, header):
            pass
    return {
        "tokens": header.tokens,
        "tail": header.tail,
        "mode": "compact" if header.opened is None else "exact",
        "snapshots": [tokens for tokens, _ in header.snapshots],
        "bytes": header.size,
        "format": header.format,
        **asdict(header.fingerprint),
    }


def copy_state(path: str | PathLike[str], target: str | PathLike[str]) -> int:
    """Write the state of one file to a new one, after the checks of `read_header`; returns its size in bytes.

    Raises:
        StateFileError: as `read_state` and `write_state`, or `target` exists.
    """
    if os.path.lexists(target):
        raise StateFileError(f"{target} exists; choose another name, or remove it")
    with _opened(Path(path)) as file:
        return _write_whole(Path(target), _verified(file, _checked_header(file)))


class _Wrong(Exception):
    """What is wrong with a file or with contents; becomes a StateFileError that names the file."""


# --- contents and tensors --------------------------------------------------------------------------------

OPEN_SEGMENT = [field.name for field in fields(OpenSegment)]
OPTIONAL = ["recent", "context_key", "context_value", "earlier_memory", "earlier_normalizer"]
SNAPSHOT = ["memory", "normalizer", "logits", *OPTIONAL]


def _tensors_of(contents: StateContents) -> dict[str, Tensor]:
    """By name in the file; copies, since safetensors takes none that share memory."""
    tensors = {name: getattr(contents, name) for name in ("memory", "normalizer", "tail")}
    for name in ("logits", *OPTIONAL):
        if (x := getattr(contents, name)) is not None:
            tensors[name] = x
    if contents.open_segment is not None:
        tensors |= {name: x for name, x in vars(contents.open_segment).items() if x is not None}
    if contents.snapshots:
        for name in SNAPSHOT:
            parts = [getattr(snapshot, name) for snapshot in contents.snapshots]
            if parts[0] is not None:
                tensors[f"snapshot_{name}"] = torch.stack([part.cpu() for part in parts])
    return {
        name: x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, x in tensors.items()
    }


def _metadata_of(contents: StateContents) -> str:
    return json.dumps(
        {
            "format": FORMAT,
            "fingerprint": asdict(contents.fingerprint),
            "tokens": contents.tokens,
            "digest": contents.digest,
            "snapshots": [[snapshot.tokens, snapshot.digest] for snapshot in contents.snapshots],
            "sha256": UNSEALED,
        },
        separators=(",", ":"),
    )


def _contents_of(header: "_Header", tensors: dict[str, Tensor]) -> StateContents:
    opened = {name: tensors[name] for name in OPEN_SEGMENT if name in tensors}
    kept = {name: stack for name in SNAPSHOT if (stack := tensors.get(f"snapshot_{name}")) is not None}
    return StateContents(
        fingerprint=header.fingerprint,
        tokens=header.tokens,
        digest=header.digest,
        memory=tensors["memory"],
        normalizer=tensors["normalizer"],
        tail=tensors["tail"],
        logits=tensors.get("logits"),
        open_segment=OpenSegment(**opened) if opened else None,
        snapshots=[
            Snapshot(tokens, digest, **{name: stack[number] for name, stack in kept.items()})
            for number, (tokens, digest) in enumerate(header.snapshots)
        ],
        **{name: tensors.get(name) for name in OPTIONAL},
    )


def _loaded(data: bytes) -> dict[str, Tensor]:
    try:
        return load(data)
    except (SafetensorError, ValueError, RuntimeError) as error:
        raise _Wrong(f"it is damaged ({error})") from None


def _check_values(tensors: dict[str, Tensor], vocab_size: int = MOST_NUMBER) -> None:
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise _Wrong(f"its {name} holds NaN or infinity")
    ids = tensors["tail"].long()
    wrong = ids[(ids < 0) | (ids >= vocab_size)].tolist()
    if wrong:
        raise _Wrong(f"it holds token id {wrong[0]}, outside the vocabulary of {vocab_size}")


# --- the header ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Header:
    """What stands before a file's tensors, each part of the right type; not yet whether they fit together."""

    raw: bytes
    size: int  # of the whole file
    format: int
    fingerprint: Fingerprint
    tokens: int
    digest: str
    snapshots: list[tuple[int, str]]
    sha256: str
    layout: Layout

    @property
    def tail(self) -> int:
        return self._shape("tail", 1)[0]

    @property
    def opened(self) -> int | None:
        """Tokens of the open segment; None in compact mode."""
        return self._shape("local_key", 4)[2] if "local_key" in self.layout else None

    def _shape(self, name: str, dimensions: int) -> tuple[int, ...]:
        shape = self.layout[name][1] if name in self.layout else ()
        if len(shape) != dimensions:
            raise _Wrong(f"it has no {name} of {dimensions} dimensions")
        return shape


def _read_header(file: BinaryIO, *, most: int | None = None) -> _Header:
    """The header of a file of at most `most` bytes; the file then stands at its tensors' first byte."""
    size = os.fstat(file.fileno()).st_size
    if most is not None and size > most:
        raise _Wrong(f"it has {size:,} bytes, and a state of this model at most {most:,}")
    start = _exactly(file, 8)
    length = int.from_bytes(start, "little")
    if length > min(MOST_HEADER, size - 8):
        raise _Wrong("it is truncated, or no state file")
    return _parsed(start + _exactly(file, length), size)


def _checked_header(file: BinaryIO) -> _Header:
    """The header, checked against itself where there is no model to check it against."""
    header = _read_header(file)
    _check_layout(header, _own_shapes(header))
    return header


def _parsed(start: bytes, size: int) -> _Header:
    """The header in the first bytes of a file of `size` bytes."""
    end = 8 + int.from_bytes(start[:8], "little")
    if end > len(start):
        raise _Wrong(f"its header would be larger than {MOST_HEADER:,} bytes; keep fewer snapshots")
    header = _json(start[8:end])
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or list(metadata) != [KIND] or not isinstance(metadata[KIND], str):
        raise _Wrong("it is no state file; give one that Session.save wrote")
    facts = _json(metadata[KIND].encode(errors="replace"))
    number = facts.get("format")
    if type(number) is not int or number not in (*OLDER, FORMAT):
        known = ", ".join(map(str, (*OLDER, FORMAT)))
        raise _Wrong(f"it is of format {number!r}, and this version reads {known}")
    _check_keys(facts, ["format", "fingerprint", "tokens", "digest", "snapshots", "sha256"])
    return _Header(
        raw=start[:end],
        size=size,
        format=number,
        fingerprint=_fingerprint_of(facts["fingerprint"], OLDER.get(number, {})),
        tokens=_number(facts["tokens"]),
        digest=_hash(facts["digest"]),
        snapshots=[(_number(tokens), _hash(digest)) for tokens, digest in _pairs(facts["snapshots"])],
        sha256=_hash(facts["sha256"]),
        layout=_layout_of(header, size - end),
    )


def _layout_of(entries: dict[str, Any], size: int) -> Layout:
    """Dtypes and shapes of tensors that follow on each other and fill `size` bytes exactly."""
    layout, ranges = {}, []
    for name, entry in entries.items():
        _check_keys(entry, ["dtype", "shape", "data_offsets"])
        dtype, shape = entry["dtype"], tuple(map(_number, _list(entry["shape"])))
        if not isinstance(dtype, str) or dtype not in SIZES or len(shape) > MOST_DIMENSIONS:
            raise _Wrong(f"its {name!r} is of dtype {dtype!r} and {len(shape)} dimensions")
        begin, end = _pair(entry["data_offsets"])
        layout[name] = dtype, shape
        ranges.append((_number(begin), _number(end), SIZES[dtype] * math.prod(shape)))
    position = 0
    for begin, end, length in sorted(ranges):
        if begin != position or end != begin + length:
            raise _damaged()
        position = end
    if position != size:
        raise _Wrong("it is truncated, or longer than its header says")
    return layout


def _fingerprint_of(entry: Any, left_out: dict[str, Any]) -> Fingerprint:
    _check_keys(entry, [field.name for field in fields(Fingerprint) if field.name not in left_out])
    entry = entry | left_out
    for field in fields(Fingerprint):
        value = entry[field.name]
        if type(value) is not field.type or (isinstance(value, str) and not value.isprintable()):
            raise _Wrong(f"its {field.name} cannot be {value!r}")
    if entry["dtype"] not in MODEL_DTYPES:
        raise _Wrong(f"its dtype cannot be {entry['dtype']!r}; states are of {', '.join(MODEL_DTYPES)}")
    if not 1 <= entry["segment_length"] <= MOST_NUMBER:
        raise _Wrong(f"its segment_length cannot be {entry['segment_length']}")
    return Fingerprint(**entry)


def _json(text: bytes) -> dict[str, Any]:
    """A JSON object in which no name stands twice, so that every reader sees the same in it."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        raise _damaged() from None
    if not isinstance(value, dict):
        raise _damaged()
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a name stands twice")
    return dict(pairs)


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _check_keys(value: Any, names: list[str]) -> None:
    if not isinstance(value, dict) or set(value) != set(names):
        raise _damaged()


def _number(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MOST_NUMBER:
        raise _damaged()
    return value


def _hash(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{64}", value):
        raise _damaged()
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise _damaged()
    return value


def _pair(value: Any) -> tuple[Any, Any]:
    if len(_list(value)) != 2:
        raise _damaged()
    return value[0], value[1]


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    return [_pair(item) for item in _list(value)]


def _damaged() -> _Wrong:
    return _Wrong("it was tampered with or is damaged")


# --- sizes -----------------------------------------------------------------------------------------------


def _check_layout(header: _Header, shapes: Shapes) -> None:
    """Raise _Wrong unless the header's numbers fit together, and it has exactly the tensors that belong."""
    size, tokens, tail, opened = header.fingerprint.segment_length, header.tokens, header.tail, header.opened
    places = [tokens for tokens, _ in header.snapshots]
    end = tokens - tail
    if tail > shapes.most_tail:
        raise _Wrong(f"it has {tail:,} ids after its last segment, and {shapes.most_tail:,} are allowed")
    if end < 0 or end % size:
        raise _Wrong(
            f"{tokens} tokens, {tail} of them after the last segment, do not make segments of {size}"
        )
    if opened is not None and opened > min(tail, size - 1):
        raise _Wrong(f"its open segment has {opened} of {tail} ids, and segments {size}")
    if len(places) > shapes.most_snapshots:
        raise _Wrong(f"it has {len(places):,} snapshots, and {shapes.most_snapshots:,} are allowed")
    if places != sorted(set(places)) or any(not 0 < place <= end or place % size for place in places):
        raise _Wrong(f"its snapshots are at {places}, and segments of {size} end up to {end}")
    has_logits = (opened is not None or not tail) and end + (opened or 0) > 0
    expected = _layout(
        shapes,
        MODEL_DTYPES[header.fingerprint.dtype],
        tail=tail,
        opened=opened,
        logits=has_logits,
        snapshots=len(places),
    )
    if header.layout.keys() != expected.keys():
        raise _Wrong(f"it holds {sorted(header.layout)}, where {sorted(expected)} belong")
    for name, wanted in expected.items():
        if header.layout[name] != wanted:
            raise _Wrong(f"its {name} is {_words(header.layout[name])}, where {_words(wanted)} belongs")


def _layout(
    shapes: Shapes, dtype: torch.dtype, *, tail: int, opened: int | None, logits: bool, snapshots: int
) -> Layout:
    """Every tensor of a file with so many ids in the tail, open tokens and snapshots."""
    heads = shapes.layers, shapes.kv_heads
    memory = DTYPES[state_dtype(dtype)], (*heads, shapes.feature_dim, shapes.value_dim)
    normalizer = DTYPES[state_dtype(dtype)], (*heads, shapes.feature_dim)
    scores = DTYPES[dtype], (shapes.vocab_size,)
    recent = DTYPES[dtype], (shapes.layers, shapes.recent, shapes.recent_channels)
    whole: Layout = {"memory": memory, "normalizer": normalizer}  # of every segment's end
    if shapes.recent:
        whole["recent"] = recent
    if shapes.context:
        whole["context_key"] = DTYPES[dtype], (*heads, shapes.context, shapes.head_dim)
        whole["context_value"] = DTYPES[dtype], (*heads, shapes.context, shapes.value_dim)
    if shapes.earlier:
        whole |= {"earlier_memory": memory, "earlier_normalizer": normalizer}
    layout: Layout = whole | {"tail": ("I32", (tail,))}
    if logits:
        layout["logits"] = scores
    if opened is not None:
        layout |= {"pending_memory": memory, "pending_normalizer": normalizer}
        layout["local_key"] = DTYPES[dtype], (*heads, opened, shapes.head_dim)
        layout["local_value"] = DTYPES[dtype], (*heads, opened, shapes.value_dim)
        if shapes.recent:
            layout["open_recent"] = recent
        if shapes.context:
            seen = min(opened, shapes.context)
            layout["open_context_key"] = DTYPES[dtype], (*heads, seen, shapes.head_dim)
    if snapshots:
        for name, (kind, shape) in (whole | {"logits": scores}).items():
            layout[f"snapshot_{name}"] = kind, (snapshots, *shape)
    return layout


def _most_bytes(fingerprint: Fingerprint, shapes: Shapes) -> int:
    """The size of the largest file that `_check_layout` lets pass."""
    if fingerprint.dtype not in MODEL_DTYPES:
        raise _Wrong(f"the model is of {fingerprint.dtype}, and states are of {', '.join(MODEL_DTYPES)}")
    layout = _layout(
        shapes,
        MODEL_DTYPES[fingerprint.dtype],
        tail=shapes.most_tail,
        opened=fingerprint.segment_length,
        logits=True,
        snapshots=shapes.most_snapshots,
    )
    return 8 + MOST_HEADER + sum(SIZES[dtype] * math.prod(shape) for dtype, shape in layout.values())


def _own_shapes(header: _Header) -> Shapes:
    """The shapes that the file's own tensors suggest."""
    layers, kv_heads, feature_dim, value_dim = header._shape("memory", 4)
    recent, channels = header._shape("recent", 3)[1:] if "recent" in header.layout else (0, 0)
    context, head_dim = header._shape("context_key", 4)[2:] if "context_key" in header.layout else (0, 0)
    vocabulary = {"logits": 1, "snapshot_logits": 2}  # and their dimensions
    sizes = [
        header._shape(name, dimensions)[-1]
        for name, dimensions in vocabulary.items()
        if name in header.layout
    ]
    return Shapes(
        layers=layers,
        kv_heads=kv_heads,
        feature_dim=feature_dim,
        head_dim=head_dim if header.opened is None else header._shape("local_key", 4)[3],
        value_dim=value_dim,
        recent=recent,
        recent_channels=channels,
        context=context,
        earlier="earlier_memory" in header.layout,
        vocab_size=sizes[0] if sizes else 0,
        most_tail=header.tail,
        most_snapshots=len(header.snapshots),
    )


def _words(entry: tuple[str, tuple[int, ...]]) -> str:
    dtype, shape = entry
    return f"{dtype} {shape}"


# --- the seal --------------------------------------------------------------------------------------------

UNSEALED = "0" * 64  # stands in the header, instead of the hash, while the hash is taken
SEAL = rb"\"sha256\":\""  # what stands before it: JSON inside of JSON


def _sealed(data: bytes) -> list[bytes]:
    """The file's bytes in pieces, with the hash of all of them in its place in the header."""
    place = data.index(SEAL + UNSEALED.encode()) + len(SEAL)
    digest = hashlib.sha256(data).hexdigest().encode()
    return [data[:place], digest, data[place + len(digest) :]]


def _verified(file: BinaryIO, header: _Header) -> Iterator[bytes]:
    """All bytes of the file a few at a time, its `header` first; raises _Wrong at the end if one is wrong."""
    seal = SEAL + header.sha256.encode()
    if header.raw.count(seal) != 1:
        raise _damaged()
    digest = hashlib.sha256(header.raw.replace(seal, SEAL + UNSEALED.encode()))
    yield header.raw
    for start in range(len(header.raw), header.size, BLOCK):
        block = _exactly(file, min(BLOCK, header.size - start))
        digest.update(block)
        yield block
    if digest.hexdigest() != header.sha256:
        raise _damaged()


# --- files -----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The regular file `path`, open; whatever is wrong with it becomes a StateFileError that names it."""
    try:
        if path.is_symlink():  # `_open` would refuse it too, with fewer words
            raise _Wrong("it is a link; give the file that it leads to")
        with open(path, "rb", opener=_open) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _Wrong("it is no regular file")
            yield file
    except _Wrong as wrong:
        raise StateFileError(f"{path} cannot be loaded: {wrong}") from None
    except OSError as error:
        raise StateFileError(f"{path} cannot be loaded: {error.strerror or error}") from None


def _open(path: str, flags: int) -> int:
    """Open without following a link, and without waiting at a pipe for someone to write into it."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise _Wrong("it is truncated, or no state file")
    return data


def _write_whole(path: Path, blocks: Iterable[bytes]) -> int:
    """Write `blocks` to `path` or leave everything as it was; returns how many bytes they have."""
    try:
        check_target(path)
        descriptor, unfinished = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name[:40]}.", suffix=".unfinished"
        )  # of mode 0600
        try:
            with os.fdopen(descriptor, "wb") as file:
                size = sum(file.write(block) for block in blocks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise StateFileError(f"{path} cannot be written: {error.strerror or error}") from None
    return size


def check_target(path: Path) -> None:
    """Raise StateFileError where moving a file there would destroy something else, or would not reach it."""
    if path.is_symlink():
        raise StateFileError(f"{path} is a link; give the file that it leads to")
    if path.is_dir():
        raise StateFileError(f"{path} is a folder; give the name of a file in it")
    if path.exists() and not path.is_file():
        raise StateFileError(f"{path} is no regular file; give another name")
    if not path.parent.is_dir():
        raise StateFileError(f"there is no folder {path.parent} for {path.name}; make it first")


def _sync_folder(folder: Path) -> None:
    """Have the move itself on the disk, too, where the system knows how."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # what some network folders say to this
            raise
    finally:
        os.close(descriptor)
