"""Questions with their answers, row by row of a file, and which of them stand solved before another."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lmexp.contracts import UserError
from lmexp.data.order import keys, permute

FIELDS = ("question", "context", "answer")
"""What a template can have places for."""

_ORDER_OF_SHOTS = 2
"""Keeps these random numbers apart from those of the order of training (`lmexp/data/order.py`)."""


@dataclass(frozen=True)
class Question:
    """A row of a file."""

    question: str
    context: str | None
    choices: tuple[str, ...]
    """Empty where the answer is text."""

    right: int | None
    """The index of the right choice."""

    answers: tuple[str, ...]
    """Right answers; the first stands in shots."""

    line: int
    """Of the file, from 1."""


def read_questions(path: str, key: str, with_context: bool) -> list[Question]:
    """The rows of a JSONL file, blank lines left out.

    {"question": text, "choices": [texts], "answer": index} or {"question": text, "answer": text or [texts]}, and
    "context": text, exactly where `with_context`. `key` is what the user named the file by. Raises `UserError` that
    names the line for anything else.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{key}={path} cannot be read: {error}. Give a file of JSON rows in UTF-8.") from error
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            found.append(_question(json.loads(line), number, with_context))
        except json.JSONDecodeError as error:
            raise UserError(f"{key}={path}, line {number} is no JSON: {error}. Write a row on each line.") from error
        except UserError as error:
            raise UserError(f"{key}={path}, line {number}: {error}") from None
    if not found:
        raise UserError(f"{key}={path} has no rows; expected one of JSON on each line.")
    return found


def _question(row: Any, line: int, with_context: bool) -> Question:
    """A row, checked; the errors are for `read_questions` to put the place before."""
    if not isinstance(row, dict):
        raise UserError('expected an object such as {"question": "2 + 2 =", "answer": "4"}.')
    needed, known = {"question", "answer"}, {*FIELDS, "choices"}
    if not needed <= row.keys() <= known:
        missing, other = sorted(needed - row.keys()), sorted(row.keys() - known)
        what = [f"no {' and no '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(other)}"] * bool(other)
        raise UserError(f"{'; '.join(what)}. The keys are question, answer, and where needed choices and context.")
    for key in ("question", "context"):
        if key in row and not isinstance(row[key], str):
            raise UserError(f"{key} is {row[key]!r}; expected text.")
    if ("context" in row) != with_context:
        if with_context:
            raise UserError('no context, and job.template has {context}; give the row one, or "".')
        raise UserError("it has a context, and job.template no place for it; put {context} into job.template.")
    answer, choices = row["answer"], row.get("choices")
    if choices is None:
        answers = answer if isinstance(answer, list) else [answer]
        if not answers or not all(isinstance(a, str) and a.strip() for a in answers):
            raise UserError(f"answer is {answer!r}; expected text or a list of texts, or the index of one of choices.")
        return Question(row["question"], row.get("context"), (), None, tuple(answers), line)
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c.strip() for c in choices):
        raise UserError(f"choices is {choices!r}; expected a list of at least two texts.")
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise UserError(f"answer is {answer!r}; expected the index of the right choice, 0 to {len(choices) - 1}.")
    return Question(row["question"], row.get("context"), tuple(choices), answer, (choices[answer],), line)


def draw_shots(examples: Sequence[Question], question: Question, count: int, seed: int, row: int) -> list[int]:
    """Which `count` of the examples stand before the question of a row, in order: a pure function of (seed, row).

    Never one that asks the same; so no row is drawn for itself. Raises `UserError` if there are not enough.
    """
    n, first = len(examples), 0
    drawn: list[int] = []
    round_keys = keys(seed, row, _ORDER_OF_SHOTS)
    while len(drawn) < count and first < n:
        end = min(n, first + 2 * count)
        for i in permute(np.arange(first, end), n, round_keys).tolist():
            other = examples[i]
            if (other.question, other.context) != (question.question, question.context) and len(drawn) < count:
                drawn.append(i)
        first = end
    if len(drawn) < count:
        raise UserError(
            f"job.shots={count}, and for the question of line {question.line} there are {len(drawn)} examples that ask "
            "something else; lower job.shots or give more in job.examples."
        )
    return drawn
