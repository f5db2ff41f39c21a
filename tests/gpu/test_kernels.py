"""The fused kernels on a GPU: every tile, every head size, every gradient, long inputs.

Tolerances calibrate themselves: against fp64, ours may be at most twice as wrong as plain torch in the same
dtype, which rounds every intermediate to it.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from infini_attention.ops import MemoryState, feature_maps, infini_attention
from infini_attention.ops.cross_entropy import IGNORED, cross_entropy

if not torch.cuda.is_available():
    pytest.skip("needs an NVIDIA GPU", allow_module_level=True)

from infini_attention.ops.triton import memory  # needs triton

pytestmark = pytest.mark.gpu
LEAST_SHARED = 101_376  # bytes of shared memory a program has on consumer GPUs
RULES = ("linear", "delta")
Tensors = dict[str, Tensor]


def inputs(
    length: int,
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
) -> Tensors:
    """Random tokens as projections make them, (batch, length, heads, dim) in memory, and a gate."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def randn(heads: int) -> Tensor:
        sizes = (batch, length, heads, head_dim)
        return torch.randn(sizes, generator=generator, device="cuda").to(dtype).transpose(1, 2)

    tensors = {name: randn(heads) for name in ("query", "local_query")}
    tensors |= {name: randn(kv_heads) for name in ("key", "local_key", "value")}
    return tensors | {"gate": torch.randn(heads, generator=generator, device="cuda")}


def results(
    function: Callable[..., tuple[Tensor, MemoryState]], tensors: Tensors, **settings: Any
) -> list[Tensor]:
    """Output, memory, normaliser, and the gradients of a fixed combination of them by every input."""
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    output, state = function(**leaves, **settings)
    total = sum(
        _directed(tensor, seed) for seed, tensor in enumerate((output, state.memory, state.normalizer))
    )
    return [output, state.memory, state.normalizer, *torch.autograd.grad(total, list(leaves.values()))]


def truth(tensors: Tensors, **settings: Any) -> list[Tensor]:
    """The reference in fp64."""
    precise = {name: tensor.double() for name, tensor in tensors.items()}
    return results(infini_attention, precise, backend="reference", **settings)


def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gate: Tensor,
    *,
    local_query: Tensor,
    local_key: Tensor,
    segment_length: int,
    update_rule: str,
    feature_map: str,
) -> tuple[Tensor, MemoryState]:
    """The paper's equations by torch, everything rounded to the inputs' dtype; whole segments only."""
    sigma, group = feature_maps.get(feature_map), query.shape[1] // key.shape[1]
    key, value, local_key = (x.repeat_interleave(group, dim=1) for x in (key, value, local_key))
    share = gate.sigmoid().to(query.dtype)[:, None, None]
    state, outputs = None, []
    for q, k, v, lq, lk in zip(
        *(x.split(segment_length, 2) for x in (query, key, value, local_query, local_key)), strict=True
    ):
        mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
        scores = (lq @ lk.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, float("-inf"))
        output, written = scores.softmax(-1) @ v, v
        if state is None:
            M, z = 0, 0
        else:
            M, z = state
            output = share * (sigma(q) @ M / (sigma(q) @ z)) + (1 - share) * output
            written = v - sigma(k) @ M / (sigma(k) @ z) if update_rule == "delta" else v
        state = M + sigma(k).transpose(-1, -2) @ written, z + sigma(k).sum(2)[..., None]
        outputs.append(output)
    M, z = (x[:, ::group] for x in state)
    return torch.cat(outputs, 2), MemoryState(M, z[..., 0], M, z, M, M, torch.zeros(1), segment_length)


