"""A gated activation that keeps nothing but what it reads.

On the way back it is computed again, which costs no product.

Differentiated as it is, it keeps the gate's sigmoid and what follows from it, each as large as the
widest activations of a model. Knows no model.
"""

from __future__ import annotations

from functools import partial

import mlx.core as mx
import mlx.nn as nn

from qlab.ops.custom_gradient import with_gradient
from qlab.ops.exponential import is_slow, sigmoid


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return silu(gate)·x, as ``mlx_lm.models.activations.swiglu`` does (Shazeer 2020,
    arXiv:2002.05202).
    """
    return with_gradient(_forward, _back, [gate, x])


def _forward(gate: mx.array, x: mx.array) -> mx.array:
    return gate * sigmoid(gate) * x if is_slow(gate) else _fused(gate, x)


def _back(cotangent: mx.array, gate: mx.array, x: mx.array) -> tuple[mx.array, mx.array]:
    if is_slow(gate):  # the sigmoid is dear, and serves both
        (own,) = mx.depends([gate], [cotangent])
        share = sigmoid(own)
        by_gate = cotangent * x * (share * (1 + own * (1 - share)))
        by_x = cotangent * own * share
    else:
        # the same gate, but as two arrays: what is read by both and by the way forward would be
        # kept, and fused with none
        (one,) = mx.depends([gate], [cotangent])
        (two,) = mx.depends([gate], [cotangent, x])
        by_gate = _by_gate(one, x, cotangent)
        by_x = _fused(two, cotangent)
    return by_gate.astype(gate.dtype), by_x.astype(x.dtype)


@partial(mx.compile, shapeless=True)
def _fused(gate: mx.array, x: mx.array) -> mx.array:
    return nn.silu(gate) * x


@partial(mx.compile, shapeless=True)
def _by_gate(gate: mx.array, x: mx.array, cotangent: mx.array) -> mx.array:
    share = mx.sigmoid(gate)
    return cotangent * x * (share * (1 + gate * (1 - share)))
