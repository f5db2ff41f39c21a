"""Which value belongs to which name? Learnt with a short convolution; without one, for long not at all.

    python benchmarks/name_lookup.py

A row tells a few facts in the words of `infini passkey` with several keys, every word a token: "The pass key
of NAME is DIGITS. Remember it. DIGITS is the pass key of NAME.", and then asks for some. A digit's place
knows no name by itself, and neither does the place that asks. Where facts and questions are in one segment,
attention could look them up; where they are in two, the memory alone can. An answer's first digit needs the
name; the others also follow from the digits before them.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from common import environment
from jsonargparse import auto_cli
from rich.console import Console
from rich.table import Table
from torch import Tensor

from infini_attention.training.models import make_model
from infini_attention.training.parameters import parameter_groups
from infini_attention.training.recipe import ModelRecipe

DIGITS, WORDS, NAMES = 10, 10, 32  # how many tokens of each kind, in this order
THE, PASS, KEY, OF, IS, SPACE, STOP, WHAT, MARK, REMEMBER = range(DIGITS, DIGITS + WORDS)
NAME, DIGIT = -1, -2  # to be filled in
KEYED = (THE, PASS, KEY, OF, NAME)
FACT = (*KEYED, IS, SPACE, *[DIGIT] * 4, STOP, REMEMBER, SPACE, *[DIGIT] * 4, IS, *KEYED, STOP)
QUESTION = (WHAT, IS, *KEYED, MARK, *KEYED, IS, SPACE, *[DIGIT] * 4, STOP)
COLUMNS = (
    "looked up by",
    "short_convolution",
    "steps",
    "loss",
    "first digits",
    "other digits",
    "learnt at step",
)
EVERY, LEARNT = 50, 0.95  # steps, and part of the first digits


@dataclass
class Arm:
    """One model, and how far it has come."""

    place: str
    width: int
    learnt: int | None = None
    loss: float = 0.0
    first: float = 0.0
    others: float = 0.0


def main(
    widths: tuple[int, ...] = (0, 4), facts: int = 4, steps: int = 800, rows: int = 32, seed: int = 0
) -> None:
    """Train a model for every width, within a segment and through the memory."""
    torch.set_num_threads(1)
    arms = [Arm(place, width) for place in ("attention", "memory") for width in widths]
    for arm in arms:
        train(arm, facts, steps, rows, seed)
    table = Table(title=f"{facts} facts by name, {seed=}", title_justify="left", box=None)
    for name in COLUMNS:
        table.add_column(name, justify="right")
    for arm in arms:
        figures = (f"{figure:.2f}" for figure in (arm.loss, arm.first, arm.others))
        table.add_row(arm.place, str(arm.width), str(steps), *figures, str(arm.learnt or "not"))
    Console(width=110).print(table)
    results = [vars(arm) for arm in arms]
    settings = {"facts": facts, "steps": steps, "rows": rows, "seed": seed}
    print(json.dumps({"benchmark": "name_lookup", "arms": results} | settings | environment("cpu")))


def train(arm: Arm, facts: int, steps: int, rows: int, seed: int) -> None:
    """Fill in what the arm comes to."""
    torch.manual_seed(seed)
    told, asked = facts * len(FACT), facts * len(QUESTION)
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 2, "head_dim": 32, "tie_word_embeddings": False}
    memory: dict[str, Any] = {"update_rule": "delta", "feature_map": "exp", "gate_init": 0.0}
    segment = {"attention": told + asked, "memory": told}[arm.place]
    recipe = ModelRecipe(sizes=sizes, segment_length=segment, short_convolution=arm.width, **memory)
    model = make_model(recipe, DIGITS + WORDS + NAMES).train()
    groups = parameter_groups(model, learning_rate=2e-3, gate_learning_rate=1e-2, weight_decay=0.01)
    optimizer, seen = torch.optim.AdamW(groups, betas=(0.9, 0.99)), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            rate = group.setdefault("rate", group["lr"])
            group["lr"] = rate * min(1.0, step / 50)
        seen.append(_step(model, optimizer, *batch(rows, facts)))
        if step % EVERY == 0:
            arm.loss, arm.first, arm.others = torch.tensor(seen[-EVERY:]).mean(dim=0).tolist()
            if arm.learnt is None and arm.first > LEARNT:
                arm.learnt = step


def batch(rows: int, facts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, (rows, length); the next ones, -100 where they are not asked for; where answers begin."""
    names = DIGITS + WORDS + torch.rand(rows, NAMES).argsort(dim=1)[:, :facts]
    digits = torch.randint(DIGITS, (rows, facts, 4))
    chosen = torch.randint(facts, (rows, facts))
    asked_names, asked_digits = names.gather(1, chosen), digits.gather(1, chosen[..., None].expand(-1, -1, 4))
    told, questions = _filled(FACT, names, digits), _filled(QUESTION, asked_names, asked_digits)
    answers = torch.full_like(questions, -100)
    places = [place for place, word in enumerate(QUESTION) if word == DIGIT]
    answers[..., places] = questions[..., places]
    first = torch.zeros_like(questions, dtype=torch.bool)
    first[..., places[0]] = True
    ids = torch.cat([told.flatten(1), questions.flatten(1)], dim=1)
    targets = torch.cat([torch.full_like(told, -100).flatten(1), answers.flatten(1)], dim=1)
    firsts = torch.cat([torch.zeros_like(told, dtype=torch.bool).flatten(1), first.flatten(1)], dim=1)
    return ids[:, :-1], targets[:, 1:], firsts[:, 1:]


def _filled(sentence: tuple[int, ...], names: Tensor, digits: Tensor) -> Tensor:
    """The sentence for each name (rows, n) and its digits (rows, n, 4): (rows, n, words)."""
    words = torch.tensor(sentence).expand(*names.shape, -1)
    filled = torch.where(words == NAME, names[..., None], words)
    places = [place for place, word in enumerate(sentence) if word == DIGIT]
    filled[..., places] = digits.repeat(1, 1, len(places) // 4)
    return filled


def _step(
    model: Any, optimizer: Any, ids: Tensor, targets: Tensor, firsts: Tensor
) -> tuple[float, float, float]:
    """Loss, and the parts of first and of other digits that are right, of one batch before its step."""
    hidden, asked = model.base_model(input_ids=ids, use_cache=False).last_hidden_state, targets != -100
    logits = model.logits_of(hidden[asked])
    loss = torch.nn.functional.cross_entropy(logits, targets[asked])
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    right, is_first = logits.argmax(dim=-1) == targets[asked], firsts[asked]
    return loss.item(), right[is_first].float().mean().item(), right[~is_first].float().mean().item()


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
