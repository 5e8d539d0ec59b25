"""The learning rate at each step, as a factor of its peak.

Every schedule is a linear warm-up from `start_factor` to 1 followed by a shape over the rest of the run. The shapes
are those of the QuEST paper's code and of "Scaling Laws and Compute-Optimal Training Beyond Fixed Training Durations"
(arXiv 2405.18392), with t the elapsed share of a decay and f the final factor:

    linear          f + (1 − f)(1 − t)
    cosine          f + (1 − f)(1 + cos πt)/2
    mirror_cosine   2·linear − cosine: the cosine mirrored at the line
    exp             f^t
    square          f + (1 − f)(1 − t²)
    sqrt            f + (1 − f)(1 − √t)
"""

from __future__ import annotations

import math

from quest.train.config import ScheduleConfig


def decay_factor(shape: str, t: float, final: float) -> float:
    """Factor after the share t ∈ [0, 1] of a decay from 1 to `final`."""
    if shape == "exp":
        return math.pow(final, t)
    linear = 1 - t
    cosine = (1 + math.cos(math.pi * t)) / 2
    remaining = {
        "linear": linear,
        "cosine": cosine,
        "mirror_cosine": 2 * linear - cosine,
        "square": 1 - t * t,
        "sqrt": 1 - math.sqrt(t),
    }[shape]
    return final + (1 - final) * remaining


def learning_rate_factor(config: ScheduleConfig, step: int, total: int) -> float:
    """Factor of the peak learning rate for optimizer step `step` (0 … total − 1) of `total`.

    A pure function of the step: nothing to save, nothing to restore.
    """
    warmup = round(config.warmup * total)
    if step < warmup:
        return config.start_factor + (1 - config.start_factor) * step / warmup
    tail = round(config.tail * total)
    if config.name == "wsd":
        first, last, shape = total - tail, total, config.decay
    elif config.name == "infinite_cosine":
        first, last, shape = warmup, total - tail, "cosine"
    elif config.name == "constant":
        return 1.0
    else:
        first, last, shape = warmup, total, config.name
    t = (step - first) / (last - first) if last > first else float(step >= last)
    return decay_factor(shape, min(max(t, 0.0), 1.0), config.final_factor)
