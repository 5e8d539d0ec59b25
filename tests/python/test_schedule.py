"""Learning-rate schedules: their end points, their shapes, and the warm-up."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from quest.train.config import ConfigError, ScheduleConfig
from quest.train.schedule import decay_factor, learning_rate_factor

TOTAL = 1000


def factors(**fields: object) -> list[float]:
    config = ScheduleConfig(**fields)
    return [learning_rate_factor(config, step, TOTAL) for step in range(TOTAL + 1)]


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "infinite_cosine", "constant"])
def test_warm_up_is_linear_from_a_hundredth(name: str) -> None:
    values = factors(name=name)
    assert values[0] == pytest.approx(0.01)
    assert values[50] == pytest.approx((0.01 + 1) / 2)
    assert values[100] == 1
    assert max(values) == 1


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "infinite_cosine"])
def test_decays_to_the_final_factor_without_rising(name: str) -> None:
    values = factors(name=name, final_factor=0.1)
    assert values[TOTAL] == pytest.approx(0.1)
    after = values[100:]
    assert all(a >= b - 1e-12 for a, b in pairwise(after))


def test_cosine_and_linear_at_half_way() -> None:
    assert factors(name="cosine", final_factor=0.1)[550] == pytest.approx(0.55)
    assert factors(name="linear", final_factor=0.1)[550] == pytest.approx(0.55)
    assert factors(name="cosine", final_factor=0.1)[325] == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)


def test_wsd_is_constant_until_its_tail() -> None:
    values = factors(name="wsd", tail=0.2, decay="sqrt", final_factor=0.0)
    assert values[100:801] == [1.0] * 701
    assert values[850] == pytest.approx(1 - math.sqrt(0.25))


def test_infinite_cosine_ends_in_a_constant() -> None:
    values = factors(name="infinite_cosine", tail=0.3, final_factor=0.2)
    assert values[400] == pytest.approx(0.6)
    assert values[700:] == pytest.approx([0.2] * 301)


@pytest.mark.parametrize(
    ("shape", "at_half"),
    [
        ("linear", 0.5),
        ("cosine", 0.5),
        ("mirror_cosine", 0.5),
        ("square", 0.75),
        ("sqrt", 1 - math.sqrt(0.5)),
    ],
)
def test_decay_shapes(shape: str, at_half: float) -> None:
    assert decay_factor(shape, 0.0, 0.1) == pytest.approx(1)
    assert decay_factor(shape, 0.5, 0.0) == pytest.approx(at_half)
    assert decay_factor(shape, 1.0, 0.1) == pytest.approx(0.1)


def test_exponential_and_mirrored_shapes() -> None:
    assert decay_factor("exp", 0.5, 0.01) == pytest.approx(0.1)
    # The mirror image of the cosine at the line: their mean is the line.
    for t in (0.1, 0.3, 0.9):
        mean = (decay_factor("cosine", t, 0.1) + decay_factor("mirror_cosine", t, 0.1)) / 2
        assert mean == pytest.approx(decay_factor("linear", t, 0.1))


def test_a_run_of_one_step_learns() -> None:
    for name in ("cosine", "linear", "wsd", "infinite_cosine", "constant"):
        assert learning_rate_factor(ScheduleConfig(name=name), 0, 1) == 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"warmup": 1.5}, r"schedule.warmup: expected a share in \[0, 1\], got 1.5"),
        ({"name": "wsd", "warmup": 0.5, "tail": 0.6}, "schedule.tail: expected at most 0.5"),
        ({"decay": "exp", "final_factor": 0.0}, "schedule.final_factor: expected > 0"),
    ],
)
def test_schedules_that_cannot_be(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ScheduleConfig(**fields)
