from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infini_attention.layers import ShortConvolution
from infini_attention.models import retrofit
from infini_attention.streaming import Session

SEGMENT, CHUNK = 8, 16
WORDS = 60


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Words w0 to w59, one token each, and an end."""
    words = {f"w{number}": number for number in range(WORDS)} | {"<end>": WORDS, "<unk>": WORDS + 1}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", unk_token="<unk>")


@pytest.fixture(scope="session")
def make_model() -> Callable[..., LlamaForCausalLM]:
    def make(seed: int = 0, **settings: object) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=WORDS + 4,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.4,
            eos_token_id=WORDS,
        )
        model = retrofit(
            LlamaForCausalLM(config).eval(), **{"segment_length": SEGMENT, "gate_init": 1.0, **settings}
        )
        for module in model.modules():
            if isinstance(module, ShortConvolution):
                module.reset_parameters()  # the identity would hide what it looks back at
        return model.eval()

    return make


@pytest.fixture(
    scope="session",
    params=[
        {"update_rule": "linear"},
        {"update_rule": "delta", "short_convolution": 3},
        {"update_rule": "delta", "local_attention": "sliding"},
        {"update_rule": "linear", "local_attention": "sink", "sink_tokens": 3},
    ],
    ids=["linear", "delta, convolved", "delta, sliding", "linear, sink"],
)
def model(request: pytest.FixtureRequest, make_model: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    return make_model(**request.param)


@pytest.fixture
def make_session(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> Callable[..., Session]:
    def make(**settings: object) -> Session:
        return Session(model, tokenizer, **{"chunk_length": CHUNK, **settings})

    return make


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
