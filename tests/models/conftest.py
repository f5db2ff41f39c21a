from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import Gemma3ForCausalLM, LlamaForCausalLM, PreTrainedModel

from infini_attention.models import FAMILIES, retrofit

SEGMENT = 8
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PECULIARITIES = {
    "MistralForCausalLM": {"sliding_window": 16},
    "Qwen2ForCausalLM": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    "Gemma2ForCausalLM": {"sliding_window": 16, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    "Gemma3ForCausalLM": {
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "SmolLM3ForCausalLM": {"no_rope_layers": [1, 0]},
    "GraniteForCausalLM": {"attention_multiplier": 0.5, "logits_scaling": 2.0, "residual_multiplier": 0.7},
}

MakeBase = Callable[..., PreTrainedModel]


def _make_base(base_class: type, **overrides: object) -> PreTrainedModel:
    torch.manual_seed(0)
    fields = {**SIZES, **PECULIARITIES.get(base_class.__name__, {}), **overrides}
    return base_class(base_class.config_class(**fields)).eval()


def _make_model(base: PreTrainedModel, **settings: object) -> PreTrainedModel:
    """A retrofitted model whose gates differ from head to head and are wide open."""
    model = retrofit(base, **{"segment_length": SEGMENT, **settings})
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("memory_gate.logits"):
            torch.nn.init.normal_(parameter)
    return model


def _make_tokens(*shape: int, seed: int = 2) -> Tensor:
    return torch.randint(3, SIZES["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def make_base() -> MakeBase:
    return _make_base


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    return _make_model


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., Tensor]:
    return _make_tokens


KINDS = {family.__name__.removesuffix("ForCausalLM"): (family, {}) for family in FAMILIES} | {
    "Llama, sliding": (LlamaForCausalLM, {"local_attention": "sliding"}),
    "Gemma3, sliding": (Gemma3ForCausalLM, {"local_attention": "sliding"}),
    "Llama, sink": (LlamaForCausalLM, {"local_attention": "sink", "sink_tokens": 3}),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[type, dict[str, object]]:
    """Each family in turn, and some with another local attention than the paper's."""
    return KINDS[request.param]


@pytest.fixture
def base(kind: tuple[type, dict[str, object]]) -> PreTrainedModel:
    """A tiny model of that family."""
    return _make_base(kind[0])


@pytest.fixture
def model(base: PreTrainedModel, kind: tuple[type, dict[str, object]]) -> PreTrainedModel:
    """The same, with memory in every layer."""
    return _make_model(base, **kind[1])


@pytest.fixture
def llama() -> PreTrainedModel:
    """One family, for what does not depend on the family."""
    return _make_model(_make_base(next(iter(FAMILIES))))


@pytest.fixture(autouse=True)
def _one_thread_no_gradients() -> None:
    torch.set_num_threads(1)
