"""A gated activation that keeps nothing for its gradient but what it reads.

In the backward pass the sigmoid is computed again, which costs no product. Differentiated by MLX,
the function keeps the gate's sigmoid and what follows from it, each as large as the widest
activations of a model. Put in the place of mlx-lm's by ``engine/step/patches.py``.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from qlab.ops.custom_gradient import with_gradient
from qlab.ops.exponential import is_slow, sigmoid


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return silu(gate)·x, as ``mlx_lm.models.activations.swiglu`` does.

    Source: Shazeer 2020 (arXiv:2002.05202).

    Args:
        gate: ``(…, width)``.
        x: ``(…, width)``.
    """
    return with_gradient(_forward, _backward, [gate, x])


def _forward(gate: mx.array, x: mx.array) -> mx.array:
    if is_slow(gate):
        return gate * sigmoid(gate) * x
    return _fused(gate, x)


def _backward(cotangent: mx.array, gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    """Return the gradients by gate and by x; all arrays are ``(…, width)``.

    The gate is read through ``depends``, as if it were another array that comes with the cotangent:
    else compilation would find the same sigmoid in the forward pass and keep that one's.
    """
    if is_slow(gate):  # the sigmoid is dear, and serves both gradients
        (later_gate,) = mx.depends([gate], [cotangent])
        share = sigmoid(later_gate)
        slope = share * (1 + later_gate * (1 - share))  # of silu
        by_gate = cotangent * x * slope
        by_x = cotangent * later_gate * share
    else:
        # As two arrays: a sigmoid that both gradients read would be written to memory instead of
        # being fused into each.
        (gate_of_first,) = mx.depends([gate], [cotangent])
        (gate_of_second,) = mx.depends([gate], [cotangent, x])
        by_gate = _by_gate(gate_of_first, x, cotangent)
        by_x = _fused(gate_of_second, cotangent)
    return by_gate.astype(gate.dtype), by_x.astype(x.dtype)


@partial(mx.compile, shapeless=True)
def _fused(gate: mx.array, x: mx.array) -> mx.array:
    return nn.silu(gate) * x


@partial(mx.compile, shapeless=True)
def _by_gate(gate: mx.array, x: mx.array, cotangent: mx.array) -> mx.array:
    share = mx.sigmoid(gate)
    slope = share * (1 + gate * (1 - share))  # of silu
    return cotangent * x * slope
