"""A gated activation that keeps nothing but what it reads: on the way back it is computed again, which costs no product.

Differentiated as it is, it keeps the gate's sigmoid and what follows from it, each as large as the widest activations of a
model. Knows no model, only mlx-lm's name for it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import ModuleType

import mlx.core as mx
import mlx.nn as nn


@mx.custom_function
def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return silu(gate)·x, as ``mlx_lm.models.activations.swiglu`` does (Shazeer 2020, arXiv:2002.05202)."""
    return _forward(gate, x)


@swiglu.vjp
def _back(primals: list[mx.array], cotangent: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
    gate, x = primals
    # the same gate, but as two arrays: what is read by both and by the way forward would be kept, and fused with none
    (one,), (two,) = mx.depends([gate], [cotangent]), mx.depends([gate], [cotangent, x])
    return _by_gate(one, x, cotangent).astype(gate.dtype), _forward(two, cotangent).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def _forward(gate: mx.array, x: mx.array) -> mx.array:
    return nn.silu(gate) * x


@partial(mx.compile, shapeless=True)
def _by_gate(gate: mx.array, x: mx.array, cotangent: mx.array) -> mx.array:
    share = mx.sigmoid(gate)
    return cotangent * x * (share * (1 + gate * (1 - share)))


def users(module: nn.Module) -> list[ModuleType]:
    """Return the Python modules of a model's layers that call mlx-lm's function by its name."""
    from mlx_lm.models import activations

    found = {sys.modules[type(layer).__module__] for layer in module.modules()}
    return [each for each in found if vars(each).get("swiglu") is activations.swiglu]


@contextmanager
def frugal(users: list[ModuleType]) -> Iterator[None]:
    """Let them call the one of this module within; its numbers are the same."""
    with ExitStack() as stack:
        for each in users:
            stack.callback(setattr, each, "swiglu", vars(each)["swiglu"])
            each.swiglu = swiglu
        yield
