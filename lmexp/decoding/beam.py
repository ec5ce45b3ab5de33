"""Beam search (Graves 2012, section 2.3; length penalty: Wu et al. 2016, section 7, in the form |Y|^alpha)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from lmexp.contracts import UserError
from lmexp.decoding.steps import Constraints, begun, check_lengths, steps_of, weights_for, without_gradients


@dataclass(frozen=True)
class Beam:
    """How many texts are followed, how they are compared and when it is enough."""

    beams: int = 4
    """Texts that are followed for each prompt."""

    length_penalty: float = 1.0
    """Finished texts are compared by log p / length^penalty: 0 compares log p, which favours short ones, 1 the mean."""

    early_stopping: bool | Literal["never"] = False
    """When a row ends: true, once `beams` texts are finished; false, once the best running text at its present length
    is no better than the worst of these; never, once it could not become so at the greatest length."""

    max_new_tokens: int = 256
    """Tokens of a text at most."""

    min_new_tokens: int = 0
    """The end of a document is not written before so many."""

    no_repeat_ngram: int | None = None
    """No so many tokens in a row are written twice (Paulus et al. 2017, section 2.5), a decoder's prompt counted in;
    null: they may."""

    def __post_init__(self) -> None:
        if not isinstance(self.beams, int) or self.beams < 1:
            raise UserError(f"decoding.beams={self.beams}; expected a whole number of at least 1.")
        if not isinstance(self.length_penalty, (int, float)):
            raise UserError(f"decoding.length_penalty={self.length_penalty}; expected a number.")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise UserError(f"decoding.early_stopping={self.early_stopping}; expected true, false or never.")
        check_lengths(self.max_new_tokens, self.min_new_tokens, self.no_repeat_ngram)


def beam_search(
    model: Any, prompts: Sequence[Sequence[int]], beam: Beam, eos_id: int | None, vocab_size: int
) -> list[list[tuple[float, list[int]]]]:
    """For each prompt the `beams` best texts that it found, the best first: (score, new tokens with the end).

    Every step looks at the 2 * `beams` likeliest next tokens of a row's texts together, so that as many texts go on
    as before however many end; one ends where it is among the `beams` likeliest. Rows that are done leave the batch.
    """
    with weights_for(model, len(prompts) * beam.beams), without_gradients(model):
        return _search(model, prompts, beam, eos_id, vocab_size)


def _search(
    model: Any, prompts: Sequence[Sequence[int]], beam: Beam, eos_id: int | None, vocab_size: int
) -> list[list[tuple[float, list[int]]]]:
    steps = steps_of(model, prompts, beam.max_new_tokens)
    constraints = Constraints(beam.min_new_tokens, beam.no_repeat_ngram)
    before = begun(model, prompts)
    finished: list[list[tuple[float, list[int]]]] = [[] for _ in prompts]
    active = list(range(len(prompts)))
    texts: list[list[list[int]]] = [[[]] for _ in prompts]  # of each active row, one before the first token
    scores = torch.zeros(len(prompts), 1, dtype=torch.float32)  # log p of each; the default dtype may be half
    for written in range(steps.most):
        log_p = steps.logits()[:, :vocab_size].float().log_softmax(-1)
        device = log_p.device
        if constraints.any:
            whole = [[*before[row], *text] for row, own in zip(active, texts, strict=True) for text in own]
            log_p = constraints(log_p, whole, written, eos_id)
        total = log_p.view(len(active), -1, vocab_size).add_(scores.to(device)[..., None]).flatten(1)
        count = min(2 * beam.beams, total.shape[1])
        last = written == steps.most - 1
        going_on: list[int] = []
        next_texts: list[list[list[int]]] = []
        next_scores: list[list[float]] = []
        sources: list[int] = []
        tokens: list[int] = []
        for number, (row, values, at) in enumerate(zip(active, *_top(total, count), strict=True)):
            running: list[tuple[float, int, int]] = []
            ended: list[tuple[float, list[int]]] = []
            for rank, (value, place) in enumerate(zip(values, at, strict=True)):
                source, token = divmod(place, vocab_size)
                if token == eos_id or last:
                    if rank < beam.beams:
                        score = value / (written + 1) ** beam.length_penalty
                        ended.append((score, [*texts[number][source], token]))
                elif len(running) < beam.beams:
                    running.append((value, source, token))
                elif rank >= beam.beams:
                    break
            if ended:
                finished[row] = sorted((*finished[row], *ended), key=lambda found: -found[0])[: beam.beams]
            if last or _is_done(beam, finished[row], running[0][0], written + 1, steps.most):
                continue
            going_on.append(row)
            next_texts.append([[*texts[number][source], token] for _, source, token in running])
            next_scores.append([value for value, _, _ in running])
            sources += [number * len(texts[number]) + source for _, source, _ in running]
            tokens += [token for _, _, token in running]
        if not going_on:
            break
        active, texts, scores = going_on, next_texts, torch.from_numpy(np.array(next_scores, np.float32))
        steps.select(sources)
        steps.append(torch.from_numpy(np.array(tokens, np.int64)).to(device))
    return finished


_CHUNK = 64


def _top(x: Tensor, k: int) -> tuple[list[list[float]], list[list[int]]]:
    """The k largest numbers of each row, falling, and their places. They are in the k chunks with the largest maxima,
    or among the last few numbers, which are no chunk; to look there alone takes a CPU a third to two thirds of it.
    """
    n = x.shape[1] // _CHUNK
    if n < 4 * k:
        values, places = x.topk(k)
        return values.tolist(), places.tolist()
    chunks, rest = x[:, : n * _CHUNK].view(len(x), n, _CHUNK), x[:, n * _CHUNK :]
    _, which = chunks.amax(-1).topk(k)
    candidates = chunks.gather(1, which[..., None].expand(-1, -1, _CHUNK)).flatten(1)
    at = (which[..., None] * _CHUNK + torch.arange(_CHUNK, device=x.device)).flatten(1)
    if rest.shape[1]:
        candidates = torch.cat((candidates, rest), 1)
        at = torch.cat((at, torch.arange(n * _CHUNK, x.shape[1], device=x.device).expand_as(rest)), 1)
    values, order = candidates.topk(k)
    return values.tolist(), at.gather(1, order).tolist()


def _is_done(beam: Beam, finished: list[tuple[float, list[int]]], best_running: float, length: int, most: int) -> bool:
    if len(finished) < beam.beams:
        return False
    if beam.early_stopping is True:
        return True
    longest = most if beam.early_stopping == "never" and beam.length_penalty > 0 else length
    return best_running / longest**beam.length_penalty <= finished[-1][0]
