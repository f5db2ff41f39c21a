import pytest

from infini_attention.models import retrofit
from infini_attention.models.families import (
    InfiniGemma2Config,
    InfiniGemma3Config,
    InfiniGemmaConfig,
    InfiniLlamaConfig,
    InfiniMistralConfig,
    InfiniQwen2Config,
    gemma3,
    mistral,
)

WRONG = [
    ({"segment_length": 0}, "segment_length is 0; give a whole number of at least 1"),
    ({"update_rule": "hebb"}, "update_rule is 'hebb'; choose one of 'linear', 'delta'"),
    ({"feature_map": "cos"}, "feature_map 'cos' is not registered; choose one of .*elu1"),
    ({"feature_map": "identity", "update_rule": "delta"}, "'identity' can be negative, and the delta rule"),
    ({"normalization": "mean"}, "normalization is 'mean'; choose one of 'sum', 'root', 'none', 'unit'"),
    ({"normalization": "none", "update_rule": "delta"}, "normalization is 'none', and the delta rule div"),
    ({"empty_memory": "full"}, "empty_memory is 'full'; choose one of 'local', 'gated'"),
    ({"local_attention": "all"}, "local_attention is 'all'; choose one of 'segment', 'sliding', 'sink'"),
    (
        {"local_attention": "sink", "sink_tokens": 4000},
        "sink_tokens is 4000; give from 1 to segment_length, 2048",
    ),
    ({"gate_init": float("inf")}, "gate_init is inf; give a finite logit"),
    ({"infini_layers": []}, "no layer would have a memory"),
    ({"infini_layers": [0, 0]}, r"infini_layers is \[0, 0\]; name each layer once"),
    ({"infini_layers": [2]}, r"infini_layers is \[2\]; .* from 0 to 1"),
    ({"infini_layers": [-1]}, r"infini_layers is \[-1\]; .* from 0 to 1"),
]


@pytest.mark.parametrize(("settings", "message"), WRONG, ids=[str(settings) for settings, _ in WRONG])
def test_settings_that_cannot_be_right_raise_value_error(make_base, settings, message):
    with pytest.raises(ValueError, match=message):
        InfiniLlamaConfig(num_hidden_layers=2, **settings)


@pytest.mark.parametrize("wrong", [{"segment_length": "8"}, {"update_rule": 1}, {"infini_layers": 1}])
def test_settings_of_the_wrong_type_are_refused(wrong):
    with pytest.raises(Exception, match=next(iter(wrong))):
        InfiniLlamaConfig(num_hidden_layers=2, **wrong)


def test_every_full_attention_layer_gets_a_memory():
    assert InfiniLlamaConfig(num_hidden_layers=3).infini_layers == [0, 1, 2]


@pytest.mark.parametrize(("window", "layers"), [(8, [0, 1, 2, 3, 4, 5]), (7, [5])])
def test_a_sliding_layer_gets_a_memory_where_its_window_covers_a_segment(window, layers):
    config = InfiniGemma3Config(num_hidden_layers=6, sliding_window=window, segment_length=8)
    assert config.infini_layers == layers


@pytest.mark.parametrize(("local_attention", "seen"), [("sliding", 16), ("sink", 11)])
def test_a_window_has_to_cover_what_is_seen_outside_a_segment_too(local_attention, seen):
    sizes = {
        "num_hidden_layers": 6,
        "segment_length": 8,
        "sink_tokens": 3,
        "local_attention": local_attention,
    }
    assert InfiniGemma3Config(sliding_window=seen, **sizes).infini_layers == [0, 1, 2, 3, 4, 5]
    assert InfiniGemma3Config(sliding_window=seen - 1, **sizes).infini_layers == [5]
    with pytest.raises(
        ValueError, match=f"segment_length 8 and the {seen - 8} tokens that '{local_attention}'"
    ):
        InfiniGemma3Config(sliding_window=seen - 1, infini_layers=[0], **sizes)


def test_naming_a_sliding_layer_with_a_shorter_window_is_refused():
    with pytest.raises(
        ValueError, match="layer 0 has a sliding window of 7 tokens, shorter than segment_length 8"
    ):
        InfiniGemma3Config(num_hidden_layers=6, sliding_window=7, segment_length=8, infini_layers=[0, 5])


def test_mistrals_window_holds_for_every_layer():
    assert InfiniMistralConfig(num_hidden_layers=2, sliding_window=8, segment_length=8).infini_layers == [
        0,
        1,
    ]
    assert InfiniMistralConfig(num_hidden_layers=2, sliding_window=None, segment_length=8).infini_layers == [
        0,
        1,
    ]
    with pytest.raises(ValueError, match="no layer would have a memory"):
        InfiniMistralConfig(num_hidden_layers=2, sliding_window=7, segment_length=8)


def test_qwens_window_counts_where_it_is_used():
    settings = {"num_hidden_layers": 3, "sliding_window": 4, "segment_length": 8, "max_window_layers": 2}
    assert InfiniQwen2Config(use_sliding_window=False, **settings).infini_layers == [0, 1, 2]
    assert InfiniQwen2Config(use_sliding_window=True, **settings).infini_layers == [0, 1]


@pytest.mark.parametrize("config_class", [InfiniGemmaConfig, InfiniGemma2Config, InfiniGemma3Config])
def test_bidirectional_attention_is_refused(config_class):
    with pytest.raises(ValueError, match="set use_bidirectional_attention=False"):
        config_class(use_bidirectional_attention=True, segment_length=8)


def test_layers_and_their_types_stay_as_the_base_has_them(make_base):
    base = make_base(gemma3.Gemma3ForCausalLM)
    assert retrofit(base, segment_length=8).config.layer_types == base.config.layer_types


def test_retrofit_names_what_is_wrong(make_base):
    base = make_base(mistral.MistralForCausalLM)
    with pytest.raises(ValueError, match="segment_length is 0"):
        retrofit(base, segment_length=0)
    with pytest.raises(ValueError, match="sliding window of 16 tokens, shorter than segment_length 32"):
        retrofit(base, segment_length=32, layers=[0])
