"""The model that a recipe describes."""

from dataclasses import fields
from functools import partial
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from infini_attention.baselines import BASELINES
from infini_attention.layers import MemoryGate
from infini_attention.models import FAMILIES, load_model, retrofit
from infini_attention.models.adapters import add_adapter, load_adapter
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.loading import adapter_folder, memory_config
from infini_attention.models.memory_off import SHUT
from infini_attention.ops.options import check_choice
from infini_attention.training.recipe import SETTINGS_OF_BASELINES, SETTINGS_OF_MEMORIES, ModelRecipe

SEGMENT_LENGTH = 2048
"""Tokens a segment where neither a recipe nor its base says otherwise: the paper's."""


def make_model(recipe: ModelRecipe, vocab_size: int) -> Any:
    """The model, in fp32: fresh, retrofitted, or as it is where it has memories; raises ValueError.

    With `lora`, or where the base is an adapter, it is peft's, and its adapter learns.
    """
    if recipe.baseline is not None:
        return _fresh_baseline(recipe, vocab_size)
    settings: dict[str, Any] = {
        "segment_length": segment_length_of(recipe),
        "update_rule": recipe.update_rule,
        "feature_map": recipe.feature_map,
        "normalization": recipe.normalization,
        "empty_memory": recipe.empty_memory,
        "local_attention": recipe.local_attention,
        "sink_tokens": recipe.sink_tokens,
        "short_convolution": recipe.short_convolution,
    }
    if recipe.base is None:
        model = _fresh(recipe, vocab_size, settings | {"gate_init": _gate_init(recipe)})
    else:
        model = _on_base(recipe, settings)
    if model.config.vocab_size < vocab_size:
        raise ValueError(
            f"the data has {vocab_size} tokens and model.base {recipe.base} knows {model.config.vocab_size}; "
            "use the base's tokenizer"
        )
    if not recipe.memory:
        _shut_for_good(model)
    return model


def _on_base(recipe: ModelRecipe, settings: dict[str, Any]) -> Any:
    assert recipe.base is not None
    if (adapter := adapter_folder(recipe.base)) is not None:
        _refuse_memory_settings(recipe, "lora")
        model = load_adapter(adapter, partial(load_model, dtype=torch.float32))
        return _with_segments(model, settings["segment_length"])
    model = load_model(recipe.base, dtype=torch.float32)
    if isinstance(model.config, InfiniConfigMixin):
        _refuse_memory_settings(recipe)
        model = _with_segments(model, settings["segment_length"])
    else:
        model = retrofit(model, layers=recipe.layers, gate_init=_gate_init(recipe), **settings)
    return model if recipe.lora is None else add_adapter(model, **vars(recipe.lora))


def _gate_init(recipe: ModelRecipe) -> float:
    return recipe.usual_gate_init if recipe.gate_init is None else recipe.gate_init


def _with_segments(model: Any, segment_length: int) -> Any:
    """A model with memories, its segments so long; raises ValueError for a length that it cannot have."""
    model.config.segment_length = segment_length
    try:
        model.config.validate()
    except StrictDataclassError as error:
        raise ValueError(f"model.segment_length is {segment_length}: {error}") from error
    return model


def segment_length_of(recipe: ModelRecipe) -> int:
    """Tokens a segment of the model that `make_model` makes."""
    if recipe.segment_length is not None:
        return recipe.segment_length
    config = None if recipe.base is None else memory_config(recipe.base)
    return SEGMENT_LENGTH if config is None else config.segment_length


def _refuse_memory_settings(recipe: ModelRecipe, *more: str) -> None:
    """Raise ValueError for settings of a memory, and `more`, that a base with memories has already."""
    names = (*more, *SETTINGS_OF_MEMORIES, "gate_init")
    given = [name for name in names if getattr(recipe, name) != getattr(ModelRecipe(), name)]
    if given:
        raise ValueError(
            f"model.base {recipe.base} has memories already, and model.{', model.'.join(given)} would change "
            "them; leave these out"
        )


def _fresh(recipe: ModelRecipe, vocab_size: int, settings: dict[str, Any]) -> Any:
    own = {field.name for field in fields(InfiniConfigMixin)}  # set by other means than sizes
    return _of_sizes(recipe, FAMILIES, vocab_size, settings | {"infini_layers": recipe.layers}, own)


def _fresh_baseline(recipe: ModelRecipe, vocab_size: int) -> Any:
    assert recipe.baseline is not None
    check_choice("model.baseline", recipe.baseline, list(BASELINES))
    names = SETTINGS_OF_BASELINES.get(recipe.baseline, ())
    settings = {name: value for name in names if (value := getattr(recipe, name)) is not None}
    settings["segment_length"] = segment_length_of(recipe)
    return _of_sizes(recipe, BASELINES[recipe.baseline], vocab_size, settings, {*names, "segment_length"})


def _of_sizes(
    recipe: ModelRecipe,
    families: dict[type, type[Any]],
    vocab_size: int,
    settings: dict[str, Any],
    own: set[str],
) -> Any:
    """A fresh model of the recipe's family and sizes, which leave the fields `own` to `settings`."""
    by_name = {base.__name__.removesuffix("ForCausalLM").lower(): family for base, family in families.items()}
    if recipe.family not in by_name:
        whose = "" if recipe.baseline is None else f", and model.baseline {recipe.baseline!r}"
        raise ValueError(f"model.family is {recipe.family!r}{whose}; choose one of {', '.join(by_name)}")
    family = by_name[recipe.family]
    known = {field.name for field in fields(family.config_class)} - own - {"vocab_size"}
    strangers = sorted(set(recipe.sizes) - known)
    if strangers:
        raise ValueError(
            f"model.sizes has {', '.join(strangers)}, which are no sizes of {family.config_class.__name__}; "
            "see its fields, such as hidden_size, intermediate_size, num_hidden_layers, num_attention_heads"
        )
    sizes: dict[str, Any] = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": None}
    if "num_attention_heads" in recipe.sizes:  # a head has its own keys and values unless sizes say otherwise
        sizes["num_key_value_heads"] = recipe.sizes["num_attention_heads"]
    try:
        config = family.config_class(**sizes | recipe.sizes, **settings)
    except StrictDataclassError as error:
        raise ValueError(f"model.sizes make no {recipe.family}: {error}") from error
    return family(config)


def _shut_for_good(model: Any) -> None:
    for module in model.modules():
        if isinstance(module, MemoryGate):
            module.logits.requires_grad_(False).fill_(SHUT)
