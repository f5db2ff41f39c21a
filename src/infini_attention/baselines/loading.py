"""Loading any system by name: baselines as they are, all others as models that read on for ever."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from infini_attention.baselines.config import BaselineConfigMixin
from infini_attention.baselines.families import BASELINES as BASELINES  # its types become known to AutoConfig
from infini_attention.devices import choose_device, choose_dtype
from infini_attention.models import load_model
from infini_attention.models.reader import load_reader


def load_system(
    name: str, settings: dict[str, Any], *, device: str = "auto", dtype: str = "auto"
) -> tuple[Any, bool]:
    """The model called `name`, ready to read, and whether it was retrofitted just now.

    A folder of a baseline is loaded as it is; for anything else see `models.reader.load_reader`. Raises
    ValueError where there are `settings` of `retrofit` for a baseline, as there.
    """
    if not _is_baseline(name):
        return load_reader(name, settings, device=device, dtype=dtype)
    if given := [key for key, value in settings.items() if value is not None]:
        raise ValueError(f"{name} is a baseline; {', '.join(given)} can be set only when retrofitting")
    place = choose_device(device)
    return load_model(name, dtype=choose_dtype(dtype, place)).to(place), False


def _is_baseline(name: str) -> bool:
    folder = Path(name)
    return (folder / "config.json").is_file() and isinstance(
        AutoConfig.from_pretrained(folder), BaselineConfigMixin
    )
