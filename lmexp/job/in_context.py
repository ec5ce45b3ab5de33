"""In-context use of a checkpoint: questions after solved examples, answered by likelihood or by generation.

GPT-3's way (Brown et al. 2020, sections 2 and 2.4). A prompt is the instruction, K shots and the question, with the
separator in between. Of given choices, the likeliest continuation is the model's answer; without choices it writes one.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from rich.table import Table

from lmexp.contracts import Family, UserError
from lmexp.decoding.generate import Sampling, generate
from lmexp.decoding.score import Pair, log_likelihoods
from lmexp.job.build import accelerator_of, precision_of
from lmexp.job.check import check_out
from lmexp.job.plan import Plan
from lmexp.job.questions import FIELDS, Question, draw_shots, read_questions
from lmexp.job.restore import Restored, restore
from lmexp.metric.answers import Score, f1, interval, normalized
from lmexp.objective.prefix_lm import PrefixLM
from lmexp.run.directory import write_json
from lmexp.run.terminal import Terminal
from lmexp.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class InContext:
    """What is asked, and how; the keys of `job`."""

    questions: str
    """A file with a row of JSON on each line; see `read_questions`."""

    examples: str | None = None
    """A file of such rows that shots are drawn from; None: `questions`."""

    shots: int = 0
    """Solved examples before each question; at least 0."""

    score: str = "likelihood"
    """`likelihood` of each choice, or `generation` of the answer."""

    template: str = "{question} {answer}"
    """How a question and its answer become text; with `{context}` where the rows have one."""

    instruction: str | None = None
    """Text before the shots."""

    separator: str = "\n\n"
    """Between instruction, shots and question; a written answer ends there."""

    stop: str = "\n"
    """A written answer ends there too."""

    unconditional: str | None = "Answer:"
    """Choices are scored given this, too; None: they are not."""

    batch_size: int = 16
    """Texts scored or continued at once; at least 1."""

    rows: bool = False
    """Whether `out` gets what came of each row."""

    def __post_init__(self) -> None:
        for key, least in (("shots", 0), ("batch_size", 1)):
            value = getattr(self, key)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"job.{key}={value}; expected a whole number of at least {least}.")
        if self.score not in ("likelihood", "generation"):
            raise UserError(f"job.score={self.score}; expected likelihood or generation.")
        if not isinstance(self.rows, bool):
            raise UserError(f"job.rows={self.rows}; expected true or false.")
        for key in ("template", "instruction", "separator", "stop", "unconditional"):
            value = getattr(self, key)
            if value is None and key in ("instruction", "unconditional"):
                continue
            if not isinstance(value, str) or (not value and key in ("separator", "stop")):
                raise UserError(f"job.{key}={value}; expected text; in quotes, if it is a number or has signs in it.")
            # a shell has no easy way to write these
            object.__setattr__(self, key, value.replace("\\n", "\n").replace("\\t", "\t"))
        try:
            fields = [(name, how, what) for _, name, how, what in string.Formatter().parse(self.template)]
        except ValueError:
            fields = [("", "", None)]
        names = [name for name, _, _ in fields if name is not None]
        if (
            any(name not in FIELDS for name in names)
            or any(how or what for _, how, what in fields)
            or [names.count("question"), names.count("answer"), names[-1:]] != [1, 1, ["answer"]]
        ):
            raise UserError(
                f"job.template={self.template!r}; expected {{question}} once and {{answer}} once, after it and after "
                "{context} if there is one; other braces are doubled."
            )

    @property
    def names_context(self) -> bool:
        """Whether the template has a place for a context."""
        return "{context}" in self.template


def in_context(plan: Plan, settings: InContext) -> float:
    """Print the scores, write them to `out` if it is given; returns the accuracy, or the exact match."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    check_out(plan.config.out)
    if settings.rows and plan.config.out is None:
        raise UserError("job.rows=true: the rows are written to a file; name it, out=FILE.json.")
    questions = read_questions(settings.questions, "job.questions", settings.names_context)
    examples = questions
    if settings.examples is not None:
        examples = read_questions(settings.examples, "job.examples", settings.names_context)
    by_likelihood = settings.score == "likelihood"
    for question in questions:
        if by_likelihood and not question.choices:
            raise UserError(
                f"job.questions={settings.questions}, line {question.line}: there are no choices; give the row "
                '"choices" and the index of the right one as "answer", or set job.score=generation.'
            )
    restored = restore(plan, world_size)
    shots = [draw_shots(examples, q, settings.shots, plan.config.seed, row) for row, q in enumerate(questions)]
    asked = [
        Asked(row, question, tuple(examples[i] for i in drawn), tuple(drawn))
        for row, (question, drawn) in enumerate(zip(questions, shots, strict=True))
    ]
    layout = layout_of(restored, settings)
    with _on_device(restored):
        if by_likelihood:
            mine = score_choices(restored, settings, layout, asked[rank::world_size])
        else:
            sampling = sampling_of(plan, restored.parts.sampling)
            size = settings.batch_size
            batches = [asked[first : first + size] for first in range(0, len(asked), size)]
            mine = write_answers(restored, settings, layout, sampling, batches[rank::world_size])
    results = sorted(_gathered(mine, world_size), key=lambda result: result["row"])
    measured = measure_choices(results) if by_likelihood else measure_answers(results)
    counts: dict[str, Any] = {"chance": chance(questions)} if by_likelihood else {}
    counts |= {
        "questions": len(results),
        "shots": settings.shots,
        "cut": sum(result["cut"] for result in results),
        "split_inside": sum(result.get("split_inside", False) for result in results),
        "unknown": sum(result["unknown"] for result in results),
        "steps": restored.step,
    }
    if rank == 0:
        _tell(Terminal(), restored, settings, measured, counts)
        if plan.config.out is not None:
            content: dict[str, Any] = {}
            for name, score in measured.items():
                content |= {name: score.mean, f"{name}/low": score.low, f"{name}/high": score.high}
            rows = {"rows": results} if settings.rows else {}
            write_json(Path(plan.config.out), content | counts | {"score": settings.score} | rows)
            Terminal().print(f"Written to {plan.config.out}.")
    return next(iter(measured.values())).mean


