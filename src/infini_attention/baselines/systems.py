"""What a model is, as a system among others: its name in tables, and whether its gates are open."""

from typing import Any

from infini_attention.baselines.full_attention import FullAttentionConfigMixin
from infini_attention.baselines.linear_attention import LinearAttentionConfigMixin
from infini_attention.baselines.memorizing import MemorizingConfigMixin
from infini_attention.baselines.recurrent_memory import RecurrentMemoryConfigMixin
from infini_attention.baselines.sliding_window import SlidingWindowConfigMixin
from infini_attention.baselines.transformer_xl import TransformerXLConfigMixin
from infini_attention.layers import MemoryGate
from infini_attention.models.config import InfiniConfigMixin

LOCAL_ONLY = "local only"
"""The name of an `infini_*` model whose gates are all shut: each segment sees itself alone."""


def system_name(model: Any) -> str:
    """The name of a model's system, such as "Infini delta, exp" or "RMT, 100 tokens".

    Raises ValueError for a model that is neither an `infini_*` one nor a baseline.
    """
    config = model.config
    if isinstance(config, InfiniConfigMixin):
        if is_local(model):
            return _with_others(config, LOCAL_ONLY)
        return _with_others(config, f"Infini {config.update_rule}", feature_map="elu1", normalization="sum")
    if isinstance(config, FullAttentionConfigMixin):
        return "full attention"
    if isinstance(config, LinearAttentionConfigMixin):
        return _with_others(config, "linear attention", feature_map="elu1")
    if isinstance(config, MemorizingConfigMixin):
        return "Memorizing Transformer"
    if isinstance(config, RecurrentMemoryConfigMixin):
        return f"RMT, {config.memory_tokens} tokens"
    if isinstance(config, SlidingWindowConfigMixin):
        if config.sinks:
            return f"attention sinks, {config.sinks} of {config.window:,}"
        return f"sliding window of {config.window:,}"
    if isinstance(config, TransformerXLConfigMixin):
        return "Transformer-XL" if config.stop_gradient else "Transformer-XL, gradient not stopped"
    raise ValueError(
        f"{type(config).__name__} is no config of an infini_* model or a baseline; give one of these"
    )


def has_open_gates(model: Any) -> bool:
    """Whether any gate of the model lets through what its memory says: a share above 0."""
    gates = [module.logits for module in model.modules() if isinstance(module, MemoryGate)]
    return any(bool((gate.detach().float().sigmoid() > 0).any()) for gate in gates)


def is_local(model: Any) -> bool:
    """Whether it is an `infini_*` model whose gates are all shut: nothing of earlier segments is used."""
    return isinstance(model.config, InfiniConfigMixin) and not has_open_gates(model)


def _with_others(config: Any, first: str, **usual: str) -> str:
    """`first`, and of the other settings those that are not `usual`."""
    others = [getattr(config, name) for name, value in usual.items() if getattr(config, name) != value]
    if isinstance(config, InfiniConfigMixin) and config.local_attention != "segment":
        others.append(config.local_attention_name)
    if config.short_convolution:
        others.append(f"convolution of {config.short_convolution}")
    return ", ".join([first, *others])
