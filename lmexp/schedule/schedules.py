"""Learning-rate schedules: factors on the base rate as pure functions of the step (`contracts.Schedule`).

All begin with a warm-up of w steps, factor (step + 1) / (w + 1): not zero at step 0, and one at step w. Decays go by
u = (step - w) / (max_steps - w) and would end at step max_steps, the first that is not taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from lmexp.contracts import UserError


@dataclass(frozen=True, kw_only=True)
class Constant:
    """1 after the warm-up."""

    warmup: float = 0
    """Steps of warm-up, or below 1 their share of max_steps."""

    def __post_init__(self) -> None:
        _check_span("warmup", self.warmup)

    def __call__(self, step: int, max_steps: int) -> float:
        """The factor at `step`, counted from 0, of `max_steps`."""
        warmup = _steps(self.warmup, max_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return self.after(step, warmup, max_steps)

    def after(self, step: int, warmup: int, max_steps: int) -> float:
        """The factor once the warm-up of `warmup` steps is over."""
        return 1.0


@dataclass(frozen=True, kw_only=True)
class _Decaying(Constant):
    final: float = 0.0
    """Factor at the end, in [0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.final <= 1:
            raise UserError(f"schedule.final={self.final}; expected a factor from 0 to 1.")


@dataclass(frozen=True, kw_only=True)
class Linear(_Decaying):
    """1 - (1 - final) u."""

    def after(self, step: int, warmup: int, max_steps: int) -> float:
        return 1 - (1 - self.final) * _progress(step, warmup, max_steps)


@dataclass(frozen=True, kw_only=True)
class Cosine(_Decaying):
    """final + (1 - final) (1 + cos(pi u)) / 2 (Loshchilov & Hutter 2017, eq. 5)."""

    def after(self, step: int, warmup: int, max_steps: int) -> float:
        u = _progress(step, warmup, max_steps)
        return self.final + (1 - self.final) * (1 + math.cos(math.pi * u)) / 2


@dataclass(frozen=True, kw_only=True)
class WSD(_Decaying):
    """Warm-up, stable, decay (Hu et al. 2024, section 4.2): 1, then with v the progress through the decay,
    1 - (1 - final) v (linear) or 1 - (1 - final) sqrt(v) (sqrt; Hägele et al. 2024, eq. 1)."""

    decay: float = 0.2
    """Steps of the decay at the end, or below 1 their share of max_steps."""

    shape: str = "linear"
    """Shape of the decay: linear or sqrt."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_span("decay", self.decay)
        if self.shape not in ("linear", "sqrt"):
            raise UserError(f"schedule.shape={self.shape}; expected linear or sqrt.")

    def after(self, step: int, warmup: int, max_steps: int) -> float:
        decay = _steps(self.decay, max_steps)
        if warmup + decay > max_steps:
            raise UserError(
                f"schedule: {warmup} steps of warm-up and {decay} of decay are more than max_steps={max_steps}; "
                "lower schedule.warmup or schedule.decay, or give them as shares below 1."
            )
        start = max_steps - decay
        if step < start:
            return 1.0
        v = _progress(step, start, max_steps)
        return 1 - (1 - self.final) * (v if self.shape == "linear" else math.sqrt(v))


@dataclass(frozen=True, kw_only=True)
class InverseSqrt(_Decaying):
    """sqrt(w / step), at least `final` (Vaswani et al. 2017, eq. 3, over its peak); needs a warm-up."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup == 0:
            raise UserError("schedule.warmup=0; inverse_sqrt decays by the length of its warm-up, set a positive one.")

    def after(self, step: int, warmup: int, max_steps: int) -> float:
        return max(self.final, math.sqrt(max(1, warmup) / max(1, step, warmup)))


def _check_span(name: str, value: float) -> None:
    if value < 0 or (value > 1 and value != int(value)):
        raise UserError(f"schedule.{name}={value}; expected a number of steps, or below 1 a share of max_steps.")


def _steps(span: float, max_steps: int) -> int:
    return round(span * max_steps) if span < 1 else int(span)


def _progress(step: int, start: int, end: int) -> float:
    return min(1.0, max(0.0, (step - start) / max(1, end - start)))
