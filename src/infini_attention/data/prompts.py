"""How a question is put to a model: by its chat template, or plainly."""

from transformers import PreTrainedTokenizerBase

PLAIN = "\n\nQuestion: {question}\nAnswer:"


def question_turn(tokenizer: PreTrainedTokenizerBase, question: str, *, first: bool) -> str:
    """`question` as the next turn of a conversation, up to where the answer begins.

    With a chat template that is its form of a user's turn; in a text that has begun already (not `first`),
    without what the template puts before a conversation, such as a default system prompt. Without one it is
    "Question: ... Answer:".
    """
    if not has_chat_template(tokenizer):
        return PLAIN.format(question=question)
    turn = {"role": "user", "content": question}
    if first:
        return _rendered(tokenizer, [turn], True)
    before = [{"role": "user", "content": "."}, {"role": "assistant", "content": "."}]
    start, whole = _rendered(tokenizer, before, False), _rendered(tokenizer, [*before, turn], True)
    return whole.removeprefix(start) if whole.startswith(start) else _rendered(tokenizer, [turn], True)


def has_chat_template(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its model has a form for turns; one without may know nothing of questions."""
    return bool(getattr(tokenizer, "chat_template", None))


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict[str, str]], answering: bool) -> str:
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=answering)
    assert isinstance(text, str)
    return text
