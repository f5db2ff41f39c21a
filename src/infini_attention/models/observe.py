"""observe() and token_shares(): what the memories of a model do in a forward pass, in all and by token."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from infini_attention.models.attention import FamilyAttentionMixin, InfiniAttentionMixin, SegmentContext
from infini_attention.models.cache import InfiniCache
from infini_attention.models.compat import CACHE_ARGUMENT, pop_cache
from infini_attention.models.memory_off import SHUT, memory_off
from infini_attention.ops import MemoryState

OPEN = -SHUT  # its sigmoid is exactly 1
LOSS_CHUNK = 2048  # tokens whose logits exist at once
GRADIENT_SETTINGS = (
    "checkpoint_segments",
    "detach_every",
    "stop_gradient",
)  # of forward; they change gradients only


@dataclass(frozen=True)
class Observation:
    """What `observe` saw; tensors are fp32 on the CPU, their layers those that have a memory, in order.

    Where memories differ by row (or packed document), figures are means over those that hold something,
    and 0 where none does.

    Attributes:
        gates: (layers, heads) sigmoid of the gates' logits, g.
        share: (layers, heads) the memory's part in what attention puts out (equation 10),
            ||g A_mem|| / (||g A_mem|| + ||(1 - g) A_dot||), from 0 to 1. The norms are over all tokens that
            had a memory to read; 0 where none had.
        memory_norm: (layers, kv_heads) Frobenius norm of M at the last segment's end.
        normalizer: (layers, kv_heads) the largest entry of z there.
        saturation: (layers, kv_heads) 1 - the correlation between the values that this call wrote and what M
            answers to their keys: 0 when it gives each one back, 1 when it is so full that none can be told
            from the others. (M's effective rank says nothing of that: it levels off in the first segment.)
        loss: mean cross entropy in nats a token.
        loss_memory_off: the same of the same tokens with every gate shut.
    """

    gates: Tensor
    share: Tensor
    memory_norm: Tensor
    normalizer: Tensor
    saturation: Tensor
    loss: float
    loss_memory_off: float

    @property
    def memory_gain(self) -> float:
        """What the memory takes off the loss, in nats a token."""
        return self.loss_memory_off - self.loss


def gated_layers(model: nn.Module) -> list[int]:
    """Numbers of the layers whose heads have a gate, in order; none in baselines that have no gates."""
    return [attention.layer_idx for attention in _gated(model)]


def gate_logits(model: nn.Module) -> Tensor:
    """All gates' logits, (`gated_layers`, heads) fp32 on the CPU, detached.

    Sharded gates are gathered, so every process has to call it. Raises ValueError for a model without gates.
    """
    gated = _gated(model)
    if not gated:
        raise ValueError(f"{type(model).__name__} has no memories; give an infini_* model, see retrofit()")
    return torch.stack([_logits(attention) for attention in gated])


@torch.no_grad()
def observe(model: Any, inputs: dict[str, Any]) -> Observation:
    """Run `model` over a batch, in evaluation mode, with its memory and without, and say what the memory did.

    The model, its mode, the inputs (a cache among them) and the random state stay as they were. It takes two
    forward passes, and three times the attention in one of them.

    Args:
        model: an `infini_*` language model.
        inputs: what its forward takes, with labels or shift_labels; rows may be padded, documents packed.

    Raises:
        ValueError: a model without memories, inputs without labels, and what forward raises.
    """
    attentions = _attentions(model)
    seen: dict[nn.Module, tuple[Tensor, ...]] = {}

    def look(attention: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        seen[attention] = _look(attention, arguments, settings)

    with _evaluation(model):
        with _looking(attentions, look):
            loss = _loss(model, inputs)
        with memory_off(model):
            loss_memory_off = _loss(model, inputs)
    share, memory_norm, normalizer, saturation = (
        torch.stack(column).float().cpu()
        for column in zip(*[seen[attention] for attention in attentions], strict=True)
    )
    return Observation(
        gates=gate_logits(model).sigmoid(),
        share=share,
        memory_norm=memory_norm,
        normalizer=normalizer,
        saturation=saturation,
        loss=loss,
        loss_memory_off=loss_memory_off,
    )


@contextmanager
def token_shares(model: Any, take: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Inside the `with`, hand `take` every memory's share of what its layer puts out, token by token.

    It is called with the layer's number and its share, (batch, length, heads) fp32, in every forward pass:
    ||g A_mem|| / (||g A_mem|| + ||(1 - g) A_dot||) of equation 10, the norms over head_dim, and 0 where
    there is no memory to read. Attention is computed three times instead of once.

    Raises ValueError for a model without memories.
    """

    def look(attention: Any, arguments: tuple[Any, ...], settings: dict[str, Any]) -> None:
        before, settings = _before(attention, settings)
        memory_part, local_part, _ = _parts(attention, before, arguments, settings)
        take(attention.layer_idx, _share(memory_part, local_part, dim=3))

    with _looking(_attentions(model), look):
        yield


def _attentions(model: nn.Module) -> list[InfiniAttentionMixin]:
    attentions = [module for module in model.modules() if isinstance(module, InfiniAttentionMixin)]
    if not attentions:
        raise ValueError(f"{type(model).__name__} has no memories; give an infini_* model, see retrofit()")
    return attentions


def _gated(model: nn.Module) -> list[Any]:
    return [
        module
        for module in model.modules()
        if isinstance(module, FamilyAttentionMixin) and hasattr(module, "memory_gate")
    ]


def _logits(attention: Any) -> Tensor:
    # Not by isinstance: where an adapter trains a copy of the gate, this is the copy.
    logits: Any = attention.memory_gate.logits.detach()
    whole: Tensor = logits.full_tensor() if hasattr(logits, "full_tensor") else logits
    return whole.float().cpu()


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in its own mode again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _loss(model: Any, inputs: dict[str, Any]) -> float:
    own = {name: value for name, value in inputs.items() if name not in GRADIENT_SETTINGS}
    cache = pop_cache(own)
    own |= {"use_cache": False} if cache is None else {CACHE_ARGUMENT: cache.copy()}
    return float(model(**own, loss_chunk=LOSS_CHUNK).loss)


@contextmanager
def _looking(
    attentions: list[InfiniAttentionMixin],
    look: Callable[[Any, tuple[Any, ...], dict[str, Any]], None],
) -> Iterator[None]:
    """Inside the `with`, `look` is called before each of the attentions, with what that is called with."""
    with ExitStack() as hooks:
        for attention in attentions:
            hooks.enter_context(attention.register_forward_pre_hook(look, with_kwargs=True))
        yield


def _look(
    attention: InfiniAttentionMixin, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[Tensor, ...]:
    """Share (heads,), norm of M, largest of z and saturation (kv_heads,) of a call, just before it."""
    before, settings = _before(attention, settings)
    memory_part, local_part, state = _parts(attention, before, arguments, settings)
    share = _share(memory_part, local_part, dim=(0, 1, 3))

    hidden_states = arguments[0] if arguments else settings["hidden_states"]
    start = before.layers[attention.layer_idx].state
    context = settings["segment_context"]
    _, keys, values, _ = attention.project(hidden_states, before.recent(attention.layer_idx), context)
    new = state.length - state.open_length - (0 if start is None else start.length)  # tokens that went into M
    rows = _rows(context, *hidden_states.shape[:2])
    written = [row[: max(count, 0)] for row, count in zip(rows, new.tolist(), strict=True)]
    saturation = _saturation(keys, values, written, state, attention.config)

    filled = state.normalizer.any(dim=-1)  # (rows, kv_heads)
    memory_norm = _mean(torch.linalg.matrix_norm(state.memory), filled)
    normalizer = _mean(state.normalizer.amax(dim=-1), filled)
    return share, memory_norm, normalizer, saturation


def _before(attention: Any, settings: dict[str, Any]) -> tuple[InfiniCache, dict[str, Any]]:
    """The cache that a call goes on from, and its other arguments."""
    others = dict(settings)
    cache = pop_cache(others)
    return InfiniCache(attention.config) if cache is None else cache, others


def _parts(
    attention: Any, before: InfiniCache, arguments: tuple[Any, ...], settings: dict[str, Any]
) -> tuple[Tensor, Tensor, MemoryState]:
    """g A_mem and (1 - g) A_dot, (batch, length, heads, head_dim) fp32, and the state after the call.

    Both are 0 where there is no memory to read.
    """
    from_memory, state = _attended(attention, OPEN, before, arguments, settings)
    local, _ = _attended(attention, SHUT, before, arguments, settings)
    logits = _logits(attention).to(local.device)
    from_memory, local = (x.float().unflatten(-1, (len(logits), -1)) for x in (from_memory, local))
    # An empty memory answers with what is local, or with 0.
    had_memory = (from_memory != local).any(dim=-1, keepdim=True) & from_memory.any(dim=-1, keepdim=True)
    gates = logits.sigmoid()[:, None]
    return gates * from_memory * had_memory, (1 - gates) * local * had_memory, state


def _attended(
    attention: Any,
    logit: float,
    before: InfiniCache,
    arguments: tuple[Any, ...],
    settings: dict[str, Any],
) -> tuple[Tensor, MemoryState]:
    """All heads' outputs, (batch, length, heads * head_dim), and the state after, were all gates `logit`."""
    outputs: list[Tensor] = []

    def replace_gate(gate: nn.Module, given: Any, logits: Tensor) -> Tensor:
        return torch.full_like(logits, logit)

    def keep_output(projection: nn.Module, given: tuple[Tensor]) -> None:
        outputs.append(given[0])

    cache = before.copy()
    with (
        attention.memory_gate.register_forward_hook(replace_gate),
        attention.o_proj.register_forward_pre_hook(keep_output),
    ):
        attention.forward(*arguments, **settings, **{CACHE_ARGUMENT: cache})
    state = cache.layers[attention.layer_idx].state
    return outputs[0], state


def _share(memory_part: Tensor, local_part: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    """The memory's part in both, by norms over `dim`; 0 where both are 0."""
    of_memory, of_local = (torch.linalg.vector_norm(part, dim=dim) for part in (memory_part, local_part))
    both = of_memory + of_local
    return torch.where(both > 0, of_memory / both, 0)


def _rows(context: SegmentContext, batch: int, length: int) -> list[Tensor]:
    """Each row's (or packed document's) real tokens, as places in a batch whose rows are joined."""
    places = torch.arange(batch * length)
    if context.cu_seqlens is not None:
        return list(places.split(context.cu_seqlens.diff().tolist()))
    rows = list(places.view(batch, length))
    mask = context.padding_mask
    return rows if mask is None else [row[real] for row, real in zip(rows, mask.cpu(), strict=True)]


def _saturation(
    keys: Tensor, values: Tensor, written: list[Tensor], state: MemoryState, config: Any
) -> Tensor:
    """(kv_heads,) from keys and values (batch, kv_heads, length, dim), and the places of each row in M."""
    keys, values = (x.transpose(0, 1).flatten(1, 2) for x in (keys, values))
    how = {"feature_map": config.feature_map, "normalization": config.normalization}
    recalled = []
    for row, tokens in enumerate(written):
        if len(tokens):
            memory = state.select(torch.tensor([row]))
            answers = memory.read(keys[None, :, tokens], **how)[0]
            recalled.append(_correlation(answers, values[:, tokens].to(answers.dtype)))
    if not recalled:
        return keys.new_zeros(len(keys))
    return 1 - torch.stack(recalled).mean(dim=0).clamp(min=0)


def _correlation(x: Tensor, y: Tensor) -> Tensor:
    """(kv_heads,) over all entries of (kv_heads, tokens, dim), around each tensor's mean token."""
    x, y = ((x - x.mean(dim=1, keepdim=True)).flatten(1) for x in (x, y))
    return F.cosine_similarity(x, y, dim=1)


def _mean(x: Tensor, filled: Tensor) -> Tensor:
    """(kv_heads,) mean of `x` (rows, kv_heads) over rows that are `filled`."""
    return (x * filled).sum(dim=0) / filled.sum(dim=0).clamp(min=1)
