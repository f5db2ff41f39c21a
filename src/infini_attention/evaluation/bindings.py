"""The memory alone: write key/value pairs into it, read them back, see how much comes back.

No model and no local attention take part, so what is measured is equations (7) to (9) and nothing else.
Keys and values are standard normal, and a binding is asked for with its own key.

    random           independent keys
    colliding        keys in pairs of cosine 0.8, each with its own value
    near-duplicate   keys in pairs of cosine 0.99, each with its own value
    rewritten        every key is written twice, all old values before all new ones; the new one is right
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from infini_attention.evaluation.estimates import Estimate, estimate
from infini_attention.ops import MemoryState, feature_maps, infini_attention
from infini_attention.ops.infini import UPDATE_RULES

CONDITIONS = ("random", "colliding", "near-duplicate", "rewritten")
PAIR_COSINES = {"colliding": 0.8, "near-duplicate": 0.99}

PROBES = (
    1024  # of more bindings than this, about so many are asked for, evenly spread over the order of writing
)

# The second and third sweep change one thing at a time, at this many random bindings.
SWEEP_BINDINGS = 256
SWEEP_HEAD_DIMS = (16, 32, 64, 128, 256)
SWEEP_SEGMENTS = (1, 4, 16, 64, 256)


@dataclass(frozen=True)
class Setting:
    """One cell of the experiment: `bindings` keys of `head_dim` numbers, written in `segments` segments."""

    condition: str = "random"
    update_rule: str = "linear"
    feature_map: str = "elu1"
    bindings: int = 64
    head_dim: int = 64
    segments: int = 16
    normalization: str = "sum"

    @property
    def segment_length(self) -> int:
        """Pairs a segment; fewer bindings than segments are written one a segment."""
        return self.bindings // min(self.segments, self.bindings)


@dataclass(frozen=True)
class Measurement:
    """What came back in one setting; each number a mean over trials with its 95 % interval.

    Attributes:
        setting: what was written, and how.
        relative_error: ||read - value|| / ||value|| over a trial's bindings; 0 is perfect, zeros give 1.
        cosine: mean cosine between what is read and the value.
        recall: share of bindings whose value is, of all values written, the one most similar to what is read.
        stale_error: the relative error to the value written first, where keys are rewritten.
        stale_recall: the share that returns the value written first, where keys are rewritten.
    """

    setting: Setting
    relative_error: Estimate
    cosine: Estimate
    recall: Estimate
    stale_error: Estimate | None = None
    stale_recall: Estimate | None = None


@dataclass(frozen=True)
class BindingsReport:
    """Three sweeps, each over all rules and maps: number of bindings by condition, head size, segments."""

    trials: int
    seed: int
    by_bindings: list[Measurement]
    by_head_dim: list[Measurement]
    by_segments: list[Measurement]


def bindings_report(
    *,
    bindings: Sequence[int] = (1, 4, 16, 64, 256, 1024, 4096),
    head_dim: int = 64,
    segments: int = 16,
    trials: int = 8,
    seed: int = 0,
) -> BindingsReport:
    """Measure every condition, update rule and non-negative feature map.

    Args:
        bindings: numbers of bindings to try, each a multiple of `segments` or smaller than it.
        head_dim: width of keys and values, where it is not what is swept.
        segments: number of segments the bindings are written in, where it is not what is swept.
        trials: independent draws of keys and values a setting, the same ones for every rule and map.
        seed: of the draws.

    Returns:
        The three sweeps; the second and third take 256 random bindings.

    Raises:
        ValueError: a number is not positive, or bindings cannot be cut into equal segments.
    """

    def sweep(settings: Iterator[Setting]) -> list[Measurement]:
        return [measure(setting, trials=trials, seed=seed) for setting in settings]

    return BindingsReport(
        trials=trials,
        seed=seed,
        by_bindings=sweep(
            Setting(condition, rule, sigma, count, head_dim, segments)
            for condition in CONDITIONS
            for rule, sigma in rules_and_maps()
            for count in bindings
        ),
        by_head_dim=sweep(
            Setting("random", rule, sigma, SWEEP_BINDINGS, width, segments)
            for rule, sigma in rules_and_maps()
            for width in SWEEP_HEAD_DIMS
        ),
        by_segments=sweep(
            Setting("random", rule, sigma, SWEEP_BINDINGS, head_dim, count)
            for rule, sigma in rules_and_maps()
            for count in SWEEP_SEGMENTS
        ),
    )


def rules_and_maps() -> list[tuple[str, str]]:
    """Return every update rule with every registered feature map that both rules can use."""
    maps = [name for name in feature_maps.names() if feature_maps.get(name).nonnegative]
    return [(rule, name) for rule in UPDATE_RULES for name in maps]


def measure(setting: Setting, *, trials: int, seed: int) -> Measurement:
    """Write and read back `trials` independent draws of one setting.

    Raises ValueError when a number is not positive, a name is unknown, or the segments would not be equal.
    """
    _check(setting, trials)
    generator = torch.Generator().manual_seed(seed)
    keys, values = _draw(setting, trials, generator)
    old = torch.randn(values.shape, generator=generator) if setting.condition == "rewritten" else None
    written_keys = keys if old is None else torch.cat([keys, keys], dim=1)
    written_values = values if old is None else torch.cat([old, values], dim=1)
    state = _write(written_keys, written_values, setting)

    probes = torch.arange(0, setting.bindings, max(1, setting.bindings // PROBES))
    read = state.read(
        keys[:, None, probes], feature_map=setting.feature_map, normalization=setting.normalization
    )[:, 0]
    nearest = _nearest(read, written_values)
    newest = probes + written_values.shape[1] - setting.bindings
    return Measurement(
        setting=setting,
        relative_error=_relative_error(read, values[:, probes]),
        cosine=estimate(F.cosine_similarity(read, values[:, probes], dim=-1).mean(dim=1).tolist()),
        recall=_share(nearest == newest),
        stale_error=None if old is None else _relative_error(read, old[:, probes]),
        stale_recall=None if old is None else _share(nearest == probes),
    )


def _check(setting: Setting, trials: int) -> None:
    if setting.condition not in CONDITIONS:
        raise ValueError(f"condition is {setting.condition!r}; choose one of {', '.join(CONDITIONS)}")
    for name in ("bindings", "head_dim", "segments"):
        if getattr(setting, name) < 1:
            raise ValueError(f"{name} is {getattr(setting, name)}; it must be at least 1")
    if trials < 1:
        raise ValueError(f"trials is {trials}; it must be at least 1")
    if setting.bindings > setting.segments and setting.bindings % setting.segments:
        raise ValueError(
            f"{setting.bindings} bindings cannot be cut into {setting.segments} equal segments; "
            f"make the number of bindings a multiple of {setting.segments}"
        )


def _draw(setting: Setting, trials: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values, each (trials, bindings, head_dim), standard normal."""

    def normal(count: int) -> Tensor:
        return torch.randn(trials, count, setting.head_dim, generator=generator)

    values = normal(setting.bindings)
    if setting.condition not in PAIR_COSINES:
        return normal(setting.bindings), values
    cosine = PAIR_COSINES[setting.condition]
    first = normal(math.ceil(setting.bindings / 2))
    second = cosine * first + math.sqrt(1 - cosine**2) * normal(first.shape[1])
    return torch.cat([first, second], dim=1)[:, : setting.bindings], values


def _write(keys: Tensor, values: Tensor, setting: Setting) -> MemoryState:
    """The memory after all pairs, in whole segments; the attention's output is of no interest here."""
    _, state = infini_attention(
        torch.zeros_like(keys)[:, None],
        keys[:, None],
        values[:, None],
        torch.zeros(1),
        segment_length=setting.segment_length,
        update_rule=setting.update_rule,
        feature_map=setting.feature_map,
        normalization=setting.normalization,
    )
    return state


def _relative_error(read: Tensor, values: Tensor) -> Estimate:
    return estimate(((read - values).norm(dim=(1, 2)) / values.norm(dim=(1, 2))).tolist())


def _nearest(read: Tensor, values: Tensor) -> Tensor:
    """(trials, reads): index of the value with the highest cosine; one trial at a time, to bound memory."""
    unit = F.normalize(values, dim=-1)
    return torch.stack([(answer @ known.T).argmax(dim=-1) for answer, known in zip(read, unit, strict=True)])


def _share(hits: Tensor) -> Estimate:
    return estimate(hits.double().mean(dim=1).tolist())
