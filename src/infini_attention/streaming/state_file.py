"""State files: safetensors, written whole or not at all, and believed only after every check.

A file holds the memory at the end of a text's last whole segment and the ids of the tokens since; in exact mode
also the open segment as it was computed; and, if wanted, snapshots of earlier segment ends. The header says
what the state belongs to and holds a digest of everything. Nothing in a file names code or another file.
"""

import contextlib
import hashlib
import json
import os
import stat
import struct
import tempfile
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from infini_attention.streaming.fingerprint import Fingerprint

KIND, FORMAT = "infini-attention state", 1
MOST_HEADER = 2**20  # bytes
MOST_FILE = 2**36  # bytes, where the model that says how large a file may be is not at hand


class StateFileError(ValueError):
    """A file that is no state, not a whole one, or not one for this model; the text says what is wrong."""


@dataclass(frozen=True)
class Shapes:
    """Sizes that a model gives its states; `most_tail` ids and `most_snapshots` are what a file may hold."""

    layers: int
    kv_heads: int
    feature_dim: int
    head_dim: int
    value_dim: int
    vocab_size: int
    most_tail: int
    most_snapshots: int


@dataclass(frozen=True)
class OpenSegment:
    """The open segment as it was computed.

    Sums are (layers, kv_heads, feature_dim[, value_dim]) fp32; keys and values (layers, kv_heads, open, dim) in
    the model's dtype, for the first `open` tokens of the tail.
    """

    pending_memory: Tensor
    pending_normalizer: Tensor
    local_key: Tensor
    local_value: Tensor


@dataclass(frozen=True)
class Snapshot:
    """The state after `tokens` tokens, whole segments: as in `StateContents`."""

    tokens: int
    digest: str
    memory: Tensor
    normalizer: Tensor
    logits: Tensor


@dataclass(frozen=True)
class StateContents:
    """All that a file holds.

    Attributes:
        fingerprint: what the state belongs to.
        tokens: fed so far, the tail included.
        digest: of the tokens up to the last whole segment; see `history`.
        memory: (layers, kv_heads, feature_dim, value_dim) fp32, at the end of that segment.
        normalizer: (layers, kv_heads, feature_dim) fp32.
        tail: (n,) int32 ids of the tokens since.
        logits: (vocab_size,) after the last token that went through the model; None where it will be read again.
        open_segment: what was computed of the tail; None in compact mode.
        snapshots: earlier states, in order.
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


def write_state(path: str | PathLike[str], contents: StateContents) -> int:
    """Write `contents` to `path`, readable by its owner alone; returns the size in bytes.

    The file is written beside its place and moved there when it is safely on disk, so that at any moment there
    is the old or the new one, whole. Raises StateFileError where that cannot be.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _tensors(contents).items()}
    metadata = _metadata(contents)
    metadata["sha256"] = _digest(metadata, {name: _bytes(tensor) for name, tensor in tensors.items()})
    data = save(tensors, metadata)
    _write_whole(Path(path), data)
    return len(data)


def read_state(path: str | PathLike[str], fingerprint: Fingerprint, shapes: Shapes) -> StateContents:
    """What is in the file `path`, for the model that `fingerprint` and `shapes` describe.

    Raises StateFileError for a file of another model or setting, saying what differs, and for anything that is
    not exactly what `write_state` writes.
    """
    data = _read_whole(Path(path), _largest(fingerprint, shapes))
    with _complaining_about(path):
        metadata, tensors = _opened(data)
        differences = _fingerprint_of(metadata).differences(fingerprint)
        if differences:
            raise StateFileError(f"it belongs to another model or setting: {'; '.join(differences)}")
        _check_tensors(metadata, tensors, shapes, getattr(torch, fingerprint.dtype))
        return _contents(metadata, tensors)


def read_header(path: str | PathLike[str]) -> dict[str, Any]:
    """What the file says of itself, its digest checked; raises StateFileError as `read_state` does."""
    data = _read_whole(Path(path), MOST_FILE)
    with _complaining_about(path):
        metadata, tensors = _opened(data)
        return {
            "tokens": int(metadata["tokens"]),
            "tail": len(tensors["tail"]),
            "mode": "exact" if "local_key" in tensors else "compact",
            "snapshots": [place for place, _ in json.loads(metadata["snapshots"])],
            "bytes": len(data),
            "format": FORMAT,
            **asdict(_fingerprint_of(metadata)),
        }


