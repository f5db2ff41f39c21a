"""The configuration fields that every baseline's config gains, and the arithmetic of its memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from infini_attention.models.config import head_dim_of


@dataclass(kw_only=True)
class BaselineConfigMixin:
    """Fields of every baseline's config; they come on top of those of the family's own config.

    Attributes:
        segment_length: N, tokens a segment; systems that know none only leave it to the data.

    Raises:
        ValueError: a value that cannot be right; the text names it and the remedy.
    """

    segment_length: int = 2048

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)  # type: ignore[misc]
        # `strict` runs validators too, but wraps what they raise in an exception that is no ValueError.
        self.validate_baseline()

    def validate_baseline(self) -> None:
        """Raise ValueError for fields that cannot be right."""
        self.check_counts("segment_length")

    def check_counts(self, *names: str) -> None:
        """Raise ValueError where one of these fields is no count of anything."""
        for name in names:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give a whole number of at least 1")

    def memory_floats(self, length: int) -> int:
        """See `baselines.memory_size.memory_floats`."""
        raise NotImplementedError

    def keys_seen(self, layer: int, length: int) -> float:
        """Keys that a token sees in `layer`, on average over a text of `length` tokens."""
        raise NotImplementedError

    @property
    def floats_a_token(self) -> int:
        """Numbers in a token's keys and values in one layer: (d_key + d_value) H, H key/value heads."""
        return 2 * head_dim_of(self) * self.num_key_value_heads  # type: ignore[attr-defined]

    def whole_segments(self, length: int) -> int:
        """How many segments of a text are complete."""
        return length // self.segment_length

    def mean_keys(self, length: int, earlier: Callable[[int], float]) -> float:
        """The average of `keys_seen` where a token sees its own segment up to itself, and `earlier` ones.

        `earlier` says how many keys are seen before a segment that starts at the given token.
        """
        starts = range(0, length, self.segment_length)
        sizes = [min(self.segment_length, length - start) for start in starts]
        seen = [size * (size / 2 + earlier(start)) for start, size in zip(starts, sizes, strict=True)]
        return sum(seen) / length

    @property
    def _layers(self) -> int:
        return self.num_hidden_layers  # type: ignore[attr-defined]
