"""Functions with a gradient of their own, and how they are found again in a graph that is read.

MLX's own (``mx.custom_function``) cannot be exported. While a graph is read, a stand-in of marked
arrays is put where such a function would be, and ``core/graph/handwritten.py`` puts the graphs of
both of its halves there. Knows no model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qlab.core.graph.handwritten import AXES, FIRST


@dataclass(frozen=True)
class Call:
    """One call of such a function, met while a graph was read.

    Attributes:
        forward: of ``given`` and ``closed``.
        backward: of the slope, ``given`` and ``closed``.
        given: shape and dtype of every array that has a gradient.
        closed: shape and dtype of the others.
        made: shape and dtype of what it returns.
    """

    forward: Callable[..., mx.array]
    backward: Callable[..., Sequence[mx.array]]
    given: list[tuple[tuple[int, ...], mx.Dtype]]
    closed: list[tuple[tuple[int, ...], mx.Dtype]]
    made: tuple[tuple[int, ...], mx.Dtype]


_met: list[list[Call]] = []  # one list for each graph that is being read


def with_gradient(
    forward: Callable[..., mx.array],
    backward: Callable[..., Sequence[mx.array]],
    given: Sequence[mx.array],
    closed: Sequence[mx.array] = (),
) -> mx.array:
    """Return ``forward(*given, *closed)``, whose gradients are ``backward(slope, *given,
    *closed)``, one for each given array.

    Args:
        forward: must read no other arrays that are computed.
        backward: the same. What it reads is kept from the way forward, so it should be ``given`` or
            stored anyway.
        given: arrays with a gradient.
        closed: further arrays, without one.
    """
    if _met:
        return _stand_in(forward, backward, given, closed)

    @mx.custom_function
    def apply(*arrays: mx.array) -> mx.array:
        return forward(*arrays, *closed)

    @apply.vjp
    def back(primals: Any, slope: mx.array, _: mx.array) -> Any:
        primals = (
            [primals] if isinstance(primals, mx.array) else primals
        )  # MLX hands a single one over as it is
        found = backward(slope, *primals, *closed)
        return tuple(found) if len(found) > 1 else found[0]

    return apply(*given)


@contextmanager
def met() -> Iterator[list[Call]]:
    """Put stand-ins in the place of such functions within, and give the calls that were met."""
    _met.append([])
    try:
        yield _met[-1]
    finally:
        _met.pop()


def _stand_in(
    forward: Any, backward: Any, given: Sequence[mx.array], closed: Sequence[mx.array]
) -> mx.array:
    """The square of a sum of everything: so every gradient follows from everything, too.

    See ``core/graph/handwritten.py``.
    """
    like = forward(*given, *closed)  # nobody asks for it, so it is not read
    number = len(_met[-1])
    looks = [[(a.shape, a.dtype) for a in group] for group in (given, closed)]
    _met[-1].append(Call(forward, backward, looks[0], looks[1], (like.shape, like.dtype)))
    every = tuple(range(AXES))
    parts = []
    for i, array in enumerate([*given, *closed]):
        part = (
            array.reshape((1,) * (AXES - array.ndim) + array.shape)
            .astype(mx.float32)
            .sum(every, keepdims=True)
        )
        own = mx.broadcast_to(part, (number + FIRST, i + FIRST) + (1,) * (AXES - 2))
        parts.append(own.transpose(every[::-1]).sum(every, keepdims=True))
    shape = (1,) * (AXES - like.ndim) + like.shape
    return (
        mx.broadcast_to(mx.square(sum(parts[1:], parts[0])), shape)
        .astype(like.dtype)
        .reshape(like.shape)
    )
