"""Random cases for tests of `infini_attention`, and how they are laid out, run and compared.

A case is a list of *rows*: sequences without batch or padding, of any lengths. `run` feeds them to a
backend in any number of pieces, each piece padded or packed in a way of its own, and takes the rows out
again. So one comparison of rows covers splits, padding, packing, and states whose rows have different open
lengths. Places that hold no token are NaN, going in: whatever reads them shows.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from infini_attention.ops import MemoryState, feature_maps, infini_attention
from infini_attention.ops.local import LOCAL_ATTENTION, context_tokens
from infini_attention.ops.normalization import NORMALIZATIONS

LAYOUTS = ("none", "right", "left", "holes", "packed")
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
STATE_FIELDS = ("memory", "normalizer", "pending_memory", "pending_normalizer", "local_key", "local_value")
MAPS = feature_maps.names()
TOKEN_FIELDS = ("query", "key", "value", "local_query", "local_key")


@dataclass(frozen=True)
class Row:
    """One sequence: tensors (heads or kv_heads, length, dim), and how often each segment counts."""

    query: Tensor
    key: Tensor
    value: Tensor
    local_query: Tensor
    local_key: Tensor
    weights: Tensor | None = None
    context_key: Tensor | None = None
    local_value: Tensor | None = None
    context_value: Tensor | None = None

    @property
    def length(self) -> int:
        return self.query.shape[1]

    def tokens(self) -> dict[str, Tensor]:
        """What there is of every token, by name."""
        others = ("context_key", "local_value", "context_value")
        tensors = {name: getattr(self, name) for name in (*TOKEN_FIELDS, *others)}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def cut(self, first: int, last: int) -> "Row":
        """The tokens from `first` to before `last`, without weights."""
        return Row(**{name: tensor[:, first:last] for name, tensor in self.tokens().items()})


@dataclass(frozen=True)
class Case:
    """Rows, a gate (heads,) and the settings of `infini_attention`, as keyword arguments."""

    rows: list[Row]
    gate: Tensor
    settings: dict[str, Any]

    @property
    def segment_length(self) -> int:
        return self.settings["segment_length"]

    @property
    def context_tokens(self) -> int:
        """How many tokens outside its own segment a token sees."""
        return context_tokens(
            self.settings.get("local_attention", "segment"),
            segment_length=self.segment_length,
            sink_tokens=self.settings.get("sink_tokens", 4),
        )

    def tensors(self) -> list[Tensor]:
        """Everything that can have a gradient."""
        collected: list[Tensor] = []
        self.map(lambda tensor: collected.append(tensor) or tensor)
        return collected

    def with_tensors(self, tensors: Iterable[Tensor]) -> "Case":
        """The same case with others in place of `tensors()`, in the same order."""
        remaining = iter(tensors)
        return self.map(lambda _: next(remaining))

    def map(self, function: Callable[[Tensor], Tensor]) -> "Case":
        """The case with `function` of each of its tensors."""
        rows = [
            Row(
                **{name: function(tensor) for name, tensor in row.tokens().items()},
                weights=None if row.weights is None else function(row.weights),
            )
            for row in self.rows
        ]
        return replace(self, rows=rows, gate=function(self.gate))

    def to(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> "Case":
        """Tokens in `dtype`; gate and weights keep at least fp32, as users have them."""
        high = torch.promote_types(dtype, torch.float32)
        case = self.map(lambda tensor: tensor.to(device, dtype))
        rows = [
            replace(row, weights=None if old.weights is None else old.weights.to(device, high))
            for row, old in zip(case.rows, self.rows, strict=True)
        ]
        return replace(case, rows=rows, gate=self.gate.to(device, high))

    def leaves(self) -> "Case":
        """The same case with tensors of its own that ask for gradients."""
        return self.map(lambda tensor: tensor.detach().clone().requires_grad_())


def make_case(
    lengths: Sequence[int],
    *,
    seed: int = 0,
    kv_heads: int = 2,
    group: int = 2,
    head_dim: int = 4,
    value_dim: int = 3,
    rotated: bool = True,
    own_values: bool = False,
    own_contexts: bool = False,
    weighted: bool = False,
    **settings: Any,
) -> Case:
    """A case of rows of these `lengths` in fp64; with `own_values` local attention has values of its own.

    With `own_contexts` later segments see others, where they see any: numbers that no training has, so that
    an open segment hands on what came with its last call alone.
    `settings` go to `infini_attention` as they are.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, dtype=torch.float64, generator=generator)

    rows = []
    for length in lengths:
        query, key = randn(kv_heads * group, length, head_dim), randn(kv_heads, length, head_dim)
        local_query = randn(*query.shape) if rotated else query
        local_key = randn(*key.shape) if rotated else key
        segments = -(-length // settings["segment_length"])
        weights = randn(segments).exp() if weighted else None
        value, outside = randn(kv_heads, length, value_dim), settings.get("local_attention", "segment")
        context_key = randn(*key.shape) if rotated and outside != "segment" else None
        local_value = randn(*value.shape) if own_values else None
        context_value = randn(*value.shape) if own_contexts and outside != "segment" else None
        others = context_key, local_value, context_value
        rows.append(Row(query, key, value, local_query, local_key, weights, *others))
    return Case(rows, randn(kv_heads * group), settings)


@st.composite
def cases(draw: st.DrawFn, **fixed: Any) -> Case:
    """Any case of small sizes; `fixed` are arguments of `make_case` that do not vary."""
    segment_length = fixed.get("segment_length", draw(st.integers(1, 6)))
    longest = 4 * segment_length + 2
    update_rule = fixed.get("update_rule", draw(st.sampled_from(["linear", "delta"])))
    normalization = draw(st.sampled_from(NORMALIZATIONS)) if update_rule == "linear" else "sum"
    any_sign = update_rule == "linear" and normalization != "root"
    maps = [name for name in MAPS if feature_maps.get(name).nonnegative or any_sign]
    lengths = st.lists(st.integers(0, longest), min_size=1, max_size=3)
    alike = st.builds(lambda length, rows: [length] * rows, st.integers(0, longest), st.integers(1, 3))
    drawn = {
        "lengths": draw(lengths | alike),
        "seed": draw(st.integers(0, 2**20)),
        "kv_heads": draw(st.integers(1, 2)),
        "group": draw(st.integers(1, 3)),
        "head_dim": draw(st.integers(1, 5)),
        "value_dim": draw(st.integers(1, 4)),
        "rotated": draw(st.booleans()),
        "own_values": draw(st.booleans()),
        "weighted": draw(st.booleans()),
        "segment_length": segment_length,
        "update_rule": update_rule,
        "feature_map": draw(st.sampled_from(maps)),
        "normalization": normalization,
        "empty_memory": draw(st.sampled_from(["local", "gated"])),
        "local_attention": draw(st.sampled_from(LOCAL_ATTENTION)),
        "sink_tokens": draw(st.integers(1, segment_length)),
        "scale": draw(st.sampled_from([None, 0.3])),
        "softcap": draw(st.sampled_from([None, 2.0])),
    }
    return make_case(**(drawn | fixed))


@st.composite
def splits(draw: st.DrawFn, case: Case, max_pieces: int = 4) -> list[list[int]]:
    """How many tokens of each row every piece gets: (pieces, rows); none of a row is a possible share."""
    pieces = draw(st.integers(1, max_pieces))
    shares = []
    for row in case.rows:
        cuts = sorted(draw(st.lists(st.integers(0, row.length), min_size=pieces - 1, max_size=pieces - 1)))
        shares.append([last - first for first, last in zip([0, *cuts], [*cuts, row.length], strict=True)])
    return [list(piece) for piece in zip(*shares, strict=True)]


def run(
    case: Case,
    *,
    backend: str,
    pieces: Sequence[Sequence[int]] | None = None,
    layouts: Sequence[str] = ("none",),
    state: MemoryState | None = None,
) -> tuple[list[Tensor], MemoryState]:
    """Each row's output (heads, length, value_dim) and the state after all `pieces`, on `backend`.

    `pieces` (pieces, rows) says how many tokens of each row go into a call, all at once by default; they
    take the `layouts` in turn. `state` is what came before the rows.
    """
    fed = [0] * len(case.rows)
    seen = fed if state is None else state.length.tolist()  # tokens before the case's first
    outputs: list[list[Tensor]] = [[] for _ in case.rows]
    for number, counts in enumerate(pieces or [[row.length for row in case.rows]]):
        rows = [
            row.cut(first, first + count) for row, first, count in zip(case.rows, fed, counts, strict=True)
        ]
        arguments, places = lay_out(rows, layouts[number % len(layouts)], seed=number)
        weights = _weights(case, seen, fed, counts)
        output, state = infini_attention(
            **arguments,
            **case.settings,
            gate=case.gate,
            state=state,
            segment_weights=weights,
            backend=backend,
        )
        check_padding(output, places)
        for row_outputs, (index, positions) in zip(outputs, places, strict=True):
            row_outputs.append(output[index][:, positions])
        fed = [first + count for first, count in zip(fed, counts, strict=True)]
    assert state is not None
    return [torch.cat(parts, dim=1) for parts in outputs], state


def lay_out(
    rows: Sequence[Row], layout: str, *, seed: int = 0
) -> tuple[dict[str, Any], list[tuple[int, Tensor]]]:
    """Rows as arguments of `infini_attention`, and where each row's tokens stand: (batch index, positions).

    "none" adds nothing but what shorter rows need, and no mask where there are none; "right" and "left" pad,
    "holes" strews padding among the tokens, "packed" lines the rows up in a batch of one.
    """
    generator = torch.Generator().manual_seed(seed)
    counts = [row.length for row in rows]
    device = rows[0].query.device
    masks: dict[str, Tensor] = {}
    if layout == "packed":
        ends = torch.tensor([0, *counts]).cumsum(0)
        batch, width = 1, int(ends[-1])
        places = [(0, torch.arange(first, last)) for first, last in pairwise(ends.tolist())]
        masks["cu_seqlens"] = ends.to(device, torch.int32)
    else:
        batch, width = len(rows), max(counts) if layout == "none" else max(counts) + 2
        places = list(enumerate(_positions(count, width, layout, generator) for count in counts))
        mask = torch.zeros(batch, width, dtype=torch.bool, device=device)
        for index, positions in places:
            mask[index, positions] = True
        if not mask.all():
            masks["padding_mask"] = mask
    tensors = {}
    for name, first in rows[0].tokens().items():
        tensor = torch.full(
            (batch, first.shape[0], width, first.shape[2]), float("nan"), dtype=first.dtype, device=device
        )
        for row, (index, positions) in zip(rows, places, strict=True):
            if row.length:
                tensor[index, :, positions] = getattr(row, name)
        tensors[name] = tensor
    return tensors | masks, places


def check_padding(output: Tensor, places: Sequence[tuple[int, Tensor]]) -> None:
    """Outputs are zero wherever no token stands."""
    empty = torch.ones(output.shape[0], output.shape[2], dtype=torch.bool)
    for index, positions in places:
        empty[index, positions] = False
    assert not output.transpose(1, 2)[empty].any(), "padded places must come out as zeros"


def assert_equal(actual: Tensor, expected: Tensor, *, tolerance: float, what: str = "output") -> None:
    """Largest difference at most `tolerance`, relative to the largest expected value where that is over 1."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    if expected.numel():
        actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
        error, size = (actual - expected).abs().max().item(), max(1.0, expected.abs().max().item())
        assert error <= tolerance * size, f"{what}: error {error:.2e}, values up to {size:.2e}"


def assert_states_equal(actual: MemoryState, expected: MemoryState, *, tolerance: float) -> None:
    """Every field of the two states."""
    assert actual.length.tolist() == expected.length.tolist()
    assert actual.segment_length == expected.segment_length
    assert state_fields(actual).keys() == state_fields(expected).keys()
    for name, wanted in state_fields(expected).items():
        assert getattr(actual, name).dtype == wanted.dtype, name
        assert_equal(getattr(actual, name), wanted, tolerance=tolerance, what=name)


def state_fields(state: MemoryState) -> dict[str, Tensor]:
    """The state's tensors that can have a gradient, by name."""
    return {name: tensor for name, tensor in state.tensors().items() if name != "length"}


def scalar(outputs: Sequence[Tensor], state: MemoryState | None, *, seed: int = 0) -> Tensor:
    """A number that depends on every output and state element in its own way; for gradients."""
    tensors = [*outputs, *([] if state is None else state_fields(state).values())]
    generator = torch.Generator().manual_seed(seed)
    total = tensors[0].new_zeros((), dtype=torch.float64)
    for tensor in tensors:
        direction = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
        total = total + (tensor.double() * direction.to(tensor.device)).sum()
    return total


def _weights(case: Case, seen: Sequence[int], fed: Sequence[int], counts: Sequence[int]) -> Tensor | None:
    """Weights of the segments that one call touches, (rows, segments); 7 where a row has none there."""
    if case.rows[0].weights is None:
        return None
    size = case.segment_length
    columns = max(
        -(-((before + first) % size + count) // size)
        for before, first, count in zip(seen, fed, counts, strict=True)
    )
    table = []
    for row, before, first in zip(case.rows, seen, fed, strict=True):
        assert row.weights is not None
        weights = row.weights[(before + first) // size - before // size :][:columns]
        table.append(torch.cat([weights, weights.new_full((columns - len(weights),), 7.0)]))
    return torch.stack(table)


def _positions(count: int, width: int, layout: str, generator: torch.Generator) -> Tensor:
    if layout == "left":
        return torch.arange(width - count, width)
    if layout == "holes":
        return torch.randperm(width, generator=generator)[:count].sort().values
    return torch.arange(count)
