"""The model `infini` of EleutherAI's lm-evaluation-harness: requests of any length, read as streams.

Nothing is truncated and no windows are cut: what a model carries goes on from a request's first token to its
last. What requests have in common is read once. lm-eval's own command knows the model when it is started by
`python -m infini_attention.evaluation.lm_eval_model`, with its usual arguments and `--model infini`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from torch import Tensor
from tqdm import tqdm
from transformers import StoppingCriteria, StoppingCriteriaList

from infini_attention.baselines.loading import load_system
from infini_attention.data.texts import BLOCK_CHARACTERS, token_blocks
from infini_attention.evaluation.memory_reset import check_has_memory, with_memory_reset
from infini_attention.evaluation.passkey import chunk_length
from infini_attention.models import load_tokenizer
from infini_attention.models.compat import CACHE_ARGUMENT
from infini_attention.models.loss import logits_of

LEAST_SHARED = 32  # tokens: fewer are sooner read again than read apart from what follows
LOGITS_AT_ONCE = 256  # tokens

Ids = np.ndarray  # (tokens,) int32: of a long text a list of Python's numbers would be nine times as large
Answer = tuple[float, bool]  # log-likelihood in nats; whether each token is the likeliest


@register_model("infini")
class InfiniLM(TemplateLM):
    """A model with memories, or a baseline, as lm-eval asks it.

    Texts begin with whatever special tokens the tokenizer puts there. Where a text is scored from its very
    beginning, its first token is predicted from the tokenizer's BOS token, else from EOS; where there is
    neither, it is not predicted, and the rest is from it. Contexts that begin with the same 32 tokens or more
    are read once, as far as they agree.

    Args:
        pretrained: whatever `load_system` takes by name, or a model in memory, in evaluation mode.
        tokenizer: the model's; default the one that belongs to the name.
        batch_size: rows that are read side by side. Changes speed and working memory.
        chunk_tokens: of each row that go through the model at once; default whole segments, as many as keep
            the device busy. Likewise.
        memory_reset: the control: the memory is emptied before the last token of every context, from which a
            continuation's first is predicted.
        device: as `load_system` has it, and so is `dtype`.
        dtype: of a model that is loaded by name.
        settings: of `load_system`, such as segment_length, or window and sinks.

    Raises:
        ValueError: a model in memory without its tokenizer or in training mode, numbers below 1, or a reset
            where there is no memory.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        batch_size: int | str = 1,
        chunk_tokens: int | None = None,
        memory_reset: bool = False,
        device: str = "auto",
        dtype: str = "auto",
        **settings: Any,
    ) -> None:
        super().__init__()
        if isinstance(pretrained, str):
            self.model, _ = load_system(pretrained, settings, device=device, dtype=dtype)
        else:
            self.model = pretrained
        self.tokenizer = _tokenizer(pretrained if tokenizer is None else tokenizer)
        self.batch_size = _at_least_one("batch_size", batch_size)
        self.chunk_tokens = None if chunk_tokens is None else _at_least_one("chunk_tokens", chunk_tokens)
        self.memory_reset = memory_reset
        self._device = self.model.device
        if self.model.training:
            raise ValueError(
                "the model is in training mode, where dropout changes answers; call model.eval()"
            )
        if memory_reset:
            check_has_memory(self.model)

    # --- texts and tokens --------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int | None:
        """The tokenizer's EOS token."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int | None:
        """What a text's first token is predicted from; None where the tokenizer has nothing of the kind."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """What tells lm-eval's caches of requests apart."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's template of a conversation, as text."""
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """A text's ids, with the tokenizer's special tokens unless it begins with BOS already."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        if len(string) <= BLOCK_CHARACTERS or not self.tokenizer.is_fast:
            return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)
        # A block at a time: what the tokenizer says of a whole text takes some 500 bytes a token.
        before, after = self._special_tokens() if add_special_tokens else ([], [])
        blocks = token_blocks([string], self.tokenizer)
        return [*before, *(token for block in blocks for token in block.ids.tolist()), *after]

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """Those that the tokenizer puts before a text and after it."""
        text, whole = (self.tokenizer.encode("a", add_special_tokens=special) for special in (False, True))
        first = next(place for place in range(len(whole)) if whole[place : place + len(text)] == text)
        return whole[:first], whole[first + len(text) :]

    # --- what lm-eval asks for ---------------------------------------------------------------------------

    def _encode_pair(self, context: str, continuation: str) -> tuple[Any, Any]:
        before, after = super()._encode_pair(context, continuation)
        return np.array(before, dtype=np.int32), np.array(after, dtype=np.int32)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, Sequence[Any], Sequence[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[Answer]:
        pairs = [self._begun(context, continuation) for _, context, continuation in requests]
        answers = self._scored(pairs, disable_tqdm)
        for (texts, _, _), answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, answer)
        return answers

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Each text's log-likelihood in nats, read once from its beginning to its end.

        Raises ValueError where the memory is to be reset before a question: there is none.
        """
        if self.memory_reset:
            raise ValueError(
                "memory_reset is set, and a text's own likelihood has no question to reset it before; leave "
                "it out, or compare with the memory off by infini perplexity"
            )
        pairs = [self._begun([], self.tok_encode(*request.args)) for request in requests]
        return [likelihood for likelihood, _ in self._scored(pairs, disable_tqdm)]

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """What the model goes on with after each context, up to where it is to stop."""
        texts = [request.args[0] for request in requests]
        contexts = [self._begun(self.tok_encode(text), [])[0] for text in texts]
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="infini") as bar:
            for rows, seen, cache in self._branches(contexts):
                for row in rows:
                    options = requests[row].args[1]
                    answers[row] = self._generated(contexts[row], seen, cache.copy(), options)
                    self.cache_hook.add_partial("generate_until", (texts[row], options), answers[row])
                    bar.update()
        return answers

    # --- reading -----------------------------------------------------------------------------------------

    def _begun(self, context: Sequence[int | None], continuation: Sequence[int]) -> tuple[Ids, Ids]:
        """Context and continuation, with something in the context: a prefix token, else the first one."""
        if len(context) == 0 or context[0] is None:  # None: TemplateLM takes the prefix as it is
            prefix, first = self.prefix_token_id, [*continuation[:1]]
            known = prefix is None or first == [prefix]
            context, continuation = (first, continuation[1:]) if known else ([prefix], continuation)
        return np.asarray(context, dtype=np.int32), np.asarray(continuation, dtype=np.int32)

    def _scored(self, pairs: list[tuple[Ids, Ids]], disable_tqdm: bool) -> list[Answer]:
        """The likelihood of each continuation after its context."""
        contexts = [context for context, _ in pairs]
        answers: list[Answer] = [(0.0, True)] * len(pairs)
        with tqdm(total=len(pairs), disable=disable_tqdm, desc="infini") as bar:
            for rows, seen, cache in self._branches(contexts):
                tails = [np.concatenate([contexts[row][seen:], pairs[row][1]]) for row in rows]
                counts = [len(pairs[row][1]) for row in rows]
                for row, answer in zip(rows, self._scores(tails, counts, cache), strict=True):
                    answers[row] = answer
                bar.update(len(rows))
        return answers

    def _branches(self, contexts: list[Ids]) -> Iterator[tuple[list[int], int, Any]]:
        """Read what contexts have in common, once. Yields rows that go on by themselves, side by side.

        With them come how many of their tokens have been read, and a cache of one row that has seen these;
        it is to be copied. At least each context's last token is left to read, and no more where the memory
        is reset.
        """
        whole = [context[:-1] for context in contexts]  # what may be shared
        ordered = sorted(range(len(whole)), key=lambda row: whole[row].astype(">u4").tobytes())
        fresh = self.model.base_model.cache_class(self.model.config)
        yield from self._branched(whole, ordered, 0, fresh)

    def _branched(
        self, whole: list[Ids], ordered: list[int], seen: int, cache: Any
    ) -> Iterator[tuple[list[int], int, Any]]:
        """`_branches` of rows that have their first `seen` tokens in common, in lexicographic order."""
        alone: list[int] = []
        for group in _groups(whole, ordered, seen + LEAST_SHARED):
            shared = _common(whole[group[0]], whole[group[-1]])
            if shared == seen or (len(group) == 1 and not self.memory_reset):
                alone += group
                continue
            branch = cache.copy()
            self._read(whole[group[0]][seen:shared], branch)
            yield from self._branched(whole, group, shared, branch)
        alone.sort(key=lambda row: len(whole[row]))
        if self.memory_reset:
            cache = with_memory_reset(cache)
        for start in range(0, len(alone), self.batch_size):
            yield alone[start : start + self.batch_size], seen, cache

    @torch.inference_mode()
    def _read(self, ids: Ids, cache: Any) -> None:
        """Read on in one row."""
        chunk = self._chunk(rows=1)
        for start in range(0, len(ids), chunk):
            self._hidden(torch.from_numpy(ids[None, start : start + chunk]), cache)

    @torch.inference_mode()
    def _scores(self, tails: list[Ids], counts: list[int], cache: Any) -> list[Answer]:
        """The likelihood of the last `counts` tokens of each row, all of which go on from one row's cache."""
        order = sorted(range(len(tails)), key=lambda row: -len(tails[row]))  # those that end are last
        cache = _rows_of(cache, [0] * len(order), self.model.device)
        nats, greedy = [0.0] * len(tails), [True] * len(tails)
        chunk, longest = self._chunk(rows=len(tails)), len(tails[order[0]]) - 1
        for start in range(0, longest, chunk):
            stop = min(start + chunk, longest)
            left = [row for row in order if len(tails[row]) - 1 > start]
            if start and len(left) < len(order):
                cache = _rows_of(cache, list(range(len(left))), self.model.device)
            order = left
            hidden = self._hidden(_padded([tails[row][start:stop] for row in left], stop - start), cache)
            for row, of_row in zip(left, hidden, strict=True):
                last = len(tails[row]) - 1
                first = max(start, last - counts[row])
                if first < min(stop, last):
                    targets = torch.from_numpy(tails[row][first + 1 : stop + 1]).long()
                    lost, likeliest = self._losses(of_row[first - start : last - start], targets)
                    nats[row] += lost
                    greedy[row] &= likeliest
        return [(-lost, likeliest) for lost, likeliest in zip(nats, greedy, strict=True)]

    def _losses(self, hidden: Tensor, targets: Tensor) -> tuple[float, bool]:
        """What predicting `targets` (tokens,) from (tokens, hidden_size) costs; whether all are likeliest."""
        nats, greedy = 0.0, True
        parts = zip(hidden.split(LOGITS_AT_ONCE), targets.split(LOGITS_AT_ONCE), strict=True)
        for part, wanted in parts:
            logits, wanted = logits_of(self.model, part).float(), wanted.to(hidden.device)
            nats += torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double().sum().item()
            greedy = greedy and bool((logits.argmax(dim=-1) == wanted).all())
        return nats, greedy

    @torch.inference_mode()
    def _generated(self, context: Ids, seen: int, cache: Any, options: dict[str, Any]) -> str:
        """What the model goes on with; the cache of one row has seen the first tokens of the context."""
        self._read(context[seen:-1], cache)
        given: dict[str, Any] = dict(normalize_gen_kwargs(options))
        stops = handle_stop_sequences(given.pop("until"), eos=self.tokenizer.eos_token)
        tokens = given.pop("max_gen_toks")
        if not given["do_sample"]:
            given.pop("temperature", None)
        ids = torch.from_numpy(context[None]).long().to(self.model.device)
        made = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            stopping_criteria=StoppingCriteriaList([_Said(self.tokenizer, stops, ids.shape[1])]),
            pad_token_id=self.eot_token_id or 0,
            **{CACHE_ARGUMENT: cache},
            **given,
        )
        text = self.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
        return postprocess_generated_text(text, stops, None)

    def _hidden(self, ids: Tensor, cache: Any) -> Tensor:
        """The decoder's last hidden states of (rows, tokens) ids, (rows, tokens, hidden_size)."""
        ids = ids.long().to(self.model.device)
        output = self.model.base_model(ids, use_cache=True, **{CACHE_ARGUMENT: cache})
        return output.last_hidden_state

    def _chunk(self, rows: int) -> int:
        return chunk_length(self.model, rows) if self.chunk_tokens is None else self.chunk_tokens


