import pytest
import torch
from torch import Tensor

from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.families import InfiniLlamaConfig, InfiniLlamaForCausalLM

SEGMENT, LENGTH = 8, 32
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}


def make(layers: int, **settings: object) -> InfiniLlamaForCausalLM:
    torch.manual_seed(0)
    config = InfiniLlamaConfig(
        vocab_size=64, num_hidden_layers=layers, segment_length=SEGMENT, **SIZES, **settings
    )
    return InfiniLlamaForCausalLM(config).double()


def gradients(
    model: InfiniLlamaForCausalLM, *, last_only: bool = False, **settings: object
) -> dict[str, Tensor]:
    """Of the loss (or of the last segment's part), for the input's embeddings and for all else."""
    ids = torch.randint(64, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False, **settings).logits
    first = LENGTH - SEGMENT if last_only else 0
    model.zero_grad()
    logits[:, first:].square().mean().backward()
    names = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    return {"embeddings": embeddings.grad, "logits": logits.detach()} | names


OUTSIDE = [{"local_attention": "sliding"}, {"local_attention": "sink", "sink_tokens": 2}]


@pytest.mark.parametrize(
    "settings", [{}, {"update_rule": "delta"}, {"short_convolution": 3}, *OUTSIDE], ids=str
)
def test_in_one_layer_the_weights_learn_the_same(settings: dict[str, object]) -> None:
    """What lies below its attention is a norm and the embeddings alone."""
    model = make(1, **settings)
    full, stopped = gradients(model), gradients(model, stop_gradient=True)
    assert torch.equal(full.pop("logits"), stopped.pop("logits"))
    below = full.pop("embeddings"), stopped.pop("embeddings")
    assert (below[0] - below[1])[:, : LENGTH - SEGMENT].abs().amax() > 1e-8
    torch.testing.assert_close(
        below[0][:, -SEGMENT:], below[1][:, -SEGMENT:]
    )  # nobody reads them from memory
    assert full.keys() == stopped.keys()
    del full["model.layers.0.input_layernorm.weight"]
    for name, wanted in full.items():
        torch.testing.assert_close(stopped[name], wanted, msg=name)


@pytest.mark.parametrize("settings", [{}, *OUTSIDE], ids=str)
def test_no_gradient_comes_from_later_segments(settings: dict[str, object]) -> None:
    model = make(3, **settings)
    reached = gradients(model, last_only=True)["embeddings"].abs().amax(dim=(0, 2)) > 0
    assert reached.all()
    reached = gradients(model, last_only=True, stop_gradient=True)["embeddings"].abs().amax(dim=(0, 2)) > 0
    assert not reached[:-SEGMENT].any() and reached[-SEGMENT:].all()


@pytest.mark.parametrize("settings", [{}, *OUTSIDE], ids=str)
def test_nor_from_later_calls(settings: dict[str, object]) -> None:
    """Wherever calls are cut: what they leave of an open segment is handed on without a gradient."""
    model = make(3, **settings)
    embeddings = torch.randn(1, 3 * SEGMENT, 32, dtype=torch.float64, requires_grad=True)
    cache = None
    for piece in embeddings.split([4, SEGMENT, 3 * SEGMENT - 12], dim=1):
        how = {} if cache is None else {CACHE_ARGUMENT: cache}
        output = model(inputs_embeds=piece, use_cache=True, stop_gradient=True, **how)
        cache = output[CACHE_ARGUMENT]
    output.logits[:, -1].square().sum().backward()
    reached = embeddings.grad[0].abs().amax(dim=-1) > 0
    assert not reached[: 2 * SEGMENT].any() and reached[-1]


@pytest.mark.parametrize("settings", [{}, *OUTSIDE], ids=str)
@pytest.mark.parametrize("runs", [{"checkpoint_segments": 1}, {"checkpoint_segments": 3}], ids=str)
def test_runs_change_nothing_of_it(runs: dict[str, int], settings: dict[str, object]) -> None:
    model = make(2, **settings).train()
    wanted, ours = gradients(model, stop_gradient=True), gradients(model, stop_gradient=True, **runs)
    for name, gradient in wanted.items():
        torch.testing.assert_close(ours[name], gradient, msg=name)


def test_runs_that_look_back_over_their_ends_are_refused() -> None:
    model = make(2, short_convolution=3).train()
    with pytest.raises(ValueError, match=r"short_convolution 3\); leave out checkpoint_segments"):
        gradients(model, stop_gradient=True, checkpoint_segments=1)


def test_what_a_cache_looks_back_at_takes_no_gradient() -> None:
    model = make(1, short_convolution=3)
    embeddings = torch.randn(1, SEGMENT, 32, dtype=torch.float64, requires_grad=True)
    before = model(inputs_embeds=embeddings, use_cache=True, stop_gradient=True)
    after = model(
        inputs_embeds=torch.randn(1, 2 * SEGMENT, 32, dtype=torch.float64),
        use_cache=True,
        stop_gradient=True,
        **{CACHE_ARGUMENT: before[CACHE_ARGUMENT]},
    )
    state = after[CACHE_ARGUMENT].layers[0].state
    (gradient,) = torch.autograd.grad(state.memory.sum(), embeddings, allow_unused=True)
    assert gradient is None or not gradient.any()


def test_the_projections_learn_what_memory_is_to_hold() -> None:
    """Of the last segment's loss, which detached states would hide from them."""
    model = make(1)
    stopped = gradients(model, last_only=True, stop_gradient=True)
    cut = gradients(model, last_only=True, detach_every=1)
    name = "model.layers.0.self_attn.v_proj.weight"
    assert (stopped[name] - cut[name]).abs().amax() > 1e-8
