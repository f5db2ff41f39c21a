"""`infini stream`: a text of any length goes through a model at constant memory, with and without memory."""

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from infini_attention.data.texts import TokenBlock, first_tokens, in_chunks, open_text, token_blocks
from infini_attention.evaluation.perplexity import StreamedPerplexity, Stretch
from infini_attention.evaluation.progress import ResidentMemory, StreamProgress
from infini_attention.layers import MemoryGate
from infini_attention.models import load_tokenizer
from infini_attention.models.config import head_dim_of
from infini_attention.models.reader import load_reader
from infini_attention.provenance import Provenance, provenance

CHUNK_TOKENS = 1024
MOST_SAMPLES = 512


@dataclass(frozen=True)
class Setting:
    """What read the text, and how.

    Attributes:
        model: as it was asked for.
        model_type: of its config.
        retrofitted: whether its memories were added just now, so that its gates are untrained.
        gate_share: mean over all heads of sigmoid(gate), the memory's share of the output.
        cache_bytes_per_token: what an ordinary key/value cache of the same model would take a token, computed
            from its config: keys and values of every key/value head of every layer.
    """

    model: str
    model_type: str
    retrofitted: bool
    segment_length: int
    update_rule: str
    feature_map: str
    normalization: str
    gate_share: float
    dtype: str
    device: str
    chunk_length: int
    cache_bytes_per_token: int
    local_attention: str = "segment"  # as `local_attention_name`; older reports have none


@dataclass(frozen=True)
class Sample:
    """What was measured after `tokens` tokens: bytes of the state, and of the whole process in memory."""

    tokens: int
    seconds: float
    state_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class StreamReport:
    """All that `infini stream` shows.

    Attributes:
        text: its name.
        ending: why reading ended: "end of text", "max_tokens" or "interrupted".
        setting: what read it.
        total: the whole text's loss, with the memory on and off.
        by_position: the same by position; stretches of N, N, 2N, 4N, ... tokens.
        curve: the same in stretches of equal length, for drawing.
        samples: sizes while reading, the first before the first token.
        peak_resident_bytes: most memory the process held while reading, looked at twenty times a second.
        load_seconds: time to load the model, and to convert it where that had to be done.
        read_seconds: time to read the text, with the memory on and off.
        provenance: versions, command and machine.
    """

    text: str
    ending: str
    setting: Setting
    total: Stretch
    by_position: list[Stretch]
    curve: list[Stretch]
    samples: list[Sample]
    peak_resident_bytes: int
    load_seconds: float
    read_seconds: float
    provenance: Provenance

    @property
    def tokens_per_second(self) -> float:
        """Tokens of text a second, each read twice: with the memory on and off."""
        return self.total.end / self.read_seconds

    @property
    def state_bytes(self) -> int:
        """Most bytes carried from one chunk to the next, measured."""
        return max(sample.state_bytes for sample in self.samples)

    @property
    def full_cache_bytes(self) -> int:
        """Bytes of an ordinary key/value cache after the same tokens, computed."""
        return self.total.end * self.setting.cache_bytes_per_token


