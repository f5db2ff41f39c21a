"""lm-eval's requests, streamed: against whole forwards of tiny models, and against each other."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tokenizers import processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from infini_attention.baselines import BASELINES
from infini_attention.data.documents import Documents
from infini_attention.data.tokenizers import byte_tokenizer
from infini_attention.evaluation.document_perplexity import document_perplexity
from infini_attention.layers import MemoryGate
from infini_attention.models import InfiniCache, retrofit
from infini_attention.models.compat import CACHE_ARGUMENT

from .conftest import SIZES

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'infini-attention[harness]'")

from infini_attention.evaluation.lm_eval_model import LEAST_SHARED, InfiniLM

SEGMENT = 16
OWN = {
    "memorizing": {"memory_size": 20, "neighbors": 3},
    "recurrent_memory": {"memory_tokens": 3},
    "sliding_window": {"window": 11, "sinks": 2},
}
BYTES = byte_tokenizer()
DOCUMENT = "A rose by any other name would smell as sweet; so would it, were it not called so. " * 2
REQUESTS = [
    (DOCUMENT + "What smells? A", " rose"),
    (DOCUMENT + "What smells? A", " name, by any"),
    (DOCUMENT + "What smells? A", " rose"),  # once more
    (DOCUMENT + "What is in it?", " Nothing"),
    (DOCUMENT, "So it goes on."),
    ("Quite another question?", " Yes"),
    ("x", "yz"),
    (DOCUMENT * 3, "far longer"),
    (DOCUMENT[:40], " no more"),
]


def make(name: str = "infini", layers: list[int] | None = None) -> Any:
    """A tiny model of a system, in evaluation mode; gates differ from head to head, and are open."""
    torch.manual_seed(0)
    if name in BASELINES:
        model_class = BASELINES[name][LlamaForCausalLM]
        fields = SIZES | {"segment_length": SEGMENT} | OWN.get(name, {})
        return model_class(model_class.config_class(**fields)).eval()
    base = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    model = retrofit(base, segment_length=SEGMENT, update_rule="delta", layers=layers)
    for gate in (each.logits for each in model.modules() if isinstance(each, MemoryGate)):
        torch.nn.init.normal_(gate, mean=1.0)
    return model


def lm(model: Any = None, **settings: Any) -> InfiniLM:
    return InfiniLM(model or make(), **{"tokenizer": BYTES, "chunk_tokens": 24} | settings)


def requests(pairs: list[tuple[Any, ...]]) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def asked(model: InfiniLM, pairs: list[tuple[str, str]] = REQUESTS) -> list[tuple[float, bool]]:
    return model.loglikelihood(requests(pairs), disable_tqdm=True)


def rolling(model: InfiniLM, *texts: str) -> list[float]:
    return model.loglikelihood_rolling(requests([(text,) for text in texts]), disable_tqdm=True)


def generated(model: InfiniLM, *texts: str, **options: Any) -> list[str]:
    pairs = [(text, {"until": ["\n\n"], "max_gen_toks": 12} | options) for text in texts]
    return model.generate_until(requests(pairs), disable_tqdm=True)


def whole_forward(model: Any, ids: list[int], scored: int) -> tuple[float, bool]:
    """Likelihood of the last tokens from the model's own forward, all at once; whether all are likeliest."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, -scored - 1 : -1]
    targets = torch.tensor(ids[-scored:])
    likeliest = bool((logits.argmax(dim=-1) == targets).all())
    return -F.cross_entropy(logits, targets, reduction="sum").item(), likeliest


def tokens_read(model: Any, call: Callable[[], Any]) -> int:
    """How many tokens go through the decoder during a call."""
    read = 0

    def count(_: Any, positional: Any, named: Any) -> None:
        nonlocal read
        ids = positional[0] if positional else named["input_ids"]
        read += ids.numel()

    hook = model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    call()
    hook.remove()
    return read


