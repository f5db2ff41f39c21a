"""LoRA adapters (arXiv 2106.09685), by peft: what a retrofitted model has learnt, without its base's weights.

A folder of one holds peft's files, which name the base, and the config of the model with memories. Gates, and
short convolutions where there are any, are in it whole.
"""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from infini_attention.models.config import InfiniConfigMixin
from infini_attention.models.memories import OWN, memory_settings, with_memories

PEFT_CONFIG = "adapter_config.json"
OWN_MODULES = {name.partition(".")[0] for name in OWN}  # whole in an adapter


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter of a model with memories, as peft and `save_config` leave it."""
    if not (folder / PEFT_CONFIG).is_file() or not (folder / "config.json").is_file():
        return False
    return isinstance(AutoConfig.from_pretrained(folder), InfiniConfigMixin)


def add_adapter(
    model: Any, *, rank: int, alpha: float, dropout: float = 0.0, target_modules: list[str] | None = None
) -> Any:
    """A PeftModel around a retrofitted model: weights are frozen; adapters, gates and convolutions learn.

    Args:
        model: an `infini_*` language model; its `name_or_path` is its base's.
        rank: of the two matrices beside each weight.
        alpha: what they add is multiplied by alpha / rank.
        dropout: of what goes into them.
        target_modules: names of linear layers, such as q_proj; default all but the output's.

    Raises:
        ValueError: peft is not installed, or no layer has such a name.
    """
    _require_peft()
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules or "all-linear",
        modules_to_save=_own_modules(model),
    )
    with _quiet():
        return _by_itself(get_peft_model(model, config))


def base_of(folder: Path) -> str:
    """The name of the base of an adapter; ValueError where the folder names none."""
    name: str | None = json.loads((folder / PEFT_CONFIG).read_text()).get("base_model_name_or_path")
    if name is None:
        raise ValueError(f"{folder / PEFT_CONFIG} names no base; write it there as base_model_name_or_path")
    return name


def load_adapter(folder: Path, load_base: Callable[[str], Any]) -> Any:
    """The PeftModel of a folder, its adapter and gates ready to be trained on.

    Args:
        folder: of which `is_adapter` is true.
        load_base: from the base's name to the base, in fp32.

    Raises:
        ValueError: peft is not installed, or the folder names no base.
    """
    _require_peft()
    from peft import PeftModel

    model = load_base(base_of(folder))
    config = AutoConfig.from_pretrained(folder)
    if isinstance(model.config, InfiniConfigMixin):
        model.config.segment_length = config.segment_length  # which may be another than its base's
    else:
        model = with_memories(model, memory_settings(config))
    with _quiet():
        return _by_itself(PeftModel.from_pretrained(model, folder, is_trainable=True))


def merged(adapted: Any, dtype: torch.dtype | None) -> Any:
    """The model of a PeftModel with its adapter in its weights, as if it had been trained whole.

    `dtype` is by default the one that its config names.
    """
    model = adapted.merge_and_unload().requires_grad_(True)
    return model.to(model.config.dtype if dtype is None else dtype).eval()


def save_config(adapted: Any, folder: Path) -> None:
    """Put the config of the model with memories beside an adapter, so that it can be loaded again."""
    adapted.get_base_model().config.save_pretrained(folder)


def is_adapted(model: Any) -> bool:
    """Whether it is a PeftModel."""
    return hasattr(model, "get_base_model")


def _own_modules(model: Any) -> list[str]:
    return sorted(OWN_MODULES & {name.rpartition(".")[2] for name, _ in model.named_modules()})


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a warning that is for peft, which asks transformers for something by its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        yield


def _by_itself(adapted: Any) -> Any:
    """The same model; saved without a look at the Hub, where peft else compares vocabularies every time."""
    adapted.save_pretrained = partial(adapted.save_pretrained, save_embedding_layers=False)
    return adapted


def _require_peft() -> None:
    if find_spec("peft") is None:
        raise ValueError(
            "adapters need the package peft; install it with: pip install 'infini-attention[demo]'"
        )
