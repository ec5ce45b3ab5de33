"""Schedules against their closed forms, and against Transformers' where the two agree."""

import math

import pytest
import torch

from lmexp.contracts import UserError
from lmexp.schedule.schedules import WSD, Constant, Cosine, InverseSqrt, Linear


@pytest.mark.parametrize("make", [Constant, Linear, Cosine, WSD, InverseSqrt])
@pytest.mark.parametrize("warmup", [10, 0.1])
def test_warmup_is_linear_and_never_zero(make, warmup):
    schedule = make(warmup=warmup)
    assert [schedule(step, 100) for step in range(11)] == pytest.approx([(s + 1) / 11 for s in range(11)])
    assert all(0 <= schedule(step, 100) <= 1 for step in range(101))


def test_closed_forms():
    assert Constant()(99, 100) == 1
    assert Linear(final=0.2)(50, 100) == pytest.approx(0.6)
    assert Linear()(99, 100) == pytest.approx(0.01)
    assert Cosine(warmup=20, final=0.1)(60, 100) == pytest.approx(0.55)
    assert Cosine()(25, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    wsd = WSD(warmup=10, decay=0.4, final=0.1)
    assert [wsd(s, 100) for s in (10, 59, 60, 80, 100)] == pytest.approx([1, 1, 1, 0.55, 0.1])
    assert WSD(decay=40, shape="sqrt")(70, 100) == pytest.approx(0.5)
    assert InverseSqrt(warmup=10, final=0.2)(40, 1000) == pytest.approx(0.5)
    assert InverseSqrt(warmup=10, final=0.2)(900, 1000) == pytest.approx(0.2)


@pytest.mark.parametrize("warmup", [0, 7])
def test_decays_are_those_of_transformers(warmup):
    transformers = pytest.importorskip("transformers")
    steps = 50

    def theirs(make, **arguments):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        return make(optimizer, num_warmup_steps=warmup, **arguments).lr_lambdas[0]

    pairs = [
        (Linear(warmup=warmup), theirs(transformers.get_linear_schedule_with_warmup, num_training_steps=steps)),
        (Cosine(warmup=warmup), theirs(transformers.get_cosine_schedule_with_warmup, num_training_steps=steps)),
        (Constant(warmup=warmup), theirs(transformers.get_constant_schedule_with_warmup)),
        (
            WSD(warmup=warmup, decay=20),
            theirs(
                transformers.get_wsd_schedule,
                num_decay_steps=20,
                num_training_steps=steps,
                decay_type="linear",
            ),
        ),
    ]
    if warmup:
        pairs.append((InverseSqrt(warmup=warmup), theirs(transformers.get_inverse_sqrt_schedule)))
    for ours, reference in pairs:
        for step in range(warmup, steps):  # their warm-up starts at zero
            assert ours(step, steps) == pytest.approx(reference(step)), type(ours).__name__


@pytest.mark.parametrize(
    "make",
    [
        lambda: Constant(warmup=-1),
        lambda: Constant(warmup=1.5),
        lambda: Linear(final=2.0),
        lambda: WSD(shape="cubic"),
        lambda: InverseSqrt(),
        lambda: WSD(warmup=0.5, decay=0.8)(60, 100),
    ],
)
def test_bad_values_are_refused(make):
    with pytest.raises(UserError, match="schedule"):
        make()
