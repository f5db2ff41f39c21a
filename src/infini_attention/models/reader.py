"""A model that can read on for ever, by name: as it is if it has memories, else retrofitted."""

from typing import Any

from infini_attention.devices import choose_device, choose_dtype
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.loading import load_model
from infini_attention.models.retrofit import retrofit

SEGMENT_LENGTH = 512


def load_reader(
    name: str, settings: dict[str, Any], *, device: str = "auto", dtype: str = "auto"
) -> tuple[Any, bool]:
    """The model called `name`, ready to read, and whether it was retrofitted just now.

    `settings` are those of `retrofit`, with `segment_length` 512 by default; None stands for a default.
    Raises ValueError where there are any for a model that has memories already.
    """
    given = {key: value for key, value in settings.items() if value is not None}
    place = choose_device(device)
    model = load_model(name, dtype=choose_dtype(dtype, place))
    if not isinstance(model.config, InfiniConfigMixin):
        model = retrofit(model, **({"segment_length": SEGMENT_LENGTH} | given))
        return model.to(place), True
    if given:
        raise ValueError(
            f"{name} has memories already; {', '.join(given)} can be set only when retrofitting; leave "
            "it out, or choose a model without memories, such as --model smollm2"
        )
    return model.to(place), False