# ---- prompts


class Asked(NamedTuple):
    """A question and its shots."""

    row: int
    question: Question
    shots: tuple[Question, ...]
    drawn: tuple[int, ...]
    """Which of the examples the shots are."""


def prompt_text(settings: InContext, question: Question, shots: Sequence[Question]) -> tuple[str, str]:
    """What stands before the answer, and the spaces that the template has just before it.

    The spaces go with the answer: subword tokenizers spell a word together with the space before it.
    """
    template = settings.template
    parts = [] if settings.instruction is None else [settings.instruction]
    parts += [template.format(question=s.question, context=s.context, answer=s.answers[0]) for s in shots]
    head = ""
    for literal, name, _, _ in string.Formatter().parse(template):
        head += literal
        if name == "answer":
            break
        head += "" if name is None else getattr(question, name)
    parts.append(head)
    text = settings.separator.join(parts)
    prompt = text.rstrip(" ")
    return prompt, text[len(prompt) :]


# ---- tokens


class Split(NamedTuple):
    """A prompt and its continuations as tokens."""

    prompt: tuple[int, ...]
    continuations: list[tuple[int, ...]]
    inside: bool
    """Whether a token holds the end of the prompt and the start of a continuation: it is scored whole."""


@dataclass(frozen=True)
class Layout:
    """How texts become tokens for a model."""

    tokenizer: Tokenizer
    family: Family
    max_length: int

    start: tuple[int, ...]
    """Before a prompt: a document begins after the end of another."""

    end: tuple[int, ...]
    """After the prompt of an encoder-decoder, and after the whole text of an encoder, which read texts that end."""

    def split(self, prompt: str, continuations: Sequence[str]) -> Split:
        """An encoder-decoder gets them apart. Else each pair is encoded as one text, as the model knows it, and all
        are split where the tokens of the prompt alone, and of one pair and another, stop being the same."""
        if self.family == "encoder_decoder":
            first, *others = map(_ids, self.tokenizer.encode([prompt, *continuations]))
            return Split((*self.start, *first, *self.end), others, False)
        alone, *wholes = map(_ids, self.tokenizer.encode([prompt, *(prompt + c for c in continuations)]))
        common = min(_common(alone, whole) for whole in wholes)
        return Split((*self.start, *alone[:common]), [whole[common:] for whole in wholes], common < len(alone))

    def excess(self, split: Split) -> int:
        """How many tokens the prompt is too long for scoring; 0 or less if it fits."""
        if self.family == "encoder_decoder":
            return len(split.prompt) - self.max_length
        longest = max(len(continuation) for continuation in split.continuations)
        # a decoder does not read the last token
        longest += -1 if self.family == "decoder" else len(self.end)
        return len(split.prompt) + longest - self.max_length


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """How many first tokens are the same."""
    different = (place for place, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
    return next(different, min(len(a), len(b)))


def _ids(encoded: np.ndarray) -> tuple[int, ...]:
    return tuple(encoded.tolist())


def layout_of(restored: Restored, settings: InContext) -> Layout:
    """The layout for a checkpoint's model; `UserError` for what the model cannot do."""
    tokenizer, model = restored.tokenizer, restored.task.model
    family: Family = model.family  # type: ignore[assignment]
    if restored.classes is not None:
        raise UserError(f"ckpt={restored.path} holds a classifier, which scores no words; leave job.questions out.")
    name = f"ckpt={restored.path} holds an encoder ({type(model).__name__})"
    if family == "encoder" and settings.score == "generation":
        raise UserError(
            f"{name}, which reads and does not write; set job.score=likelihood, or give the checkpoint of a decoder or "
            "an encoder-decoder."
        )
    if family == "encoder" and "mask" not in tokenizer.roles:
        raise UserError(f"{name} whose tokenizer has no mask token, which scoring needs; train it with masked_lm.")
    eos = (tokenizer.eos_id,)
    start = {"decoder": eos, "encoder": (tokenizer.roles.get("cls", tokenizer.eos_id),), "encoder_decoder": ()}[family]
    return Layout(tokenizer, family, int(model.max_length), start, () if family == "decoder" else eos)  # type: ignore[arg-type]


# ---- answering


def score_choices(
    restored: Restored, settings: InContext, layout: Layout, asked: Sequence[Asked]
) -> list[dict[str, Any]]:
    """The log-likelihood of each choice, in nats, given the prompt and given `unconditional`."""
    tokenizer = layout.tokenizer
    results: list[dict[str, Any]] = []
    given: list[list[Pair]] = []
    alone: list[list[Pair]] = []
    for row, question, shots, drawn in asked:
        for used in range(len(shots) + 1):  # the oldest go first
            prompt, spaces = prompt_text(settings, question, shots[used:])
            choices = [c if layout.family == "encoder_decoder" else spaces + c for c in question.choices]
            split = layout.split(prompt, choices)
            if (excess := layout.excess(split)) <= 0:
                break
        longest = max(len(continuation) for continuation in split.continuations)
        if excess >= len(split.prompt) or longest > layout.max_length:
            raise UserError(
                f"job.questions={settings.questions}, line {question.line}: a choice is {longest:,} tokens, and the "
                f"model reads {layout.max_length:,} in all; shorten it."
            )
        pairs = [(split.prompt[max(0, excess) :], continuation) for continuation in split.continuations]
        given.append(pairs)
        if settings.unconditional is not None:
            apart = layout.split(settings.unconditional.rstrip(" "), choices)
            prompt_alone = apart.prompt[max(0, layout.excess(apart)) :]
            alone.append([(prompt_alone, continuation) for continuation in apart.continuations])
        results.append(
            {
                "row": row,
                "question": question.question,
                "choices": list(question.choices),
                "answer": question.right,
                "shots": list(drawn[used:]),
                "bytes": [len(choice.encode()) for choice in question.choices],
                "tokens": [len(continuation) for continuation in split.continuations],
                "cut": used > 0 or excess > 0,
                "split_inside": split.inside,
                "unknown": tokenizer.unk_id is not None and any(tokenizer.unk_id in p + c for p, c in pairs),
            }
        )
        if not all(split.continuations):
            raise UserError(
                f"job.questions={settings.questions}, line {question.line}: the tokenizer leaves nothing of one of the "
                f"choices {list(question.choices)}; choices differ by more than space."
            )
    flat = [pair for pairs in given + alone for pair in pairs]
    scores = iter(
        log_likelihoods(
            restored.task.model,
            flat,
            settings.batch_size,
            prefix_lm=isinstance(restored.parts.objective, PrefixLM),
            mask_id=tokenizer.roles.get("mask"),
            end=layout.end if layout.family == "encoder" else (),
        )
    )
    for name, all_pairs in (("log_likelihood", given), ("unconditional", alone)):
        for result, pairs in zip(results, all_pairs, strict=False):
            result[name] = [next(scores) for _ in pairs]
    return results


class _AllStopped(Exception):
    """Every row of a batch has come to the end of its answer."""


def write_answers(
    restored: Restored, settings: InContext, layout: Layout, sampling: Sampling, batches: Sequence[Sequence[Asked]]
) -> list[dict[str, Any]]:
    """What the model writes after each prompt, up to `stop` or the separator, and how it compares."""
    tokenizer = layout.tokenizer
    stops = (settings.stop, settings.separator)
    # a decoder writes into the context that its prompt stands in; the prompt has at least half of it
    written = 0 if layout.family == "encoder_decoder" else min(sampling.max_new_tokens, layout.max_length // 2)
    room = layout.max_length - written
    results: list[dict[str, Any]] = []
    for batch in batches:
        prompts = []
        for row, question, shots, drawn in batch:
            for used in range(len(shots) + 1):
                (ids,) = tokenizer.encode([prompt_text(settings, question, shots[used:])[0]])
                prompt = (*layout.start, *_ids(ids), *layout.end)
                if len(prompt) <= room:
                    break
            prompts.append(prompt[max(0, len(prompt) - room) :])
            results.append(
                {
                    "row": row,
                    "question": question.question,
                    "answers": list(question.answers),
                    "shots": list(drawn[used:]),
                    "cut": used > 0 or len(prompt) > room,
                    "unknown": tokenizer.unk_id is not None and tokenizer.unk_id in prompt,
                }
            )
        texts = _written(restored, prompts, sampling, stops, [one.row for one in batch])
        for result, text in zip(results[-len(batch) :], texts, strict=True):
            answers = result["answers"]
            result["text"] = text
            result["exact_match"] = max(float(normalized(text) == normalized(answer)) for answer in answers)
            result["f1"] = max(f1(text, answer) for answer in answers)
    return results


def _written(
    restored: Restored, prompts: list[tuple[int, ...]], sampling: Sampling, stops: tuple[str, ...], numbers: list[int]
) -> list[str]:
    """The answer to each prompt; generation ends when all have come to a stop."""
    tokenizer = restored.tokenizer
    tokens: list[list[int]] = [[] for _ in prompts]
    ended = [False] * len(prompts)

    def text_of(row: int) -> str:
        return tokenizer.decode(tokens[row], skip_special=True)

    def hear(row: int, token: int) -> None:
        if not ended[row]:
            tokens[row].append(token)
            ended[row] = token == tokenizer.eos_id or any(stop in text_of(row) for stop in stops)
        if all(ended):
            raise _AllStopped

    with suppress(_AllStopped):
        generate(restored.task.model, prompts, sampling, tokenizer.eos_id, tokenizer.vocab_size, hear, numbers)
    texts = []
    for row in range(len(prompts)):
        text = text_of(row)
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        texts.append(text[: min(places, default=len(text))].strip())
    return texts


def sampling_of(plan: Plan, sampling: Sampling) -> Sampling:
    """Greedy, unless the command line says how to draw."""
    drawing = {"decoding", "decoding.temperature", "decoding.top_k", "decoding.top_p", "decoding.min_p"}
    if any(override.partition("=")[0] in drawing for override in plan.overrides):
        return sampling
    if not isinstance(sampling, Sampling):
        return Sampling(temperature=0.0, max_new_tokens=sampling.max_new_tokens)
    return replace(sampling, temperature=0.0, top_k=None, top_p=None, min_p=None)


# ---- measures


def measure_choices(results: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """Share of the rows whose likeliest choice is the right one; the first of equally likely ones counts.

    `accuracy`: by log P(choice | prompt); `accuracy_per_byte`: by that over the choice's UTF-8 bytes;
    `accuracy_unconditional`: by P(choice | prompt) / P(choice | unconditional). Adds `chosen` to the rows.
    """
    measured: dict[str, Score] = {}
    names = ["accuracy", "accuracy_per_byte", "accuracy_unconditional"]
    for name in names if "unconditional" in results[0] else names[:-1]:
        hits = []
        for result in results:
            scores = result["log_likelihood"]
            if name == "accuracy_per_byte":
                scores = [score / size for score, size in zip(scores, result["bytes"], strict=True)]
            elif name == "accuracy_unconditional":
                scores = [score - other for score, other in zip(scores, result["unconditional"], strict=True)]
            chosen = scores.index(max(scores))
            result.setdefault("chosen", {})[name] = chosen
            hits.append(float(chosen == result["answer"]))
        measured[name] = interval(hits)
    return measured


def chance(questions: Sequence[Question]) -> float:
    """The accuracy of guessing: the mean of 1 / choices."""
    return fmean(1 / len(question.choices) for question in questions)


def measure_answers(results: Sequence[dict[str, Any]]) -> dict[str, Score]:
    """Mean exact match and F1 (Rajpurkar et al. 2016, section 6.1), each row's best over its right answers."""
    return {name: interval([result[name] for result in results]) for name in ("exact_match", "f1")}


# ---- devices and the terminal


@contextmanager
def _on_device(restored: Restored) -> Iterator[None]:
    """The model on this process's device and in the precision asked for."""
    kind = accelerator_of(restored.cfg)
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    restored.task.model.to(device)
    half = precision_of(restored.cfg) != "32-true"
    context = torch.autocast(device.type, torch.bfloat16) if half else nullcontext()
    # eager: nearly every batch has another shape, which a compiled model would be compiled for
    with context, torch.compiler.set_stance("force_eager"):
        yield


def _gathered(mine: list[dict[str, Any]], world_size: int) -> list[dict[str, Any]]:
    """What all processes found; they need no connection before that."""
    if world_size == 1:
        return mine
    dist.init_process_group("gloo", timeout=timedelta(days=1))
    parts: list[Any] = [None] * world_size
    dist.all_gather_object(parts, mine)
    dist.destroy_process_group()
    return [result for part in parts for result in part]


def _tell(
    terminal: Terminal, restored: Restored, settings: InContext, measured: dict[str, Score], counts: dict[str, Any]
) -> None:
    asked = f"{counts['questions']:,} questions, {counts['shots']} shots, by {settings.score}"
    terminal.print(f"{restored.path}, after step {restored.step}: {asked}")
    table = Table()
    for name in ("metric", "value", "95 % interval"):
        table.add_column(name, justify="left" if name == "metric" else "right")
    for name, score in measured.items():
        table.add_row(name, f"{score.mean:.4f}", f"{score.low:.4f} to {score.high:.4f}")
    if "chance" in counts:
        table.add_row("chance", f"{counts['chance']:.4f}", "")
    terminal.print(table)
    notes = {
        "cut": "Prompts that were too long and were cut from the left, oldest shots first",
        "split_inside": "Questions with a token across the end of the prompt, which was scored with every choice",
        "unknown": "Questions with text that the tokenizer has no tokens for",
    }
    for key, note in notes.items():
        if counts[key]:
            terminal.print(f"{note}: {counts[key]:,}.")
