"""Fingerprint: what a state belongs to, to the last bit of the weights."""

import hashlib
import json
import weakref
from dataclasses import dataclass, fields
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

BLOCK = 2**22  # elements of a tensor that are summed at once
MULTIPLIER, OFFSET = 0x9E3779B97F4A7C15 - 2**64, 0x2545F4914F6CDD1D
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Fingerprint:
    """What must be the same for a state to make sense; hashes in hexadecimal.

    `weights` changes with any bit of any parameter or buffer; `adapter` names the active PEFT adapters.
    """

    model_type: str
    weights: str
    adapter: str
    tokenizer: str
    segment_length: int
    update_rule: str
    feature_map: str
    empty_memory: str
    dtype: str

    def differences(self, other: "Fingerprint") -> list[str]:
        """In words, what is not the same in a file (`self`) and here (`other`)."""
        names = [field.name for field in fields(self)]
        pairs = [(name, getattr(self, name), getattr(other, name)) for name in names]
        return [
            f"{name} is {_short(theirs)} in the file and {_short(ours)} here"
            for name, theirs, ours in pairs
            if theirs != ours
        ]


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
    """The fingerprint of a model with memory and its tokenizer; remembered until a weight changes."""
    config: Any = model.config
    return Fingerprint(
        model_type=config.model_type,
        weights=_weights(model),
        adapter=_adapter(model),
        tokenizer=_tokenizer(tokenizer),
        segment_length=config.segment_length,
        update_rule=config.update_rule,
        feature_map=config.feature_map,
        empty_memory=config.empty_memory,
        dtype=str(model.dtype).removeprefix("torch."),
    )


_WEIGHTS: "weakref.WeakKeyDictionary[PreTrainedModel, tuple[Any, str]]" = weakref.WeakKeyDictionary()
_TOKENIZERS: "weakref.WeakKeyDictionary[Any, str]" = weakref.WeakKeyDictionary()


def _weights(model: PreTrainedModel) -> str:
    tensors = sorted(chain(model.named_parameters(), model.named_buffers()))
    versions = [
        (name, tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version) for name, tensor in tensors
    ]
    known = _WEIGHTS.get(model)
    if known is None or known[0] != versions:
        digest = hashlib.sha256()
        sums = torch.stack([_checksum(tensor.detach()).cpu() for _, tensor in tensors]).tolist()
        for (name, tensor), total in zip(tensors, sums, strict=True):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total};".encode())
        known = _WEIGHTS[model] = versions, digest.hexdigest()
    return known[1]


def _checksum(x: Tensor) -> Tensor:
    """The bits of `x` in two numbers: sums modulo 2 ** 64 of its elements, weighted by where they stand.

    Integers, so that the order of summation, and with it the device, changes nothing. Weights are odd, so that
    no change of one element goes unnoticed.
    """
    bits = (
        x.contiguous().view(-1).view(INTEGERS[x.element_size()])
        if x.dtype != torch.bool
        else x.view(-1).int()
    )
    total = torch.zeros(2, dtype=torch.int64, device=x.device)
    for start in range(0, len(bits), BLOCK):
        part = bits[start : start + BLOCK].long()
        place = torch.arange(start, start + len(part), device=x.device)
        weights = (place * MULTIPLIER) | 1
        total[0] += (part * weights).sum()
        total[1] += ((part ^ OFFSET) * (weights.roll(1) ^ place * 2)).sum()
    return total


def _adapter(model: Any) -> str:
    active = getattr(model, "active_adapters", None)
    try:
        names = active() if callable(active) else active
    except (ValueError, ImportError):  # how transformers says that there is none
        return "none"
    return ",".join(names) if names else "none"


def _tokenizer(tokenizer: Any) -> str:
    known = _TOKENIZERS.get(tokenizer)
    if known is None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        text = json.dumps(sorted(tokenizer.get_vocab().items())) if backend is None else backend.to_str()
        known = _TOKENIZERS[tokenizer] = hashlib.sha256(text.encode()).hexdigest()
    return known


def _short(value: object) -> str:
    text = str(value)
    return text[:12] if len(text) == 64 else text
