"""Functions of qlab's in the place of mlx-lm's that are called alike, while a step is computed.

Knows no model.
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

Users = list[tuple[ModuleType, str, Callable[..., Any]]]


def users(module: nn.Module) -> Users:
    """Return where a model's layers call a function of mlx-lm's that qlab has, too.

    Python module, name, qlab's.
    """
    from mlx_lm.models import activations, base

    found = {sys.modules[type(layer).__module__] for layer in module.modules()}
    name = "scaled_dot_product_attention"
    ours = [("swiglu", activations.swiglu, swiglu), (name, getattr(base, name), attention)]
    return [
        (each, name, own)
        for each in found
        for name, stock, own in ours
        if vars(each).get(name) is stock
    ]


@contextmanager
def patched(users: Users, forward: bool = False) -> Iterator[None]:
    """Let them call qlab's within.

    Args:
        users: what the function of that name returns.
        forward: whether no gradient is made: then qlab's are of use on a CPU only, where they are
            faster.
    """
    with ExitStack() as stack:
        for each, name, own in users if not forward or mx.default_device() == mx.cpu else ():
            stack.callback(setattr, each, name, vars(each)[name])
            setattr(each, name, own)
        yield