def copy_state(path: str | PathLike[str], target: str | PathLike[str]) -> int:
    """Write the state of one file to another, after the checks of `read_header`; returns its size in bytes."""
    data = _read_whole(Path(path), MOST_FILE)
    with _complaining_about(path):
        _opened(data)
    if os.path.lexists(target):
        raise StateFileError(f"{target} exists; choose another name, or remove it")
    _write_whole(Path(target), data)
    return len(data)


def _tensors(contents: StateContents) -> dict[str, Tensor]:
    tensors = {name: getattr(contents, name) for name in ("memory", "normalizer", "tail")}
    if contents.logits is not None:
        tensors["logits"] = contents.logits
    if contents.open_segment is not None:
        tensors |= vars(contents.open_segment)
    if contents.snapshots:
        for name in ("memory", "normalizer", "logits"):
            parts = [getattr(snapshot, name).cpu() for snapshot in contents.snapshots]
            tensors[f"snapshot_{name}"] = torch.stack(parts)
    return tensors


def _metadata(contents: StateContents) -> dict[str, str]:
    return {
        "kind": KIND,
        "format": str(FORMAT),
        "fingerprint": json.dumps(asdict(contents.fingerprint)),
        "tokens": str(contents.tokens),
        "digest": contents.digest,
        "snapshots": json.dumps([[snapshot.tokens, snapshot.digest] for snapshot in contents.snapshots]),
    }


def _contents(metadata: dict[str, str], tensors: dict[str, Tensor]) -> StateContents:
    opened = [field.name for field in fields(OpenSegment)]
    places = json.loads(metadata["snapshots"])
    parts = (
        zip(*(tensors[f"snapshot_{name}"] for name in ("memory", "normalizer", "logits")), strict=True)
        if places
        else []
    )
    return StateContents(
        fingerprint=_fingerprint_of(metadata),
        tokens=int(metadata["tokens"]),
        digest=metadata["digest"],
        memory=tensors["memory"],
        normalizer=tensors["normalizer"],
        tail=tensors["tail"],
        logits=tensors.get("logits"),
        open_segment=OpenSegment(**{name: tensors[name] for name in opened})
        if opened[0] in tensors
        else None,
        snapshots=[
            Snapshot(tokens, digest, *part) for (tokens, digest), part in zip(places, parts, strict=True)
        ],
    )


def _opened(data: bytes) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors, once the digest of both is right."""
    header = _header(data)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or metadata.get("kind") != KIND:
        raise StateFileError("it is no state file; give one that `infini ingest` or Session.save wrote")
    if metadata.get("format") != str(FORMAT):
        raise StateFileError(f"its format is {metadata.get('format')!r}, and this version reads {FORMAT}")
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise StateFileError(f"it is damaged ({error})") from None
    claimed = metadata.pop("sha256", None)
    if claimed != _digest(metadata, {name: _bytes(tensor) for name, tensor in tensors.items()}):
        raise StateFileError("its contents are not what was written; it was tampered with or is damaged")
    return metadata, tensors


def _header(data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        raise StateFileError("it is too short to be a state file")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(MOST_HEADER, len(data) - 8):
        raise StateFileError("it is truncated, or no state file")
    header = json.loads(data[8 : 8 + size])
    if not isinstance(header, dict):
        raise StateFileError("it is no state file")
    return header


def _fingerprint_of(metadata: dict[str, str]) -> Fingerprint:
    return Fingerprint(**json.loads(metadata["fingerprint"]))


def _check_tensors(
    metadata: dict[str, str], tensors: dict[str, Tensor], shapes: Shapes, dtype: torch.dtype
) -> None:
    """Raise StateFileError unless there is exactly what belongs there, of the right sizes, finite."""
    size, tokens = _fingerprint_of(metadata).segment_length, int(metadata["tokens"])
    tail = len(tensors["tail"])
    opened = tensors["local_key"].shape[2] if "local_key" in tensors else None
    places = [place for place, _ in json.loads(metadata["snapshots"])]
    _check(0 <= tail <= shapes.most_tail and tail <= tokens, f"has {tail} ids after its last segment")
    _check((tokens - tail) % size == 0, f"has {tokens - tail} tokens in segments of {size}")
    _check(opened is None or 0 < opened < size and opened <= tail, f"has {opened} tokens in its open segment")
    _check(len(places) <= shapes.most_snapshots, f"has {len(places)} snapshots")
    _check(places == sorted(set(places)), "has snapshots out of order")
    _check(
        all(0 < place <= tokens and place % size == 0 for place in places), "has snapshots at wrong places"
    )
    expected = _expected(shapes, dtype, tail, opened, len(places))
    if opened is None and (tail or not tokens):
        expected.pop("logits")  # the tail will be read again, or nothing was read
    _check(set(tensors) == set(expected), f"holds {sorted(tensors)} where {sorted(expected)} belong")
    for name, (shape, kind) in expected.items():
        tensor = tensors[name]
        _check(
            tuple(tensor.shape) == shape and tensor.dtype == kind,
            f"has {name} of {tuple(tensor.shape)} {tensor.dtype} where {shape} {kind} belongs",
        )
        _check(
            not kind.is_floating_point or bool(torch.isfinite(tensor).all()), f"has {name} that is not finite"
        )
    ids = tensors["tail"]
    _check(
        tail == 0 or 0 <= int(ids.min()) <= int(ids.max()) < shapes.vocab_size,
        "has ids outside the vocabulary",
    )


def _expected(
    shapes: Shapes, dtype: torch.dtype, tail: int, opened: int | None, snapshots: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor of a file with so many ids, open tokens and snapshots."""
    state = torch.float64 if dtype == torch.float64 else torch.float32
    heads = shapes.layers, shapes.kv_heads
    memory, normalizer = (*heads, shapes.feature_dim, shapes.value_dim), (*heads, shapes.feature_dim)
    logits = (shapes.vocab_size,)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "memory": (memory, state),
        "normalizer": (normalizer, state),
        "tail": ((tail,), torch.int32),
        "logits": (logits, dtype),
    }
    if opened is not None:
        expected["pending_memory"], expected["pending_normalizer"] = (memory, state), (normalizer, state)
        expected["local_key"] = ((*heads, opened, shapes.head_dim), dtype)
        expected["local_value"] = ((*heads, opened, shapes.value_dim), dtype)
    if snapshots:
        for name, (shape, kind) in (
            ("memory", (memory, state)),
            ("normalizer", (normalizer, state)),
            ("logits", (logits, dtype)),
        ):
            expected[f"snapshot_{name}"] = ((snapshots, *shape), kind)
    return expected