def assert_calibrated(actual: list[Tensor], rounded: list[Tensor], exact: list[Tensor]) -> None:
    """Ours at most twice as wrong as plain torch, which may be right by luck where there are few numbers."""
    epsilon = torch.finfo(actual[0].dtype).eps
    errors = [
        (_error(ours, wanted), 2 * _error(theirs, wanted) + (1e-5 if wanted.numel() > 100 else epsilon))
        for ours, theirs, wanted in zip(actual, rounded, exact, strict=True)
    ]
    shown = ", ".join(f"{error:.1e} of {allowed:.1e}" for error, allowed in errors)
    assert all(error <= allowed for error, allowed in errors), shown


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Memory that torch hands out next is full of NaN, so that an element nobody wrote shows."""
    blocks = [torch.full((2**26,), float("nan"), device="cuda") for _ in range(8)]
    blocks += [torch.full((2**k,), float("nan"), device="cuda") for k in range(4, 20) for _ in range(4)]
    del blocks
    yield


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        *((torch.bfloat16, head_dim) for head_dim in (64, 96, 128, 256)),
        *((torch.float32, head_dim) for head_dim in (128, 256)),
        (torch.float16, 128),
    ],
    ids=str,
)
def test_outputs_states_and_gradients_are_right(
    dtype: torch.dtype, head_dim: int, update_rule: str, poisoned: None
) -> None:
    tensors = inputs(640, head_dim=head_dim, dtype=dtype)
    settings = {"segment_length": 160, "update_rule": update_rule, "feature_map": "elu1"}
    ours = results(infini_attention, tensors, backend="triton", **settings)
    again = results(infini_attention, tensors, backend="triton", **settings)
    assert all(torch.equal(first, second) for first, second in zip(ours, again, strict=True))
    assert_calibrated(ours, results(plain, tensors, **settings), truth(tensors, **settings))


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize(("head_dim", "value_dim"), [(64, 1), (64, 128), (128, 256)])
def test_values_may_be_narrower_or_wider_than_keys(
    head_dim: int, value_dim: int, update_rule: str, poisoned: None
) -> None:
    """As context parallelism has them, which asks what a run of segments does to a memory."""
    tensors = inputs(640, head_dim=head_dim)
    tensors["value"] = inputs(640, head_dim=value_dim, seed=1)["value"]
    settings = {"segment_length": 160, "update_rule": update_rule, "feature_map": "elu1"}
    ours = results(infini_attention, tensors, backend="triton", **settings)
    assert_calibrated(ours, results(plain, tensors, **settings), truth(tensors, **settings))


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize("feature_map", ["exp", "relu2", "softplus", "dpfp"])
def test_every_feature_map_is_right(feature_map: str, update_rule: str) -> None:
    tensors = inputs(512)
    settings = {"segment_length": 128, "update_rule": update_rule, "feature_map": feature_map}
    ours = results(infini_attention, tensors, backend="triton", **settings)
    assert_calibrated(ours, results(plain, tensors, **settings), truth(tensors, **settings))


@pytest.mark.parametrize(("tokens", "warps"), [(32, 4), (128, 8)])
def test_every_tile_gives_the_same(tokens: int, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those in use and their neighbours, by either rule, with tiles that fit the segments and that do not."""
    tiles = {name: memory.Tile(tokens, warps, 2) for name in memory.TILES}
    for segment_length in (256, 200):
        tensors = inputs(4 * segment_length, head_dim=128)
        for update_rule in RULES:
            settings = {"segment_length": segment_length, "update_rule": update_rule, "feature_map": "elu1"}
            with monkeypatch.context() as changed:
                changed.setattr(memory, "TILES", tiles)
                ours = results(infini_attention, tensors, backend="triton", **settings)
            assert_calibrated(ours, results(plain, tensors, **settings), truth(tensors, **settings))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_smaller_gpus_have_room_for_their_tiles(
    dtype: torch.dtype, head_dim: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "_shared_memory", lambda _: LEAST_SHARED)
    kernels = {
        name: kernel
        for module in (memory.kernels, memory.wide)
        for name, kernel in vars(module).items()
        if name.endswith("_kernel")
    }
    for kernel in kernels.values():
        kernel.device_caches.clear()
    tensors = inputs(512, head_dim=head_dim, dtype=dtype)
    for update_rule in RULES:
        settings = {"segment_length": 128, "update_rule": update_rule, "feature_map": "elu1"}
        ours = results(infini_attention, tensors, backend="triton", **settings)
        assert_calibrated(ours, results(plain, tensors, **settings), truth(tensors, **settings))
    needed = {
        name: max((compiled.metadata.shared for compiled in cache[0].values()), default=0)
        for name, kernel in kernels.items()
        for cache in kernel.device_caches.values()
    }
    assert max(needed.values()) <= LEAST_SHARED, needed