def with_special_tokens(*, bos: bool, added: bool) -> PreTrainedTokenizerFast:
    """Bytes, with an EOS token, and a BOS token that may be put before every text."""
    inner = byte_tokenizer().backend_tokenizer
    inner.add_special_tokens(["<s>", "</s>"])
    if added:
        inner.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    names = {"eos_token": "</s>"} | ({"bos_token": "<s>"} if bos else {})
    return PreTrainedTokenizerFast(tokenizer_object=inner, clean_up_tokenization_spaces=False, **names)


def with_two_more_ids() -> Any:
    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 258})).eval()
    return retrofit(base, segment_length=SEGMENT, gate_init=0.0)


# --- likelihoods -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, [1]])
def test_every_continuation_is_as_likely_as_in_one_forward(layers: list[int] | None) -> None:
    model = make(layers=layers)
    for (context, continuation), (likelihood, greedy) in zip(REQUESTS, asked(lm(model)), strict=True):
        text = context + continuation
        scored = len(text) - len(context.rstrip())  # a space at the end is told with what follows it
        expected, likeliest = whole_forward(model, [*text.encode()], scored)
        assert likelihood == pytest.approx(expected, rel=1e-4)
        assert greedy == likeliest


@pytest.mark.parametrize("chunk_tokens", [1, 24])
def test_what_greedy_decoding_says_is_told_to_be_greedy(chunk_tokens: int) -> None:
    model, ids = make(), [*DOCUMENT.encode()]

    def gone_on(ids: list[int]) -> list[int]:
        with torch.no_grad():
            return [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]

    first, second = gone_on(gone_on(ids))[-2:]
    wrong = (first + 1) % 256
    after_wrong = gone_on([*ids, wrong])[-1]
    continuations = [[first, second], [first, (second + 1) % 256], [wrong, after_wrong]]
    reader = lm(model, chunk_tokens=chunk_tokens)
    answers = reader._loglikelihood_tokens([(None, ids, each) for each in continuations])
    assert [greedy for _, greedy in answers] == [True, False, False]


@pytest.mark.parametrize("system", BASELINES)
def test_baselines_are_asked_alike(system: str) -> None:
    model = make(system)
    answers = asked(lm(model, batch_size=3))
    for (context, continuation), (likelihood, _) in zip(REQUESTS, answers, strict=True):
        text = context + continuation
        expected, _ = whole_forward(model, [*text.encode()], len(text) - len(context.rstrip()))
        assert likelihood == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("batch_size", [2, 7])
def test_the_batch_size_changes_no_figure(batch_size: int) -> None:
    texts = [DOCUMENT, "short", DOCUMENT[3:90], "x"]
    one, several = lm(batch_size=1), lm(batch_size=str(batch_size))
    for alone, together in zip(asked(one), asked(several), strict=True):
        assert together[0] == pytest.approx(alone[0], rel=1e-5)
        assert together[1] == alone[1]
    assert rolling(several, *texts) == pytest.approx(rolling(one, *texts), rel=1e-5)
    assert generated(several, *texts) == generated(one, *texts)


@pytest.mark.parametrize("chunk_tokens", [1, 7, 1000])
def test_the_length_of_chunks_changes_no_figure(chunk_tokens: int) -> None:
    figures = [each for each, _ in asked(lm(chunk_tokens=chunk_tokens, batch_size=4))]
    assert figures == pytest.approx([each for each, _ in asked(lm())], rel=1e-5)


def test_the_order_of_requests_changes_no_figure() -> None:
    assert [each for each, _ in asked(lm(), REQUESTS[::-1])][::-1] == pytest.approx(
        [each for each, _ in asked(lm())], rel=1e-5
    )


def test_a_shared_context_is_read_once_and_gives_the_same_figures_as_each_question_alone() -> None:
    model = make()
    reader = lm(model, batch_size=4)
    context, choices = DOCUMENT + "Which?", [" one", " another", " a third", " none"]
    pairs = [(context, choice) for choice in choices]
    alone = [asked(reader, [pair])[0] for pair in pairs]
    read = tokens_read(model, lambda: asked(reader, pairs))
    assert read == len(context) - 1 + len(choices) * max(map(len, choices))
    for together, single in zip(asked(reader, pairs), alone, strict=True):
        assert together == (pytest.approx(single[0], rel=1e-5), single[1])