class _Said(StoppingCriteria):
    """Stops one row's generation as soon as one of some texts is part of it, from token `start` on."""

    def __init__(self, tokenizer: Any, stops: list[str], start: int) -> None:
        self.tokenizer, self.stops, self.start = tokenizer, [stop for stop in stops if stop], start

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        text = self.tokenizer.decode(input_ids[0, self.start :])
        return torch.tensor([any(stop in text for stop in self.stops)], device=input_ids.device)


def _groups(whole: list[Ids], ordered: list[int], least: int) -> Iterator[list[int]]:
    """Rows in lexicographic order, together while each has `least` tokens in common with the one before."""
    group: list[int] = []
    for row in ordered:
        if group and _common(whole[group[-1]], whole[row]) < least:
            yield group
            group = []
        group.append(row)
    if group:
        yield group


def _common(one: Ids, other: Ids) -> int:
    """How many tokens two rows have in common before they differ, or one of them ends."""
    length = min(len(one), len(other))
    different = one[:length] != other[:length]
    return int(different.argmax()) if different.any() else length


def _rows_of(cache: Any, rows: list[int], device: torch.device) -> Any:
    """A copy of a cache with the given rows, in the given order."""
    chosen = cache.copy()
    chosen.batch_select_indices(torch.tensor(rows, device=device))
    return chosen


def _padded(rows: list[Ids], length: int) -> Tensor:
    """(rows, length) int32, 0 after the end of a row."""
    return torch.from_numpy(np.stack([np.pad(row, (0, length - len(row))) for row in rows]))


def _tokenizer(given: Any) -> Any:
    if isinstance(given, str):
        return load_tokenizer(given)
    if not hasattr(given, "encode"):
        raise ValueError(f"a {type(given).__name__} in memory is given without its tokenizer; give that, too")
    return given


def _at_least_one(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
    return int(value)


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
