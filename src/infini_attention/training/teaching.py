"""A model that teaches: what a base says within its own window, while another learns to read on past it."""

import torch
from torch import Tensor

from infini_attention.models import load_model
from infini_attention.models.loss import Teaching, logits_of
from infini_attention.training.arguments import InfiniTrainingArguments


class Teacher:
    """The frozen model that `args.teacher` names; reads the first tokens of rows, and says what comes next.

    In bfloat16 where the training is: autocast is around the model that learns, not around this one.

    Args:
        args: of the training: the teacher, its `teacher_tokens` and its `teacher_weight`.
        vocab_size: of the model that learns.

    Raises:
        ValueError: another vocabulary, or more tokens than the teacher was made for.
    """

    def __init__(self, args: InfiniTrainingArguments, vocab_size: int) -> None:
        assert args.teacher is not None
        dtype = torch.bfloat16 if args.bf16 else torch.float32
        model = load_model(args.teacher, dtype=dtype).requires_grad_(False)
        known, most = model.config.vocab_size, model.config.max_position_embeddings
        if known != vocab_size:
            raise ValueError(
                f"teacher {args.teacher} knows {known} tokens, and the model {vocab_size}; choose one with "
                "the same tokenizer, usually the base"
            )
        self.tokens = most if args.teacher_tokens is None else args.teacher_tokens
        if self.tokens > most:
            raise ValueError(
                f"teacher_tokens is {self.tokens}, and teacher {args.teacher} reads {most} at most; give no "
                "more, or leave it out for all that it reads"
            )
        self._model, self._weight = model.to(args.device), args.teacher_weight

    @torch.no_grad()
    def teach(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Teaching:
        """What it says to rows, (batch, length) int64; `attention_mask` likewise, 0 for padding."""
        first = slice(self.tokens)
        mask = None if attention_mask is None else attention_mask[:, first]
        read = self._model.model(input_ids[:, first], attention_mask=mask, use_cache=False)
        return Teaching(read.last_hidden_state, self._logits_of, self._weight)

    def _logits_of(self, hidden_states: Tensor) -> Tensor:
        with torch.no_grad():
            return logits_of(self._model, hidden_states)
