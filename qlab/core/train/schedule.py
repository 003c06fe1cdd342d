"""The learning rate of every step; the training loop asks for it before each one."""

from __future__ import annotations

import math

from qlab.core.config.train import TrainConfig


def learning_rate(config: TrainConfig, base: float, done: int, iters: int) -> float:
    """Return the learning rate of a step.

    Example:
        >>> config = TrainConfig(lr_schedule="linear", warmup=1)
        >>> [learning_rate(config, 1e-4, done, 3) for done in range(3)]
        [5e-05, 0.0001, 5e-05]

    Args:
        config: schedule and warm-up.
        base: rate after the warm-up; a user may have changed it since the start.
        done: optimizer steps already done.
        iters: optimizer steps in all.

    Returns:
        In warm-up ``base · (done + 1) / (warmup + 1)``; then ``base``, or ``base`` falling to 0
        linearly or in half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983, equation 5, one
        period).
    """
    if done < config.warmup:
        return base * (done + 1) / (config.warmup + 1)
    steps_after_warmup = max(iters - config.warmup, 1)
    progress = min((done - config.warmup) / steps_after_warmup, 1.0)
    if config.lr_schedule == "linear":
        return base * (1 - progress)
    if config.lr_schedule == "cosine":
        return base * 0.5 * (1 + math.cos(math.pi * progress))
    return base
