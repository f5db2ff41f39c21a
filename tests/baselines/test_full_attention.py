"""Full attention is the family's own model."""

import pytest
import torch
from transformers import LlamaForCausalLM

from .cases import SIZES, make_baseline, make_tokens


@torch.no_grad()
def test_it_is_the_familys_own_model_bit_for_bit() -> None:
    model, tokens = make_baseline("full"), make_tokens(2, 45)
    plain = LlamaForCausalLM(LlamaForCausalLM.config_class(**SIZES)).eval()
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model(tokens).logits, plain(tokens).logits)
    padded = torch.ones_like(tokens)
    padded[0, :5] = 0
    assert torch.equal(
        model(tokens, attention_mask=padded).logits, plain(tokens, attention_mask=padded).logits
    )


@torch.no_grad()
def test_packed_documents_are_told_by_their_positions() -> None:
    model, tokens = make_baseline("full"), make_tokens(1, 20)
    positions = torch.cat([torch.arange(12), torch.arange(8)])[None]
    packed = model(tokens, position_ids=positions, use_cache=False).logits
    alone = [model(part).logits for part in tokens.split([12, 8], dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-4)


def test_there_are_no_segments_to_take_by_themselves() -> None:
    model, tokens = make_baseline("full"), make_tokens(1, 20)
    for name in ("checkpoint_segments", "detach_every"):
        with pytest.raises(ValueError, match=f"{name} is set, which baselines do not know; leave it out"):
            model(tokens, **{name: 1})
    model.train().gradient_checkpointing_enable()
    model(tokens, labels=tokens, use_cache=False, loss_chunk=8).loss.backward()


@torch.no_grad()
def test_hidden_states_and_weights_of_all_layers_come_out() -> None:
    model = make_baseline("full", attn_implementation="eager")
    output = model(make_tokens(1, 9), output_hidden_states=True, output_attentions=True, use_cache=False)
    assert len(output.hidden_states) == SIZES["num_hidden_layers"] + 1
    assert len(output.attentions) == SIZES["num_hidden_layers"]