@pytest.mark.parametrize("update_rule", RULES)
def test_padding_packing_and_carried_states_are_right(update_rule: str) -> None:
    tensors = inputs(700, batch=2)
    settings = {"segment_length": 128, "update_rule": update_rule}
    mask = torch.ones(2, 700, dtype=torch.bool, device="cuda")
    mask[0, :100] = mask[1, 500:] = False
    packed = {name: x if name == "gate" else x[:1] for name, x in tensors.items()}
    ends = torch.tensor([0, 0, 50, 390, 700], device="cuda", dtype=torch.int32)
    for given, extra in ((tensors, {"padding_mask": mask}), (packed, {"cu_seqlens": ends})):
        _, state = infini_attention(**given, **settings, **extra, backend="triton")
        open_lengths = state.open_length
        columns = int((-(-(open_lengths + state.length) // 128)).max())
        weights = torch.rand(len(open_lengths), columns, device="cuda") + 0.5
        output, last = infini_attention(
            **given, **settings, **extra, state=state, segment_weights=weights, backend="triton"
        )
        exact, exact_last = infini_attention(
            **{name: x.double() for name, x in given.items()},
            **settings,
            **extra,
            state=_precise(state),
            segment_weights=weights,
            backend="reference",
        )
        assert _error(output, exact) < 1e-2
        assert _error(last.memory, exact_last.memory) < 1e-2
        assert _error(last.pending_memory, exact_last.pending_memory) < 1e-2


@pytest.mark.parametrize("update_rule", RULES)
@pytest.mark.parametrize("local_attention", ["sliding", "sink"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float32, 1e-3)], ids=["bf16", "fp32"]
)
def test_what_is_seen_outside_a_segment_is_right(
    dtype: torch.dtype, tolerance: float, local_attention: str, update_rule: str
) -> None:
    """Against fp64, in the norm; grouped heads, whole segments and an open one."""
    tensors = inputs(700, batch=2, dtype=dtype)
    tensors["context_key"] = inputs(700, batch=2, dtype=dtype, seed=1)["local_key"]
    settings = {"segment_length": 128, "local_attention": local_attention, "update_rule": update_rule}
    actual = results(infini_attention, tensors, backend="triton", **settings)
    for ours, wanted in zip(actual, truth(tensors, **settings), strict=True):
        assert float((ours.double() - wanted).norm() / wanted.norm()) < tolerance


@pytest.mark.parametrize("update_rule", RULES)
def test_a_million_tokens_equal_the_same_in_pieces(update_rule: str) -> None:
    tensors = inputs(2**20, heads=2, kv_heads=2, head_dim=128)
    settings = {"segment_length": 2048, "update_rule": update_rule, "backend": "triton"}
    with torch.no_grad():
        output, state = infini_attention(**tensors, **settings)
        assert torch.isfinite(output).all()
        carried, pieces = None, []
        for first in range(0, 2**20, 300_000):  # not a multiple of the segment length
            piece = {
                name: x if name == "gate" else x[:, :, first : first + 300_000] for name, x in tensors.items()
            }
            part, carried = infini_attention(**piece, **settings, state=carried)
            pieces.append(part)
    assert _error(torch.cat(pieces, 2), output) < 1e-2
    assert _error(carried.memory, state.memory) < 1e-3


def test_more_than_two_to_the_31_elements_are_addressed() -> None:
    """2.2M tokens x 8 heads x 128: the last segments equal themselves read from the state before them."""
    length, tail = 1100 * 2048, 8 * 2048
    assert length * 8 * 128 > 2**31
    tensors = inputs(1, heads=8, kv_heads=8, head_dim=128)
    block = inputs(2**17, heads=8, kv_heads=8, head_dim=128)
    repeats = -(-length // 2**17)
    for name in ("query", "key", "value"):
        tensors[name] = block[name].transpose(1, 2).repeat(1, repeats, 1, 1)[:, :length].transpose(1, 2)
    tensors = {name: tensors[name] for name in ("query", "key", "value", "gate")}
    with torch.no_grad():
        settings = {"segment_length": 2048, "backend": "triton"}
        output, _ = infini_attention(**tensors, **settings)
        parts = [
            {name: x if name == "gate" else x[:, :, piece] for name, x in tensors.items()}
            for piece in (slice(0, length - tail), slice(length - tail, length))
        ]
        expected = output[:, :, length - tail :].clone()
        del output
        _, state = infini_attention(**parts[0], **settings)
        last, _ = infini_attention(**parts[1], **settings, state=state)
    assert _error(last, expected) < 1e-3


@pytest.mark.parametrize("update_rule", RULES)
def test_torch_compile_sees_one_graph(update_rule: str) -> None:
    tensors = inputs(1024)
    settings = {"segment_length": 256, "update_rule": update_rule, "feature_map": "elu1", "backend": "triton"}

    def function(**given: Tensor) -> tuple[Tensor, MemoryState]:
        return infini_attention(**given, **settings)

    eager = results(function, tensors)
    compiled = results(torch.compile(function, fullgraph=True), tensors)
    for actual, expected in zip(compiled, eager, strict=True):
        assert _error(actual, expected) < 1e-2


def test_a_training_step_can_be_captured_in_a_graph() -> None:
    tensors = {name: tensor.requires_grad_() for name, tensor in inputs(1024).items()}

    def step() -> tuple[Tensor, ...]:
        output, _ = infini_attention(**tensors, segment_length=256, backend="triton")
        return output, *torch.autograd.grad(output.float().sum(), list(tensors.values()), allow_unused=True)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        expected = [x.clone() for x in step() if x is not None]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [x for x in step() if x is not None]
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(first, second) for first, second in zip(captured, expected, strict=True))


def test_a_captured_step_is_replayed_rightly_after_many_other_lengths() -> None:
    def output(segments: int) -> Tensor:
        tensors = inputs(16 * segments, batch=2)
        return infini_attention(**tensors, segment_length=16, update_rule="delta", backend="triton")[0]

    expected, graph = output(3), torch.cuda.CUDAGraph()
    places = inputs(48, batch=2)
    with torch.cuda.graph(graph):
        captured, _ = infini_attention(**places, segment_length=16, update_rule="delta", backend="triton")
    for segments in range(4, 84):
        output(segments)
    _ = [torch.full((128,), 1 << 30, dtype=torch.int32, device="cuda") for _ in range(1000)]
    graph.replay()
    torch.testing.assert_close(captured, expected)


def test_inference_holds_the_output_and_the_states_and_little_else() -> None:
    tensors = inputs(2**17, heads=8, kv_heads=8, head_dim=128)
    with torch.no_grad():
        infini_attention(**tensors, segment_length=2048, backend="triton")  # compiled and warm
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        infini_attention(**tensors, segment_length=2048, backend="triton")
        extra = torch.cuda.max_memory_allocated() - before
    output, states = tensors["query"].nbytes, 64 * 8 * 128 * 129 * 4
    assert extra <= 1.05 * (output + states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("vocabulary", [256, 32_768, 49_153])
def test_cross_entropy_is_right_and_holds_its_gradient_alone(
    vocabulary: int, dtype: torch.dtype, poisoned: None
) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    logits = (5 * torch.randn(515, vocabulary, generator=generator, device="cuda")).to(dtype)
    targets = torch.randint(vocabulary, (515,), generator=generator, device="cuda")
    targets[::7] = IGNORED

    def found(logits: Tensor, loss_of: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaf = logits.detach().requires_grad_()
        loss = loss_of(leaf)
        return [loss.detach(), *torch.autograd.grad(3 * loss, leaf)]

    def plain(logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ours = found(logits, lambda logits: cross_entropy(logits, targets))
    assert torch.cuda.max_memory_allocated() - before <= logits.nbytes + 100_000
    rounded, exact = found(logits, lambda logits: plain(logits.float())), found(logits.double(), plain)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=0)
    assert_calibrated(ours[1:], rounded[1:], exact[1:])


def _directed(tensor: Tensor, seed: int) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    direction = torch.randn(tensor.shape, generator=generator, device="cuda", dtype=torch.float64)
    return (tensor.double() * direction).sum() / tensor.numel() ** 0.5


def _error(actual: Tensor, expected: Tensor) -> float:
    difference = (
        F.mse_loss(actual.double(), expected.double())
        if actual.numel() < 2**28
        else (actual - expected).square().mean()
    )
    return (difference / expected.square().mean().double().clamp(min=1e-30)).sqrt().item()


def _precise(state: MemoryState) -> MemoryState:
    """The state in fp64: where a call in fp64 would have to start from."""
    names = [name for name in state.tensors() if name != "length"]
    fields = {name: getattr(state, name).double() for name in names}
    return MemoryState(**fields, length=state.length, segment_length=state.segment_length)
