"""Text from a decoder or an encoder-decoder: greedy or sampled, batched, with a key-value cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lmexp.contracts import UserError
from lmexp.decoding.beam import Beam, beam_search
from lmexp.decoding.steps import Constraints, begun, check_lengths, steps_of, weights_for, without_gradients


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen and when to stop."""

    temperature: float = 1.0
    """Logits are divided by this; 0: the likeliest token (greedy)."""

    top_k: int | None = None
    """Only the k likeliest tokens; null: all."""

    top_p: float | None = None
    """Only the fewest likeliest tokens that reach this probability together, in (0, 1] (Holtzman et al. 2020,
    section 3.1); null: all. Applied after temperature and top_k."""

    min_p: float | None = None
    """Only tokens at least this times as likely as the likeliest, in (0, 1] (Nguyen et al. 2024, section 3); null: all.
    Applied last."""

    max_new_tokens: int = 256
    """Tokens generated for each prompt at most."""

    min_new_tokens: int = 0
    """The end of a document is not drawn before so many."""

    no_repeat_ngram: int | None = None
    """No so many tokens in a row are written twice (Paulus et al. 2017, section 2.5), a decoder's prompt counted in;
    null: they may."""

    seed: int = 0
    """Decides all randomness."""

    stop_at_eos: bool = True
    """Stop a row once it has generated the end of a document."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"decoding.temperature={self.temperature}; expected at least 0 (greedy).")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"decoding.top_k={self.top_k}; expected at least 1, or null for all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"decoding.top_p={self.top_p}; expected a probability above 0 and at most 1, or null.")
        if self.min_p is not None and not 0 < self.min_p <= 1:
            raise UserError(f"decoding.min_p={self.min_p}; expected a share above 0 and at most 1, or null.")
        check_lengths(self.max_new_tokens, self.min_new_tokens, self.no_repeat_ngram)

    @property
    def constraints(self) -> Constraints:
        """What may not be written."""
        return Constraints(self.min_new_tokens, self.no_repeat_ngram)


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Beam,
    eos_id: int | None,
    vocab_size: int,
    on_token: Callable[[int, int], None] | None = None,
    numbers: Sequence[int] | None = None,
) -> list[list[int]]:
    """Continue each prompt (token ids, at least one); returns the new tokens alone, the end of document included.

    With a `Beam` the best that `beam_search` finds, which comes to `on_token` when it is whole.

    An encoder-decoder reads the prompt and writes its answer, from `model.decoder_start_id` on.

    Each row is a pure function of its prompt, the seed and its number (`numbers`; None: 0, 1, ...), whichever rows
    stand beside it, up to the rounding of products of other sizes. Each token is predicted from at
    most the last `model.max_length` ones; as long as these fit, from cached keys and values. `vocab_size`: ids from
    there on (padding of the vocabulary) are never drawn.
    `on_token(row, token)` is called for each token as it comes, row by row. The model runs in evaluation mode and is
    left in the mode it was in.
    Raises `UserError` for an empty prompt.
    """
    for row, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {row} has no tokens; give it text, or the end-of-document token to start from.")
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    try:
        if isinstance(sampling, Beam):
            rows = [found[0][1] for found in beam_search(model, prompts, sampling, eos_id, vocab_size)]
            for row, tokens in enumerate(rows if on_token is not None else []):
                for token in tokens:
                    on_token(row, token)  # type: ignore[misc]
            return rows
        with weights_for(model, len(prompts)), without_gradients(model):
            numbers = range(len(prompts)) if numbers is None else numbers
            return _generate(model, prompts, sampling, eos_id, vocab_size, on_token, numbers)
    finally:
        model.train(was_training)


def _generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    eos_id: int | None,
    vocab_size: int,
    on_token: Callable[[int, int], None] | None,
    numbers: Sequence[int],
) -> list[list[int]]:
    steps = steps_of(model, prompts, sampling.max_new_tokens)
    rows = _Rows(prompts, model, sampling, eos_id, vocab_size, on_token, numbers)
    for _ in range(steps.most):
        drawn = rows.draw(steps.logits())
        if all(rows.done):
            break
        steps.append(drawn)
    return rows.tokens


class _Rows:
    """What has been written so far, row by row."""

    def __init__(
        self,
        prompts: Sequence[Sequence[int]],
        model: Any,
        sampling: Sampling,
        eos_id: int | None,
        vocab_size: int,
        on_token: Callable[[int, int], None] | None,
        numbers: Sequence[int],
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in prompts]
        self.done = [False] * len(prompts)
        self.begun = begun(model, prompts)
        self.sampling = sampling
        self.eos_id = eos_id
        self.vocab_size = vocab_size
        self.on_token = on_token
        self.numbers = numbers

    def draw(self, logits: Tensor) -> Tensor:
        """Choose the next token of each row from its logits (B, V), append it where the row goes on; (B,)."""
        places = [(number, len(row)) for number, row in zip(self.numbers, self.tokens, strict=True)]
        logits = logits[:, : self.vocab_size]
        if self.sampling.constraints.any:
            texts = [[*start, *row] for start, row in zip(self.begun, self.tokens, strict=True)]
            logits = self.sampling.constraints(logits, texts, places[0][1], self.eos_id)
        drawn = next_tokens(logits, self.sampling, places)
        for row, token in enumerate(drawn.tolist()):
            if self.done[row]:
                continue
            self.tokens[row].append(token)
            self.done[row] = self.sampling.stop_at_eos and token == self.eos_id
            if self.on_token is not None:
                self.on_token(row, token)
        return drawn


def next_tokens(logits: Tensor, sampling: Sampling, places: Sequence[tuple[int, int]]) -> Tensor:
    """Choose a token for each row of logits (B, V); `places` are the (row, position) that decide the randomness.

    Samples by inverting the distribution function at a uniform number of the seed, the row and the position.
    Returns (B,) int64.
    """
    if sampling.temperature == 0:
        return _likeliest(logits)
    probabilities, ids = distribution(logits, sampling)
    if probabilities.device.type == "mps":  # has no float64
        probabilities, ids = probabilities.cpu(), ids.cpu()
    uniform = torch.tensor([_uniform(sampling.seed, *place) for place in places], dtype=torch.float64)
    total = probabilities.double().cumsum(-1)
    end = total[:, -1:]
    # below the end even after rounding, so that no excluded token at the end of the order is drawn
    at = torch.minimum(uniform.to(ids.device)[:, None] * end, end.nextafter(torch.zeros_like(end)))
    chosen = torch.searchsorted(total, at, right=True)
    return ids.gather(-1, chosen)[:, 0].to(logits.device)


def _likeliest(logits: Tensor) -> Tensor:
    """The place of each row's largest, the first of equals; NumPy's takes a CPU a seventh of the time of torch's."""
    if logits.device.type == "cpu" and logits.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(logits.detach().numpy().argmax(-1))
    return logits.argmax(-1)


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Probabilities (B, V) in falling order, those of excluded tokens 0, and the tokens (B, V) they belong to."""
    ordered, ids = logits.float().sort(dim=-1, descending=True, stable=True)
    # the likeliest gets exponent 0, so that a temperature near 0 divides nothing large
    scaled = (ordered - ordered[:, :1]) / sampling.temperature
    if sampling.top_k is not None:
        scaled[:, sampling.top_k :] = float("-inf")
    probabilities = scaled.softmax(-1)
    if sampling.top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = torch.where(before < sampling.top_p, probabilities, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    if sampling.min_p is not None:
        probabilities = torch.where(probabilities >= sampling.min_p * probabilities[:, :1], probabilities, 0.0)
        probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    return probabilities, ids


def _uniform(seed: int, row: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of its arguments (SplitMix64, Steele et al. 2014, chained)."""
    mask = (1 << 64) - 1
    state = 0
    for value in (seed, row, position):
        state = (state + value + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return (state >> 11) / (1 << 53)