def stream(
    text: str,
    *,
    model: str = "smollm2",
    segment_length: int | None = None,
    update_rule: str | None = None,
    feature_map: str | None = None,
    normalization: str | None = None,
    local_attention: str | None = None,
    sink_tokens: int | None = None,
    gate_init: float | None = None,
    chunk_length: int | None = None,
    max_tokens: int | None = None,
    dtype: str = "auto",
    device: str = "auto",
) -> StreamReport:
    """Read a text of any length through a model at constant memory: perplexity with the memory on and off.

    Ctrl-C ends the reading early; what was measured until then is reported.

    Args:
        text: A file, - for standard input, or an alias such as hamlet.
        model: A model's name, folder or GGUF file, or an alias: passkey, smollm2. A model without memories
            is retrofitted, untrained; one with memories is read with as it is.
        segment_length: Tokens a segment when retrofitting; default 512.
        update_rule: linear or delta, when retrofitting; default linear.
        feature_map: Feature map of the memory, when retrofitting; default elu1.
        normalization: Of what the memory answers, when retrofitting; default sum.
        local_attention: segment, sliding or sink, when retrofitting; default segment.
        sink_tokens: How many of the first tokens sink keeps in sight, when retrofitting; default 4.
        gate_init: Logit of every gate, when retrofitting; default -4, which gives the memory 1.8 percent.
        chunk_length: Tokens that go through the model at once; default whole segments of at least 1024 tokens
            in sum. Changes speed and working memory, no figure.
        max_tokens: Stop after so many tokens; default the whole text.
        dtype: float32, bfloat16 or auto, which takes bfloat16 on a GPU and where a CPU is quicker with it.
        device: A device of torch, or auto, which takes the first GPU, else the CPU.

    Raises:
        ValueError: A setting, text or model that cannot be right; the message names the remedy.
    """
    _check_counts(chunk_length, max_tokens)
    opened, memory = open_text(text), ResidentMemory()
    settings = {
        "segment_length": segment_length,
        "update_rule": update_rule,
        "feature_map": feature_map,
        "normalization": normalization,
        "local_attention": local_attention,
        "sink_tokens": sink_tokens,
        "gate_init": gate_init,
    }
    given = {name: value for name, value in settings.items() if value is not None}

    began = time.perf_counter()
    reader, retrofitted = load_reader(model, given, device=device, dtype=dtype)
    blocks = token_blocks(opened.pieces(), load_tokenizer(model))
    if chunk_length is None:
        chunk_length = -(-CHUNK_TOKENS // reader.config.segment_length) * reader.config.segment_length
    load_seconds = time.perf_counter() - began

    perplexity = StreamedPerplexity(reader)
    chunks = in_chunks(first_tokens(blocks, max_tokens), chunk_length)
    samples, interrupted = _read(chunks, perplexity, memory, StreamProgress(opened, max_tokens))
    if perplexity.tokens < 2:
        raise ValueError(
            f"{perplexity.tokens} tokens of {opened.name} were read; a perplexity needs at least 2"
        )
    ending = "max_tokens" if perplexity.tokens == max_tokens else "end of text"
    return StreamReport(
        text=opened.name,
        ending="interrupted" if interrupted else ending,
        setting=_setting(reader, model, retrofitted, chunk_length),
        total=perplexity.total,
        by_position=perplexity.by_position,
        curve=perplexity.curve,
        samples=samples,
        peak_resident_bytes=memory.peak,
        load_seconds=load_seconds,
        read_seconds=samples[-1].seconds,
        provenance=provenance(),
    )


def _check_counts(chunk_length: int | None, max_tokens: int | None) -> None:
    if chunk_length is not None and chunk_length < 1:
        raise ValueError(f"chunk_length is {chunk_length}; give at least 1, better a few segments")
    if max_tokens is not None and max_tokens < 2:
        raise ValueError(
            f"max_tokens is {max_tokens}; give at least 2, since the first token has no prediction"
        )


def _read(
    chunks: Iterable[TokenBlock],
    perplexity: StreamedPerplexity,
    memory: ResidentMemory,
    progress: StreamProgress,
) -> tuple[list[Sample], bool]:
    """Read all chunks; return what was sampled after each, and whether Ctrl-C ended the reading."""
    samples = [Sample(0, 0.0, 0, memory.now())]
    began = time.perf_counter()
    with memory, progress:
        try:
            for chunk in chunks:
                perplexity.feed(chunk)
                seconds = time.perf_counter() - began
                samples.append(Sample(perplexity.tokens, seconds, perplexity.state_bytes, memory.now()))
                progress.show(**vars(samples[-1]), read_bytes=perplexity.total.on.bytes)
                if len(samples) == MOST_SAMPLES:
                    del samples[2:-1:2]
        except KeyboardInterrupt:
            return samples, True
    return samples, False


def _setting(model: Any, name: str, retrofitted: bool, chunk_length: int) -> Setting:
    config = model.config
    gates = [module.logits.detach() for module in model.modules() if isinstance(module, MemoryGate)]
    return Setting(
        model=name,
        model_type=config.model_type,
        retrofitted=retrofitted,
        segment_length=config.segment_length,
        update_rule=config.update_rule,
        feature_map=config.feature_map,
        normalization=config.normalization,
        local_attention=config.local_attention_name,
        gate_share=torch.stack(gates).sigmoid().mean().item(),
        dtype=str(model.dtype).removeprefix("torch."),
        device=str(model.device),
        chunk_length=chunk_length,
        cache_bytes_per_token=cache_bytes_per_token(model),
    )


def cache_bytes_per_token(model: Any) -> int:
    """What an ordinary key/value cache of the same model would take a token, computed from its config."""
    config = model.config
    numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim_of(config)
    return int(numbers * model.dtype.itemsize)
