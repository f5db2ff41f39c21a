import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaForCausalLM

from infini_attention.models import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.rows import Rows
from infini_attention.streaming import Decoder

from .conftest import SEGMENT, WORDS

LENGTHS = [1, SEGMENT - 1, SEGMENT, 2 * SEGMENT + 3]  # that rows have read before they go on side by side
STEPS = 11


def read(model: LlamaForCausalLM, ids: list[int]) -> InfiniCache:
    cache = InfiniCache(model.config)
    with torch.inference_mode():
        model(torch.tensor([ids]), use_cache=True, **{CACHE_ARGUMENT: cache})
    return cache


def check(model: LlamaForCausalLM, decoder: Decoder | None) -> None:
    """Rows, of which one stops early and one pauses, have the logits that each has alone, whole."""
    generator = torch.Generator().manual_seed(3)
    texts = torch.randint(0, WORDS, (len(LENGTHS), max(LENGTHS) + STEPS), generator=generator).tolist()
    with torch.inference_mode():
        expected = model(torch.tensor(texts)).logits
    caches = [read(model, text[:length]) for text, length in zip(texts, LENGTHS, strict=True)]
    rows, seen = Rows(model, caches, decoder), [*LENGTHS]
    for step in range(STEPS):
        fed = [
            row for row in range(len(LENGTHS)) if not (row == 0 and step > 4) and not (row == 2 and step == 3)
        ]
        logits = rows.step({row: texts[row][seen[row]] for row in fed})
        assert logits.shape == (len(LENGTHS), model.config.vocab_size)
        for row in fed:
            torch.testing.assert_close(logits[row], expected[row, seen[row]], rtol=1e-4, atol=1e-4)
            seen[row] += 1


@pytest.mark.parametrize("more", [None, 0, 2], ids=["no decoder", "its own", "one of more rows"])
def test_each_row_goes_on_as_if_it_were_alone(model: LlamaForCausalLM, more: int | None) -> None:
    check(model, None if more is None else Decoder(model, len(LENGTHS) + more))


def test_layers_without_a_memory_go_on_too(make_model: Callable[..., LlamaForCausalLM]) -> None:
    check(make_model(layers=[1]), None)


def test_a_decoder_serves_one_group_of_rows_after_the_other(model: LlamaForCausalLM) -> None:
    decoder = Decoder(model, len(LENGTHS))
    check(model, decoder)
    check(model, decoder)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_decoder_that_nobody_holds_is_gone_at_once(model: LlamaForCausalLM, compiled: bool) -> None:
    """Its buffers are as large as its sequences' states, and no collector looks at a GPU's memory."""
    decoder = Decoder(model, compiled=compiled)
    rows, gone = Rows(model, [read(model, [1, 2, 3])], decoder), weakref.ref(decoder)
    if not compiled:
        rows.step({0: 4})
    gc.collect()
    gc.disable()
    try:
        del rows, decoder
        assert gone() is None
    finally:
        gc.enable()