def test_questions_about_one_document_read_the_document_once() -> None:
    model = make()
    reader = lm(model)
    documents = DOCUMENT, DOCUMENT[::-1]
    pairs = [(f"{it}{question}?", f" {answer}") for question in "abc" for answer in "yn" for it in documents]
    shared, each = len(DOCUMENT), len("a? y") - 1
    assert tokens_read(model, lambda: asked(reader, pairs)) == 2 * shared + len(pairs) * each
    contexts = {context for context, _ in pairs}
    made = len(contexts) * (len("a?") + 12)
    assert tokens_read(model, lambda: generated(reader, *contexts)) <= 2 * shared + made


def test_a_few_words_in_common_do_not_keep_rows_apart() -> None:
    model = make()
    pairs = [(f"The {word} of it", " all") for word in ("end", "middle", "beginning")]
    calls = []
    hook = model.base_model.register_forward_pre_hook(lambda *_: calls.append(1))
    asked(lm(model, batch_size=3), pairs)
    hook.remove()
    assert len(calls) == 1
    assert len("The ") < LEAST_SHARED


def test_no_token_is_dropped_however_long_the_context_is() -> None:
    far, other = (f"The key is {key}. " + "Nothing here. " * 15 + "It is" for key in (7, 8))
    assert len(far) > 10 * SEGMENT
    (told, _), (changed, _) = asked(lm(), [(far, " 7"), (other, " 7")])
    assert abs(told - changed) > 1e-4
    assert rolling(lm(), far)[0] != pytest.approx(rolling(lm(), far[11:])[0], rel=1e-3)
    assert whole_forward(make(), [*far.encode(), *b" 7"], 2)[0] == pytest.approx(told, rel=1e-4)


def test_a_memory_reset_is_felt_after_the_context_alone() -> None:
    model = make()
    far, other = (f"The key is {key}. " + "Nothing here. " * 15 + "It is" for key in (7, 8))
    near = ("One key", " of many")  # within a segment there is nothing in memory
    long = " 7, and nothing but 7; so it is, and so it stays"  # whole segments are written and read anew
    pairs = [(far, long), (other, long), near]
    kept, reset = asked(lm(model), pairs), asked(lm(model, memory_reset=True, batch_size=3), pairs)
    assert reset[0][0] != pytest.approx(kept[0][0], rel=1e-5)
    assert reset[2][0] == pytest.approx(kept[2][0], rel=1e-5)
    assert reset[0][0] == pytest.approx(by_hand(model, far, long), rel=1e-4)
    again = asked(lm(model, memory_reset=True), pairs)
    assert [each for each, _ in again] == pytest.approx([each for each, _ in reset], rel=1e-5)


def by_hand(model: Any, context: str, continuation: str) -> float:
    """The likelihood after the memory was zeroed before the context's last token."""
    ids = torch.tensor([[*(context + continuation).encode()]])
    start, cache = len(context) - 1, InfiniCache(model.config)
    with torch.no_grad():
        model(ids[:, :start], use_cache=True, **{CACHE_ARGUMENT: cache})
        for layer in cache.layers:
            for name in ("memory", "normalizer", "pending_memory", "pending_normalizer"):
                getattr(layer.state, name).zero_()
        logits = model(ids[:, start:-1], use_cache=True, **{CACHE_ARGUMENT: cache}).logits[0]
    return -F.cross_entropy(logits, ids[0, start + 1 :], reduction="sum").item()


def test_a_memory_reset_is_felt_in_what_is_generated() -> None:
    model = make()
    keeping, resetting = lm(model), lm(model, memory_reset=True)
    long, short = DOCUMENT * 2, "short"
    assert generated(keeping, long, max_gen_toks=40) != generated(resetting, long, max_gen_toks=40)
    assert generated(keeping, short, max_gen_toks=5) == generated(resetting, short, max_gen_toks=5)


