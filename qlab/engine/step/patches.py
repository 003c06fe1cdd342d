"""Puts qlab's functions in the place of mlx-lm's of the same name, while a step is computed.

qlab's (``ops/swiglu.py``, ``ops/attention.py``) have gradients that keep less, or are faster on a
CPU. mlx-lm's modules are as they were once the step is computed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from qlab.ops.attention import attention
from qlab.ops.swiglu import swiglu

# Python module, name of the function there, qlab's
CallSites = list[tuple[ModuleType, str, Callable[..., Any]]]


def call_sites(module: nn.Module) -> CallSites:
    """Return where a model's layers call a function of mlx-lm's that qlab has, too."""
    from mlx_lm.models import activations, base

    replacements = [
        ("swiglu", activations.swiglu, swiglu),
        ("scaled_dot_product_attention", base.scaled_dot_product_attention, attention),
    ]
    places: CallSites = []
    for python_module in {sys.modules[type(layer).__module__] for layer in module.modules()}:
        for name, stock, own in replacements:
            if vars(python_module).get(name) is stock:
                places.append((python_module, name, own))
    return places


@contextmanager
def patched(call_sites: CallSites, forward: bool = False) -> Iterator[None]:
    """Let the model's layers call qlab's functions within.

    Args:
        call_sites: what the function of that name returns.
        forward: whether no gradient is made: then qlab's are of use on a CPU only, where they are
            faster.
    """
    if forward and mx.default_device() != mx.cpu:
        call_sites = []
    with ExitStack() as stack:
        for module, name, own in call_sites:
            stack.callback(setattr, module, name, vars(module)[name])
            setattr(module, name, own)
        yield
