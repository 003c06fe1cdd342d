"""The learning rate of every step. Knows no optimizer."""

from __future__ import annotations

import math

from qlab.core.config.train import TrainConfig


def learning_rate(config: TrainConfig, base: float, done: int, iters: int) -> float:
    """Return the learning rate of a step.

    Args:
        config: schedule and warm-up.
        base: rate once warm; a user may have changed it since the start.
        done: optimizer steps already done.
        iters: optimizer steps in all.

    Returns:
        In warm-up ``base · (done + 1) / (warmup + 1)``; then ``base``, or ``base`` falling to 0 in
        a line or half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, one
        period).
    """
    if done < config.warmup:
        return base * (done + 1) / (config.warmup + 1)
    share = min((done - config.warmup) / max(iters - config.warmup, 1), 1.0)
    if config.lr_schedule == "linear":
        return base * (1 - share)
    if config.lr_schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * share))
    return base