def test_a_memory_reset_needs_a_memory_and_a_question() -> None:
    with pytest.raises(ValueError, match="which has no memory to reset"):
        lm(make("full"), memory_reset=True)
    with pytest.raises(ValueError, match="no question to reset it before; leave it out"):
        rolling(lm(memory_reset=True), "text")


# --- rolling likelihood ----------------------------------------------------------------------------------


def test_a_texts_own_likelihood_is_that_of_one_forward_and_of_infini_perplexity(tmp_path: Any) -> None:
    model, texts = make(), [DOCUMENT, DOCUMENT[:20], DOCUMENT * 3]
    found = rolling(lm(model, batch_size=2), *texts)
    for number, (text, likelihood) in enumerate(zip(texts, found, strict=True)):
        assert likelihood == pytest.approx(whole_forward(model, [*text.encode()], len(text) - 1)[0], rel=1e-4)
        (tmp_path / f"{number}.txt").write_text(text)
    report = document_perplexity(model, BYTES, Documents(f"{tmp_path}/*.txt"))
    nats = {document.number: document.loss().nats for document in report.documents}
    assert [-each for each in found] == pytest.approx([nats[number] for number in range(3)], rel=1e-5)


@pytest.mark.parametrize(("bos", "first"), [(True, 256), (False, 257)])
def test_a_texts_first_token_is_predicted_from_bos_or_else_from_eos(bos: bool, first: int) -> None:
    model, tokenizer = with_two_more_ids(), with_special_tokens(bos=bos, added=False)
    reader = lm(model, tokenizer=tokenizer)
    expected = whole_forward(model, [first, *b"a text"], 6)[0]
    assert rolling(reader, "a text")[0] == pytest.approx(expected, rel=1e-4)
    assert asked(reader, [("", "a text")])[0][0] == pytest.approx(expected, rel=1e-4)


def test_a_bos_token_that_the_tokenizer_adds_stands_there_once() -> None:
    model, tokenizer = with_two_more_ids(), with_special_tokens(bos=True, added=True)
    reader = lm(model, tokenizer=tokenizer)
    expected = whole_forward(model, [256, *b"a text"], 6)[0]
    assert rolling(reader, "a text", "<s>a text") == pytest.approx([expected] * 2, rel=1e-4)
    last = whole_forward(model, [256, *b"a text"], 3)[0]
    after = [likelihood for likelihood, _ in asked(reader, [("a t", "ext"), ("<s>a t", "ext")])]
    assert after == pytest.approx([last] * 2, rel=1e-4)


@pytest.mark.parametrize("special", [False, True])
def test_a_long_text_is_tokenised_in_blocks_and_as_a_whole_would_be(
    special: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=ids
    )
    text = "".join(f"{number} roses, and as many names\n" for number in range(2000))
    whole = tokenizer.encode(text, add_special_tokens=special)
    encode = type(tokenizer).encode
    encoded: list[str] = []

    def spy(self: Any, given: str, **options: Any) -> list[int]:
        encoded.append(given)
        return encode(self, given, **options)

    monkeypatch.setattr(type(tokenizer), "encode", spy)
    assert lm(tokenizer=tokenizer).tok_encode(text, add_special_tokens=special) == whole
    assert text not in encoded


def test_without_special_tokens_a_texts_first_token_is_not_predicted() -> None:
    model = make()
    [(likelihood, _)] = asked(lm(model), [("", "a text")])
    assert likelihood == pytest.approx(whole_forward(model, [*b"a text"], 5)[0], rel=1e-4)
    assert rolling(lm(model), "a", "") == [0.0, 0.0]


# --- generation ------------------------------------------------------------------------------------------


