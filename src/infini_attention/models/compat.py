"""What differs between releases of transformers 5, in one place."""

import inspect
from typing import Any

from transformers import LlamaModel

CACHE_ARGUMENT = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
"""What a model's forward and its outputs call the cache: `cache` of late, `past_key_values` before."""


def pop_cache(arguments: dict[str, Any]) -> Any:
    """Take the cache out of a forward's keyword arguments, under whichever name; None if there is none."""
    caches = [arguments.pop(name, None) for name in ("cache", "past_key_values")]
    return next((cache for cache in caches if cache is not None), None)
