"""Loading any system by name: baselines as they are, all others as models that read on for ever."""

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.baselines.families import BASELINES
from infini_attention.devices import choose_device, choose_dtype
from infini_attention.models import load_model
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.loading import load_base
from infini_attention.models.reader import load_reader
from infini_attention.models.sharing import share_weights

WINDOW = ("window", "sinks")  # settings that no memory has


def load_system(
    name: str, settings: dict[str, Any], *, device: str = "auto", dtype: str = "auto"
) -> tuple[Any, bool]:
    """The model called `name`, ready to read, and whether it was made so just now.

    A folder of a baseline is loaded as it is. For anything else `settings` are those of `with_window`, where
    there is a `window`, or those of `models.reader.load_reader`; None stands for a default.

    Raises:
        ValueError: settings for a model that is as it is, or those of a window beside those of a memory.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    if _is_baseline(name):
        if given:
            raise ValueError(f"{name} is a baseline; {', '.join(given)} can be set only when retrofitting")
        return _load(name, device, dtype), False
    if not any(key in given for key in WINDOW):
        return load_reader(name, given, device=device, dtype=dtype)
    _check_window(given)
    model = _load(name, device, dtype)
    if isinstance(model.config, InfiniConfigMixin):
        raise ValueError(f"{name} has memories already; {', '.join(given)} can be set only for one without")
    return with_window(model, **given), True


def with_window(
    model_or_path: PreTrainedModel | str | PathLike[str],
    *,
    window: int,
    sinks: int = 0,
    segment_length: int | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """A pre-trained decoder that reads texts of any length through a sliding window, with its own weights.

    A text of at most `window` tokens gives the base model's logits; see `baselines.sliding_window`.

    Args:
        model_or_path: a model in memory, or whatever `load_model` takes. A model in memory is not changed,
            but the new model shares its parameters' storage: training either moves the other.
        window: W, tokens that a token sees in each layer, itself included.
        sinks: S, how many of them are the text's first; 4 in arXiv 2309.17453.
        segment_length: what tables and data call a segment; default `window`.
        dtype: of the new model; default the base's.

    Returns:
        The model, on the base's device and in its training or evaluation mode.

    Raises:
        ValueError: a family that is not supported, a model with memories or quantized weights, or a setting
            that cannot be right, such as a window longer than the base knows positions.
    """
    families = BASELINES["sliding_window"]
    base = load_base(model_or_path, families, dtype=dtype)
    settings = {
        "window": window,
        "sinks": sinks,
        "segment_length": window if segment_length is None else segment_length,
    }
    return share_weights(base, families[type(base)], settings, dtype=dtype)


def _load(name: str, device: str, dtype: str) -> Any:
    place = choose_device(device)
    return load_model(name, dtype=choose_dtype(dtype, place)).to(place)


def _check_window(given: dict[str, Any]) -> None:
    """Raise ValueError where settings are not those of `with_window`."""
    if "window" not in given:
        raise ValueError(f"sinks is {given['sinks']}, and there is no window; set window, too, say to 2048")
    others = [key for key in given if key not in (*WINDOW, "segment_length")]
    if others:
        raise ValueError(
            f"window is {given['window']}, and {', '.join(others)} can be set only where there is a memory; "
            "leave out one or the other"
        )


def _is_baseline(name: str) -> bool:
    folder = Path(name)
    return (folder / "config.json").is_file() and isinstance(
        AutoConfig.from_pretrained(folder), BaselineConfigMixin
    )
