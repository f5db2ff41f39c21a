"""A model of another class around a pre-trained one's tensors."""

from collections.abc import Mapping
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel

from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.loading import load_model


def load_base(
    model_or_path: PreTrainedModel | str | PathLike[str],
    families: Mapping[type, type[Any]],
    *,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """A pre-trained language model whose weights can be shared: that in memory, or what `load_model` loads.

    Raises ValueError for a model that has memories already, is none of `families` or is quantized.
    """
    base = model_or_path
    if not isinstance(base, PreTrainedModel):
        base = load_model(base, dtype=dtype)
    if isinstance(base.config, InfiniConfigMixin):
        raise ValueError(
            f"{type(base).__name__} has memories already; load it as it is with "
            "AutoModelForCausalLM.from_pretrained, or give the base model that it came from"
        )
    if type(base) not in families:
        supported = ", ".join(family.__name__ for family in families)
        raise ValueError(f"{type(base).__name__} is not supported; give one of {supported}")
    if getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{type(base).__name__} has quantized weights, which cannot be shared; "
            "load it without quantization, in bfloat16"
        )
    return base


def share_weights(
    base: PreTrainedModel,
    model_class: type[Any],
    settings: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    own: tuple[str, ...] = (),
) -> Any:
    """A model of `model_class` on the base's tensors, device and mode; the base is not changed.

    Args:
        base: what `load_base` returns.
        model_class: of the same parameter names, beside which it may have its own.
        settings: fields of the new config that the base's has not, or has otherwise.
        dtype: of the new model; default the base's, whose storage is shared then.
        own: how names of parameters end that the base has not. They are left on the meta device, without
            contents: the caller puts others in their place.

    Raises:
        ValueError: a setting that cannot be right.
    """
    with torch.device("meta"):
        model = model_class(_config(base, model_class, settings))
    weights = {
        name: tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in base.state_dict().items()
    }
    lacking = model.load_state_dict(weights, assign=True, strict=False)
    strangers = [name for name in lacking.missing_keys if not name.endswith(own)]
    assert not strangers and not lacking.unexpected_keys, (strangers, lacking.unexpected_keys)
    for name, buffer in base.named_buffers():
        if name not in weights:  # rotary frequencies and the like, which no checkpoint holds
            module, _, attribute = name.rpartition(".")
            model.get_submodule(module).register_buffer(attribute, buffer.clone(), persistent=False)
    model.tie_weights()
    model.generation_config = base.generation_config
    model.name_or_path = base.name_or_path  # of an alias, which the config does not know
    return model.train(base.training)


def _config(base: PreTrainedModel, model_class: type[Any], settings: dict[str, Any]) -> Any:
    """The base's config with `settings`, as that of `model_class`."""
    fields = base.config.to_dict()
    del fields["model_type"]
    fields |= {**settings, "architectures": [model_class.__name__]}
    config = model_class.config_class.from_dict(fields)
    if base.config._attn_implementation == "eager":  # else the default: other kinds know no memory
        config._attn_implementation = "eager"
    return config