def _largest(fingerprint: Fingerprint, shapes: Shapes) -> int:
    """Bytes that a file for this model can have at most."""
    dtype = getattr(torch, fingerprint.dtype)
    tensors = _expected(shapes, dtype, shapes.most_tail, fingerprint.segment_length, shapes.most_snapshots)
    return (
        8 + MOST_HEADER + sum(kind.itemsize * torch.Size(shape).numel() for shape, kind in tensors.values())
    )


def _check(right: bool, complaint: str) -> None:
    if not right:
        raise StateFileError(f"it {complaint}")


@contextlib.contextmanager
def _complaining_about(path: str | PathLike[str]) -> Any:
    """Whatever is wrong with a file's contents becomes a StateFileError that names the file."""
    try:
        yield
    except StateFileError as error:
        raise StateFileError(f"{os.fspath(path)} cannot be loaded: {error}") from None
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        IndexError,
        RuntimeError,
        RecursionError,
    ) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StateFileError(f"{os.fspath(path)} cannot be loaded: it is damaged ({reason})") from None


def _read_whole(path: Path, most: int) -> bytes:
    """The bytes of a regular file that is no link, if they are not too many."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        reason = "it is a link" if path.is_symlink() else error.strerror
        raise StateFileError(f"{path} cannot be loaded: {reason}; give the state file itself") from None
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise StateFileError(f"{path} cannot be loaded: it is no regular file; give a state file")
        if status.st_size > most:
            raise StateFileError(
                f"{path} cannot be loaded: it has {status.st_size:,} bytes, and a state at most {most:,}"
            )
        return file.read(status.st_size)


def _write_whole(path: Path, data: bytes) -> None:
    if path.is_symlink() or path.is_dir():
        raise StateFileError(f"{path} is a {'link' if path.is_symlink() else 'folder'}; give a file's name")
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".unfinished")
    except OSError as error:
        raise StateFileError(f"{path} cannot be written: {error.strerror}; give a folder that can") from None
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(descriptor)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _bytes(x: Tensor) -> memoryview:
    return memoryview(x.contiguous().view(-1).view(torch.uint8).numpy())


def _digest(metadata: dict[str, str], tensors: dict[str, memoryview]) -> str:
    digest = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {len(tensors[name])};".encode())
        digest.update(tensors[name])
    return digest.hexdigest()