def test_generation_goes_on_as_whole_forwards_do() -> None:
    model = make()
    texts = [DOCUMENT + "What?", DOCUMENT + "Who?", "Short"]
    for text, made in zip(texts, generated(lm(model), *texts), strict=True):
        ids = [*text.encode()]
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert made == BYTES.decode(ids[-12:]).split("\n\n")[0]


def test_generation_ends_before_the_first_stop() -> None:
    model = make()
    [whole] = generated(lm(model), DOCUMENT, max_gen_toks=30, until=[])
    stop = whole[9:11]
    made = tokens_read(model, lambda: generated(lm(model), DOCUMENT, max_gen_toks=30, until=[stop]))
    assert generated(lm(model), DOCUMENT, max_gen_toks=30, until=stop) == [whole.split(stop)[0]]
    assert made < len(DOCUMENT) + 14


def test_generation_samples_where_it_is_told_to_and_else_does_not() -> None:
    reader = lm()
    torch.manual_seed(1)
    drawn = {generated(reader, "Once", do_sample=True, temperature=1.5)[0] for _ in range(3)}
    taken = {generated(reader, "Once", temperature=0.0)[0] for _ in range(3)}
    assert len(drawn) == 3
    assert len(taken) == 1


# --- lm-eval itself ------------------------------------------------------------------------------------


@pytest.mark.parametrize("added", [False, True])
def test_short_requests_get_the_figures_of_lm_evals_own_class(added: bool) -> None:
    from lm_eval.models.huggingface import HFLM

    torch.manual_seed(0)
    base = LlamaForCausalLM(LlamaConfig(**SIZES | {"vocab_size": 258})).eval()
    tokenizer = with_special_tokens(bos=True, added=added)
    tokenizer.pad_token = "</s>"
    theirs = HFLM(pretrained=base, tokenizer=tokenizer, backend="causal", device="cpu")
    ours = lm(retrofit(base, segment_length=2048), tokenizer=tokenizer, batch_size=3)
    for one, other in zip(asked(ours), asked(theirs), strict=True):
        assert one == (pytest.approx(other[0], rel=1e-4), other[1])
    assert generated(ours, "Once", DOCUMENT) == generated(theirs, "Once", DOCUMENT)
    if not added:  # else theirs predicts one BOS token from another
        assert rolling(ours, DOCUMENT, "x") == pytest.approx(rolling(theirs, DOCUMENT, "x"), rel=1e-4)


# --- settings --------------------------------------------------------------------------------------------


def test_lm_eval_makes_the_model_from_its_arguments(base_folder: Any) -> None:
    from lm_eval.api.registry import get_model

    given = f"pretrained={base_folder},segment_length=8,update_rule=delta,dtype=float32"
    made = get_model("infini").create_from_arg_string(given, {"batch_size": "2", "device": "cpu"})
    assert (made.model.config.segment_length, made.model.config.update_rule) == (8, "delta")
    assert (made.batch_size, made.model.dtype) == (2, torch.float32)
    assert math.isfinite(rolling(made, "text")[0])


def test_chat_templates_are_the_tokenizers() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[me]{% endif %}"
    )
    tokenizer.name_or_path = "some/bytes"
    reader = lm(tokenizer=tokenizer)
    history = [{"role": "user", "content": "Who?"}]
    assert reader.apply_chat_template(history) == "[user]Who?[me]"
    assert reader.chat_template(True) == tokenizer.chat_template
    assert reader.tokenizer_name == "some__bytes"


@pytest.mark.parametrize("wrong", [0, "auto", -1, "0"])
def test_a_batch_size_that_is_no_number_of_rows_is_refused(wrong: Any) -> None:
    with pytest.raises(ValueError, match=r"batch_size is .* give a whole number of at least 1"):
        lm(batch_size=wrong)


def test_a_model_in_memory_needs_its_tokenizer_and_evaluation_mode() -> None:
    with pytest.raises(ValueError, match="given without its tokenizer"):
        InfiniLM(make())
    with pytest.raises(ValueError, match=r"call model\.eval"):
        lm(make().train())
