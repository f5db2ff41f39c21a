"""Choosing the next token: transformers' options by their names, its processors for their effect."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are chosen; what a caller leaves out comes from the model's `generation_config`.

    Attributes:
        max_new_tokens: stop after so many.
        do_sample: draw from the distribution; otherwise the likeliest token is taken.
        temperature: of the distribution, above 0.
        top_k: keep the likeliest so many; 0 for all.
        top_p: keep the likeliest that together have this probability.
        min_p: keep those with at least this part of the likeliest one's probability.
        typical_p: locally typical sampling; 1 for none.
        repetition_penalty: divides the scores of tokens in the open segment or generated since; 1 for none.
        no_repeat_ngram_size: no n-gram of this size twice among those tokens; 0 for none.
        eos_token_id: stop after one of these; an empty tuple for never.
        seed: of the random numbers; None draws one.
    """

    max_new_tokens: int = 256
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    eos_token_id: tuple[int, ...] = ()
    seed: int | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, options: dict[str, Any]) -> "SamplingOptions":
        """`options` over the model's own; ValueError for names that are not known here."""
        names = [field.name for field in fields(cls)]
        unknown = sorted(set(options) - set(names))
        if unknown:
            raise ValueError(
                f"generation options {', '.join(unknown)} are not supported; known are {', '.join(names)}"
            )
        own = {name: getattr(model.generation_config, name, None) for name in names if name != "seed"}
        chosen = {name: value for name, value in own.items() if value is not None} | options
        ends = chosen.get("eos_token_id")
        chosen["eos_token_id"] = () if ends is None else tuple([ends] if isinstance(ends, int) else ends)
        return cls(**chosen)

    def __post_init__(self) -> None:
        for name, kinds, right, remedy in _RANGES:
            value = getattr(self, name)
            optional = value is None and name in ("min_p", "seed")
            known = isinstance(value, kinds) and (kinds is bool or not isinstance(value, bool))
            if not optional and not (known and right(value)):
                raise ValueError(f"{name} is {value!r}; give {remedy}")
        if not all(isinstance(token, int) and token >= 0 for token in self.eos_token_id):
            raise ValueError(f"eos_token_id is {self.eos_token_id}; give token ids, or None for none")


_NUMBER = (int, float)
_RANGES: tuple[tuple[str, Any, Callable[[Any], bool], str], ...] = (
    ("max_new_tokens", int, lambda x: x >= 1, "a whole number of at least 1"),
    ("do_sample", bool, lambda x: True, "True or False"),
    ("temperature", _NUMBER, lambda x: 0 < x < math.inf, "a number above 0, or do_sample=False"),
    ("top_k", int, lambda x: x >= 0, "a whole number, 0 for all"),
    ("top_p", _NUMBER, lambda x: 0 < x <= 1, "a number above 0 and up to 1"),
    ("min_p", _NUMBER, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    ("typical_p", _NUMBER, lambda x: 0 < x <= 1, "a number above 0 and up to 1"),
    ("repetition_penalty", _NUMBER, lambda x: 0 < x < math.inf, "a number above 0, 1 for none"),
    ("no_repeat_ngram_size", int, lambda x: x >= 0, "a whole number, 0 for none"),
    ("seed", int, lambda x: True, "a whole number"),
)


class Sampler:
    """Picks one sequence's tokens by `options`."""

    def __init__(self, options: SamplingOptions) -> None:
        self.options = options
        self._processors = _processors(options)
        self._random = torch.Generator()
        if options.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(options.seed)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever came before."""
        return not self.options.do_sample and not self._processors

    def pick(self, logits: Tensor, seen: Sequence[int]) -> int:
        """The next token's id from `logits` (vocabulary,), given the ids `seen` of late."""
        if self.is_greedy:
            return int(logits.argmax())
        ids: Any = torch.tensor([list(seen)], dtype=torch.int64)
        scores = self._processors(ids, cast(Any, logits[None].float().cpu()))
        if not self.options.do_sample:
            return int(scores.argmax())
        return int(torch.multinomial(scores.softmax(dim=-1), 1, generator=self._random))


def _processors(options: SamplingOptions) -> LogitsProcessorList:
    """In the order in which transformers applies them."""
    made: list[Any] = []
    if options.repetition_penalty != 1.0:
        made.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.no_repeat_ngram_size:
        made.append(NoRepeatNGramLogitsProcessor(options.no_repeat_ngram_size))
    if options.do_sample:
        if options.temperature != 1.0:
            made.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k:
            made.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1.0:
            made.append(TopPLogitsWarper(options.top_p))
        if options.min_p is not None:
            made.append(MinPLogitsWarper(options.min_p))
        if options.typical_p < 1.0:
            made.append(TypicalLogitsWarper(options.typical_p))
    return LogitsProcessorList(made)
