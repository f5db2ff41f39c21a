from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from infini_attention.models import InfiniCache, retrofit
from infini_attention.models.cache import InfiniStepCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.decoder import Committed
from infini_attention.streaming import Decoder


class Guest:
    cache: InfiniCache | None = None

    def fall_back(self, whole: Committed) -> None:
        raise AssertionError

    def take_back(self, cache: InfiniCache) -> None:
        self.cache = cache


def read(model: LlamaForCausalLM, ids: list[int]) -> InfiniCache:
    cache = InfiniCache(model.config)
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


@pytest.mark.parametrize(
    ("settings", "compiled"),
    [
        ({"update_rule": "delta"}, False),
        ({"update_rule": "delta"}, True),
        ({"normalization": "root"}, False),
        ({"normalization": "none"}, False),
        ({"normalization": "unit"}, False),
        ({"local_attention": "sliding"}, False),
        ({"local_attention": "sink", "sink_tokens": 3, "update_rule": "delta"}, False),
    ],
    ids=str,
)
def test_steps_equal_the_model_and_rows_come_and_go(
    make_model: Callable[..., LlamaForCausalLM], settings: dict[str, str], compiled: bool
) -> None:
    model = make_model(**settings)
    texts = [
        torch.randint(0, 60, (40,), generator=torch.Generator().manual_seed(n)).tolist() for n in range(3)
    ]
    with torch.inference_mode():
        expected = model(torch.tensor(texts)).logits
    decoder, guests, starts = (
        Decoder(model, rows=2, compiled=compiled),
        [Guest(), Guest(), Guest()],
        [3, 9, 14],
    )
    for row in range(2):
        decoder.seat(row, guests[row], read(model, texts[row][: starts[row]]))
    for number in range(12):
        ids = {row: texts[row][starts[row] + number] for row in range(2)}
        logits = decoder.step(ids)
        for row in range(2):
            assert torch.allclose(logits[row], expected[row, starts[row] + number], atol=1e-4)
    decoder.seat(1, guests[2], read(model, texts[2][:14]))  # another takes the row, between others' steps
    for number in range(12):
        logits = decoder.step({0: texts[0][15 + number], 1: texts[2][14 + number]})
        assert torch.allclose(logits[0], expected[0, 15 + number], atol=1e-4)
        assert torch.allclose(logits[1], expected[2, 14 + number], atol=1e-4)
    assert guests[1].cache is not None
    with torch.inference_mode():
        arguments = {CACHE_ARGUMENT: guests[1].cache, "use_cache": True}
        after = model(torch.tensor([texts[1][21:22]]), **arguments).logits
    assert torch.allclose(after[0, 0], expected[1, 21], atol=1e-4)


def test_a_guest_that_is_gone_leaves_its_row_free(make_model: Callable[..., LlamaForCausalLM]) -> None:
    model = make_model()
    decoder, guest = Decoder(model), Guest()
    decoder.seat(0, guest, read(model, [1, 2, 3]))
    assert decoder.free_row() is None
    del guest
    assert decoder.free_row() == 0


def test_what_cannot_step_is_named(make_model: Callable[..., LlamaForCausalLM]) -> None:
    with pytest.raises(ValueError, match="rows is 0"):
        Decoder(make_model(), rows=0)
    partly = retrofit(
        LlamaForCausalLM(
            LlamaConfig(num_hidden_layers=2, hidden_size=32, vocab_size=64, num_attention_heads=4)
        ),
        segment_length=8,
        layers=[0],
    )
    with pytest.raises(ValueError, match=r"layers \[1\] have no memory"):
        Decoder(partly)
    model = make_model()
    decoder = Decoder(model, rows=2)
    cache = InfiniStepCache(decoder.model.config, decoder.buffers)
    with pytest.raises(ValueError, match="takes as many ids, one a row"):
        decoder.model(torch.zeros(1, 3, dtype=torch.int64), **{CACHE_ARGUMENT: cache})
