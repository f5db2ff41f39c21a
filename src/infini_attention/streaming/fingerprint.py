"""Fingerprint: what a state belongs to, to the last bit of the weights."""

import hashlib
import json
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import tokenizers
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BLOCK = 2**18  # words of 8 bytes that are summed at once: 2 MiB, which stay in a core's cache
MIXERS = 0x1E3779B97F4A7C15, 0x3F58476D1CE4E5B9  # odd, with bits all over


@dataclass(frozen=True)
class Fingerprint:
    """What must be the same for a state to make sense.

    Attributes:
        model_type: of the model's config.
        weights: hexadecimal; changes with any bit of any parameter or persistent buffer, not with the device.
        adapter: names of the active PEFT adapters joined by ",", or "none".
        tokenizer: hexadecimal, of all that decides which ids a text becomes.
        segment_length: N.
        update_rule: of the memory.
        feature_map: of the memory.
        normalization: of what the memory answers.
        empty_memory: how a head reads a memory that holds nothing yet.
        local_attention: what is attended to beside the memory.
        sink_tokens: how many of the first tokens that keeps in sight; 0 where it is not "sink".
        dtype: of the model, such as "bfloat16".
    """

    model_type: str
    weights: str
    adapter: str
    tokenizer: str
    segment_length: int
    update_rule: str
    feature_map: str
    normalization: str
    empty_memory: str
    local_attention: str
    sink_tokens: int
    dtype: str

    def differences(self, other: "Fingerprint") -> list[str]:
        """In words, what is not the same in a file (`self`) and here (`other`); empty if all is."""
        return [
            f"{name} is {_short(theirs)} in the file and {_short(ours)} here"
            for name, theirs, ours in (
                (f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)
            )
            if theirs != ours
        ]


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """The fingerprint of a model with memory and its tokenizer.

    Hashes are remembered until a weight is replaced or changed in place. Changes that torch does not count,
    as through `parameter.data`, go unnoticed while the model object lives.

    Raises:
        ValueError: weights without data (on the meta device).
    """
    config: Any = model.config
    return Fingerprint(
        model_type=config.model_type,
        weights=_weights(model),
        adapter=_adapter(model),
        tokenizer=_tokenizer(tokenizer),
        segment_length=config.segment_length,
        update_rule=config.update_rule,
        feature_map=config.feature_map,
        normalization=config.normalization,
        empty_memory=config.empty_memory,
        local_attention=config.local_attention,
        sink_tokens=config.sink_tokens if config.local_attention == "sink" else 0,
        dtype=str(model.dtype).removeprefix("torch."),
    )


# --- weights ---------------------------------------------------------------------------------------------

_WEIGHTS: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def _weights(model: PreTrainedModel) -> str:
    tensors = {name: x for name, x in model.state_dict(keep_vars=True).items() if isinstance(x, Tensor)}
    state = _state_of(tensors)
    known = _WEIGHTS.get(model)
    if known is None or state is None or known[0] != state:
        known = _WEIGHTS[model] = state, _hash_of(tensors)
    return known[1]


def _state_of(tensors: dict[str, Tensor]) -> list[tuple[str, int, int]] | None:
    """What changes when a tensor is replaced or changed in place; None where torch keeps no count of that."""
    if any(x.is_inference() for x in tensors.values()):
        return None
    return [(name, x.data_ptr(), x._version) for name, x in tensors.items()]


def _hash_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    sums: dict[int, bytes] = {}  # by the tensor's id, since tied weights have several names
    factors: dict[torch.device, Tensor] = {}
    for name, x in tensors.items():
        if x.is_meta:
            raise ValueError(f"{name} is on the meta device and has no data; load the model's weights first")
        if x.device not in factors:
            factors[x.device] = _factors(x.device)
        if id(x) not in sums:
            sums[id(x)] = _checksums(x.detach(), factors[x.device])
        digest.update(f"{name} {tuple(x.shape)} {x.dtype} ".encode() + sums[id(x)])
    return digest.hexdigest()


def _checksums(x: Tensor, factors: Tensor) -> bytes:
    """The bits of `x` in 8 bytes for every BLOCK of its words: their sum modulo 2 ** 64, each times a factor.

    Integers, so that neither the order of summation nor the device changes anything. Factors are odd, so that
    no change of a single word can go unnoticed.
    """
    sums = [(words * factors[: len(words)]).sum() for words in _blocks_of_words(x)]
    return torch.stack(sums).cpu().numpy().tobytes() if sums else b""


def _blocks_of_words(x: Tensor) -> Iterator[Tensor]:
    """The bytes of `x` as int64, BLOCK at a time; the last ones filled up with zeros."""
    data = x.contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = len(data) // 8 * 8
    if whole:
        yield from data[:whole].view(torch.int64).split(BLOCK)
    if whole < len(data):
        yield torch.nn.functional.pad(data[whole:], (0, 8 - len(data) + whole)).view(torch.int64)


def _factors(device: torch.device) -> Tensor:
    """(BLOCK,) odd int64 without a pattern, so that changes of several words do not cancel."""
    mixed = torch.arange(1, BLOCK + 1, device=device) * MIXERS[0]
    mixed = (mixed ^ (mixed >> 29)) * MIXERS[1]
    return (mixed ^ (mixed >> 32)) | 1


# --- adapters and tokenizers -----------------------------------------------------------------------------


def _adapter(model: Any) -> str:
    active = getattr(model, "active_adapters", None)  # a property of PEFT's models, a method of transformers'
    try:
        names = active() if callable(active) else active
    except ValueError:  # how transformers says that there is none
        return "none"
    if not names or _are_disabled(model):
        return "none"
    return names if isinstance(names, str) else ",".join(names)


def _are_disabled(model: PreTrainedModel) -> bool:
    return any(getattr(module, "disable_adapters", None) is True for module in model.modules())


_TOKENIZERS: "weakref.WeakKeyDictionary[Any, tuple[Any, str]]" = weakref.WeakKeyDictionary()


def _tokenizer(tokenizer: Any) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = id(backend), len(tokenizer)  # adding tokens changes the second
    known = _TOKENIZERS.get(tokenizer)
    if known is None or known[0] != state:
        text = json.dumps(_description(tokenizer, backend), sort_keys=True)
        known = _TOKENIZERS[tokenizer] = state, hashlib.sha256(text.encode()).hexdigest()
    return known[1]


def _description(tokenizer: Any, backend: Any) -> dict[str, Any]:
    if not isinstance(backend, tokenizers.Tokenizer):
        return dict(tokenizer.get_vocab())
    description = json.loads(backend.to_str())
    for changes_with_every_call in ("truncation", "padding"):
        description.pop(changes_with_every_call, None)
    return dict(description)


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
