"""retrofit(): a pre-trained decoder becomes one with memory."""

from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedModel

from infini_attention.layers import MemoryGate, ShortConvolution
from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.families import FAMILIES
from infini_attention.models.loading import load_model


def retrofit(
    model_or_path: PreTrainedModel | str | PathLike[str],
    *,
    segment_length: int,
    update_rule: str = "linear",
    feature_map: str = "elu1",
    normalization: str = "sum",
    empty_memory: str = "local",
    short_convolution: int = 0,
    layers: list[int] | None = None,
    gate_init: float = -4.0,
    dtype: torch.dtype | None = None,
) -> Any:
    """Turn a pre-trained decoder into its `infini_*` type: same parameter names, and gates beside them.

    Inputs of at most one segment give the base model's logits, before any training.

    Args:
        model_or_path: a model in memory, or whatever `load_model` takes. A model in memory is not changed,
            but the new model shares its parameters' storage: training either moves the other.
        segment_length: N, tokens a segment.
        update_rule: "linear" or "delta".
        feature_map: a name of `infini_attention.ops.feature_maps`.
        normalization: of what memory answers: "sum", "root", "none" or "unit"; see
            `infini_attention.ops.infini_attention`.
        empty_memory: "local" or "gated"; see `infini_attention.ops.infini_attention`.
        short_convolution: tokens that every query and key becomes a mixture of, which begins as the token
            itself alone; 0 for none. See `ops.convolution`.
        layers: indices of the layers that get a memory; default every layer with full attention, and every
            one whose sliding window is at least `segment_length`.
        gate_init: initial logit of every gate; -4 gives the memory, still untrained, 1.8 % of each output.
        dtype: of the new model; default the base's. Gates are fp32 always.

    Returns:
        The model, on the base's device and in its training or evaluation mode.

    Raises:
        ValueError: a family that is not supported, a model that has memories already or is quantized, or a
            setting that cannot be right.
    """
    base = model_or_path
    if not isinstance(base, PreTrainedModel):
        base = load_model(base, dtype=dtype)
    _check_base(base)
    model_class = FAMILIES[type(base)]
    settings = {
        "segment_length": segment_length,
        "update_rule": update_rule,
        "feature_map": feature_map,
        "normalization": normalization,
        "empty_memory": empty_memory,
        "short_convolution": short_convolution,
        "infini_layers": layers,
        "gate_init": gate_init,
    }
    config = _config(base, model_class, settings)
    with torch.device("meta"):
        model = model_class(config)
    _share_weights(base, model, dtype)
    model.generation_config = base.generation_config
    return model.train(base.training)


def _check_base(base: PreTrainedModel) -> None:
    if isinstance(base.config, InfiniConfigMixin):
        raise ValueError(
            f"{type(base).__name__} has memories already; load it with AutoModelForCausalLM.from_pretrained, "
            "or retrofit the base model that it came from"
        )
    if type(base) not in FAMILIES:
        supported = ", ".join(family.__name__ for family in FAMILIES)
        raise ValueError(f"{type(base).__name__} is not supported; give one of {supported}")
    if getattr(base, "hf_quantizer", None) is not None:
        raise ValueError(
            f"{type(base).__name__} has quantized weights, which cannot be shared; "
            "load it without quantization, in bfloat16"
        )


def _config(base: PreTrainedModel, model_class: type[Any], settings: dict[str, Any]) -> Any:
    """The base's config with `settings`, as the family's infini config."""
    fields = base.config.to_dict()
    del fields["model_type"]
    fields |= {**settings, "architectures": [model_class.__name__]}
    config = model_class.config_class.from_dict(fields)
    if base.config._attn_implementation == "eager":  # else the default: other kinds know no memory
        config._attn_implementation = "eager"
    return config


def _share_weights(base: PreTrainedModel, model: Any, dtype: torch.dtype | None) -> None:
    """Fill `model`, which is on the meta device, with the base's tensors and what it has beside them."""
    weights = {
        name: tensor if dtype is None or not tensor.is_floating_point() else tensor.to(dtype)
        for name, tensor in base.state_dict().items()
    }
    lacking = model.load_state_dict(weights, assign=True, strict=False)
    own = "memory_gate.logits", "short_convolution.weight"
    strangers = [name for name in lacking.missing_keys if not name.endswith(own)]
    assert not strangers and not lacking.unexpected_keys, (strangers, lacking.unexpected_keys)
    for name, buffer in base.named_buffers():
        if name not in weights:  # rotary frequencies and the like, which no checkpoint holds
            module, _, attribute = name.rpartition(".")
            model.get_submodule(module).register_buffer(attribute, buffer.clone(), persistent=False)
    for layer in model.config.infini_layers:
        attention = model.model.layers[layer].self_attn
        gate = MemoryGate(model.config.num_attention_heads, init=model.config.gate_init)
        like = attention.q_proj.weight
        attention.memory_gate = gate.to(like.device)
        if model.config.short_convolution:
            convolution = ShortConvolution(*attention.short_convolution.weight.shape).become_identity()
            attention.short_convolution = convolution.to(like.device, like.dtype)
    model.tie_weights()
