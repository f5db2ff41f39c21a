"""Bad input raises ValueError naming the value and the remedy."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from infini_attention.ops import MemoryState, feature_maps, infini_attention

from .cases import STATE_FIELDS


def good(**changes: Any) -> dict[str, Any]:
    """Arguments that are right, (2, 4, 10, 8) with 2 key/value heads, but for `changes`."""
    arguments = {
        "query": torch.randn(2, 4, 10, 8),
        "key": torch.randn(2, 2, 10, 8),
        "value": torch.randn(2, 2, 10, 6),
        "gate": torch.zeros(4),
        "segment_length": 4,
    }
    return arguments | changes


def packed(ends: list[Any], **changes: Any) -> dict[str, Any]:
    arguments = good(**changes)
    one_row = {name: arguments[name][:1] for name in ("query", "key", "value")}
    return arguments | one_row | {"cu_seqlens": torch.tensor(ends)}


def state(**changes: Any) -> MemoryState:
    sizes = {"batch_size": 2, "kv_heads": 2, "head_dim": 8, "value_dim": 6, "segment_length": 4} | changes
    return MemoryState.empty(**sizes)


META = torch.empty(0, device="meta")

WRONG = {
    "query is a matrix": (good(query=torch.randn(10, 8)), r"query has shape \(10, 8\); give \(batch, heads"),
    "no rows": (
        good(**{name: x[:0] for name, x in good().items() if name in ("query", "key", "value")}),
        "no rows",
    ),
    "integers": (good(query=torch.ones(2, 4, 10, 8, dtype=torch.int64)), "int64; convert it to a floating"),
    "key is a matrix": (good(key=torch.randn(10, 8)), r"key has shape \(10, 8\); give \(batch, heads"),
    "value has five axes": (good(value=torch.randn(2, 2, 10, 6, 1)), r"value has shape \(2, 2, 10, 6, 1\)"),
    "two devices": (good(key=META.new_zeros(2, 2, 10, 8)), "key is torch.float32 on meta.*dtype and device"),
    "two dtypes": (good(key=torch.randn(2, 2, 10, 8).double()), "key is torch.float64.*one dtype and device"),
    "lengths differ": (good(key=torch.randn(2, 2, 9, 8)), r"key has shape .*\(2, kv_heads, 10, 8\)"),
    "head sizes differ": (good(key=torch.randn(2, 2, 10, 7)), r"key has shape \(2, 2, 10, 7\)"),
    "value heads differ": (good(value=torch.randn(2, 4, 10, 6)), "first three sizes must be those of key"),
    "heads do not divide": (
        good(key=torch.randn(2, 3, 10, 8), value=torch.randn(2, 3, 10, 6)),
        "4 heads and key 3; heads must be a multiple",
    ),
    "local query": (good(local_query=torch.randn(2, 4, 9, 8)), "local_query is .*it must be like query"),
    "local key": (good(local_key=torch.randn(2, 2, 10, 8).half()), "local_key is .*float16.*like key"),
    "local value": (
        good(local_value=torch.randn(2, 2, 10, 9)),
        r"local_value is \(2, 2, 10, 9\).*like value",
    ),
    "no heads": (good(query=torch.randn(2, 0, 10, 8)), "0 heads and key 2; heads must be a multiple"),
    "local query elsewhere": (
        good(local_query=META.new_zeros(2, 4, 10, 8)),
        "on meta; it must be like query",
    ),
    "gate elsewhere": (good(gate=META.new_zeros(4)), r"gate is \(4,\) on meta; .* \(4,\) on cpu"),
    "gate of kv heads": (good(gate=torch.zeros(2)), r"gate is \(2,\).*one logit a query head, \(4,\)"),
    "gate in bf16": (
        good(gate=torch.zeros(4).bfloat16()),
        r"bfloat16, in which it stops moving.*gate.float\(\)",
    ),
    "no segment": (good(segment_length=0), "segment_length is 0; give a whole number of at least 1"),
    "a truth for a number": (good(segment_length=True), "segment_length is True; give a whole number"),
    "half a segment": (good(segment_length=2.5), "segment_length is 2.5; give a whole number"),
    "infinite scale": (good(scale=float("inf")), "scale is inf; give a finite number"),
    "NaN for a cap": (good(softcap=float("nan")), "softcap is nan; give a positive number"),
    "negative cap": (good(softcap=-1.0), "softcap is -1.0; give a positive number"),
    "unknown rule": (good(update_rule="gated"), "update_rule is 'gated'; choose one of 'linear', 'delta'"),
    "unknown map": (
        good(feature_map="relu"),
        "feature_map 'relu' is not registered; choose one of dpfp, elu1",
    ),
    "unknown empty": (good(empty_memory="zero"), "empty_memory is 'zero'; choose one of 'local', 'gated'"),
    "unknown local attention": (
        good(local_attention="window"),
        "local_attention is 'window'; choose one of 'segment', 'sliding', 'sink'",
    ),
    "more sinks than a segment": (
        good(local_attention="sink", sink_tokens=5),
        "sink_tokens is 5; give from 1 to segment_length, 4",
    ),
    "half a sink": (good(local_attention="sink", sink_tokens=2.5), "sink_tokens is 2.5; give from 1 to"),
    "no sinks": (good(local_attention="sink", sink_tokens=0), "sink_tokens is 0; give from 1 to"),
    "a key for nobody": (
        good(context_key=torch.randn(2, 2, 10, 8)),
        "context_key is given, and with local_attention 'segment'.*leave it out",
    ),
    "context value of segments alone": (
        good(context_value=torch.randn(2, 2, 10, 6)),
        "context_value is given, and with local_attention 'segment'.*leave it out",
    ),
    "context value": (
        good(context_value=torch.randn(2, 2, 9, 6), local_attention="sliding"),
        r"context_value is \(2, 2, 9, 6\).*it must be like value",
    ),
    "context key": (
        good(context_key=torch.randn(2, 2, 9, 8), local_attention="sliding"),
        r"context_key is \(2, 2, 9, 8\).*it must be like key",
    ),
    "state of another local attention": (
        good(state=state(), local_attention="sliding"),
        "local_attention 'segment' and 0 tokens .* call has 'sliding' and 4; use the same",
    ),
    "state of fewer sinks": (
        good(state=state(local_attention="sink", sink_tokens=2), local_attention="sink"),
        "local_attention 'sink' and 2 tokens .* call has 'sink' and 4; use the same",
    ),
    "unknown backend": (good(backend="cuda"), "backend is 'cuda'; choose one of 'auto', 'reference'"),
    "negative map with delta": (
        good(feature_map="identity", update_rule="delta"),
        "'identity' can be negative, and the delta rule diverges.*update_rule='linear'",
    ),
    "unknown normalization": (
        good(normalization="mean"),
        "normalization is 'mean'; choose one of 'sum', 'root', 'none', 'unit'",
    ),
    "root of a negative map": (
        good(feature_map="identity", normalization="root"),
        "'identity' can be negative, and normalization 'root' takes the root.*or another normalization",
    ),
    "fused without a sum": (
        good(normalization="none", backend="triton"),
        "backend is 'triton', but the fused kernels have no normalization 'none', only 'sum'; .*'auto'",
    ),
    "mask of floats": (good(padding_mask=torch.ones(2, 10)), r"torch.float32; give \(2, 10\) torch.bool"),
    "mask of keys": (good(padding_mask=torch.ones(2, 14, dtype=torch.bool)), r"padding_mask is \(2, 14\)"),
    "mask and packing": (
        packed([0, 10], padding_mask=torch.ones(1, 10, dtype=torch.bool)),
        "padding_mask and cu_seqlens contradict each other.*drop one",
    ),
    "packing a batch": (good(cu_seqlens=torch.tensor([0, 10])), "query's batch is 2; reshape it to 1"),
    "packing without an end": (packed([0]), r"cu_seqlens is \(1,\).*give \(documents \+ 1,\)"),
    "packing by floats": (packed([0.0, 10.0]), r"cu_seqlens is \(2,\) torch.float32; .* int32 or int64"),
    "packing in a table": (packed([[0, 10]]), r"cu_seqlens is \(1, 2\)"),
    "packing from the middle": (packed([1, 10]), r"cu_seqlens is \[1, 10\]; it must rise from 0"),
    "packing too little": (
        packed([0, 4, 9]),
        r"cu_seqlens is \[0, 4, 9\]; it must rise from 0 to the length, 10",
    ),
    "packing backwards": (packed([0, 6, 4, 10]), "it must rise from 0"),
    "state of other segments": (good(state=state(segment_length=8)), "segment_length 8, this call has 4"),
    "state of another batch": (good(state=state(batch_size=3)), r"state.memory has shape \(3, 2, 8, 6\)"),
    "state of another map": (good(state=state(feature_map="dpfp")), "same model, batch and feature map"),
    "state in fp64": (good(state=state(dtype=torch.float64)), "torch.float64; with torch.float32 inputs"),
    "state of another dtype": (good(state=state(dtype=torch.bfloat16)), "open segment is torch.bfloat16"),
    "state elsewhere": (good(state=state().to("meta")), r"state is on meta.*state.to\('cpu'\)"),
    "weights of tokens": (good(segment_weights=torch.ones(2, 10)), r"\(rows, segments\) = \(2, 3\)"),
    "negative weights": (
        good(segment_weights=-torch.ones(2, 3)),
        "minimum -1.0; weights are finite and at least 0",
    ),
    "NaN for a weight": (
        good(segment_weights=torch.full((2, 3), float("nan"))),
        "minimum nan; weights are fin",
    ),
}


WRONG |= {
    f"{name} with delta": (
        good(normalization=name, update_rule="delta"),
        f"normalization is '{name}', and the delta rule diverges with it.*normalization='sum', or update_r",
    )
    for name in ("root", "none", "unit")
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_right_is_refused_with_value_and_remedy(what: str) -> None:
    arguments, words = WRONG[what]
    with pytest.raises(ValueError, match=words):
        infini_attention(**arguments)


def spoilt(tensor: torch.Tensor, value: float) -> torch.Tensor:
    tensor = tensor.clone()
    tensor.flatten()[-1] = value
    return tensor


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["query", "key", "value", "gate", "local_query", "local_key", "local_value"])
def test_one_bad_value_of_an_input_is_found_when_asked_for(name: str, value: float) -> None:
    arguments = good()
    tensor = arguments[name.removeprefix("local_")]
    with pytest.raises(ValueError, match=f"^{name} holds 1 values that are NaN or infinite; look for"):
        infini_attention(**arguments | {name: spoilt(tensor, value)}, check_finite=True)


@pytest.mark.parametrize("name", STATE_FIELDS)
def test_one_bad_value_of_the_state_is_found_when_asked_for(name: str) -> None:
    _, seen = infini_attention(**good())
    seen = replace(seen, **{name: spoilt(getattr(seen, name), float("nan"))})
    with pytest.raises(ValueError, match=f"{name} holds 1 values that are NaN or infinite; look for"):
        infini_attention(**good(state=seen), check_finite=True)


def test_padding_may_hold_anything() -> None:
    arguments = good(padding_mask=torch.ones(2, 10, dtype=torch.bool), check_finite=True)
    arguments["padding_mask"][:, 7:] = False
    arguments["value"][:, :, 7:] = float("nan")
    infini_attention(**arguments)


def test_what_is_right_is_not_refused() -> None:
    for arguments in (good(), packed([0, 0, 10]), good(state=state(), check_finite=True)):
        infini_attention(**arguments)


def test_nan_passes_when_nobody_asked() -> None:
    output, _ = infini_attention(**good(value=torch.full((2, 2, 10, 6), float("nan"))))
    assert output.isnan().all()


def test_a_map_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'elu1' is already registered; choose another name"):
        feature_maps.register(feature_maps.FeatureMap("elu1", torch.exp))


def test_a_registered_map_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_maps, "_REGISTRY", dict(feature_maps._REGISTRY))
    feature_maps.register(feature_maps.FeatureMap("my_exp", lambda x: x.clamp(-20, 10).exp()))
    mine, _ = infini_attention(**(arguments := good()), feature_map="my_exp")
    theirs, _ = infini_attention(**arguments, feature_map="exp")
    assert torch.equal(mine, theirs)
