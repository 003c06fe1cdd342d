"""Functions with custom gradients, and stand-ins for them while a graph is read.

MLX's own (``mx.custom_function``) cannot be exported. While ``engine/memory/read_graph.py`` reads a
graph, a stand-in takes the place of each such function, and ``core/graph/handwritten.py`` then puts
the graphs of both of its halves, forward and backward, there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from qlab.core.graph.handwritten import AXES, FIRST

Look = tuple[tuple[int, ...], mx.Dtype]  # shape and dtype of an array


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a function with a custom gradient, met while a graph was read.

    Attributes:
        forward: from the ``differentiable`` arrays and the ``others`` to the output.
        backward: from the gradient by the output, the ``differentiable`` arrays and the ``others``
            to the gradients by the ``differentiable`` arrays.
        differentiable: shape and dtype of every array that has a gradient.
        others: shape and dtype of the arrays without one.
        output: shape and dtype of what it returns.
    """

    forward: Callable[..., mx.array]
    backward: Callable[..., Sequence[mx.array]]
    differentiable: list[Look]
    others: list[Look]
    output: Look


_recorded: list[list[Call]] = []  # one list for each graph that is being read


def with_gradient(
    forward: Callable[..., mx.array],
    backward: Callable[..., Sequence[mx.array]],
    differentiable: Sequence[mx.array],
    others: Sequence[mx.array] = (),
) -> mx.array:
    """Return ``forward(*differentiable, *others)``, with a gradient of one's own.

    Example:
        >>> square = lambda x: x * x
        >>> y = with_gradient(square, lambda slope, x: [2 * slope * x], [x])

    Args:
        forward: must read no other arrays that are computed.
        backward: ``backward(slope, *differentiable, *others)`` returns a gradient for each
            differentiable array; ``slope`` is the gradient by the output. It must read no other
            arrays either. What it reads is kept from forward to backward pass, so it should be
            ``differentiable`` or stored anyway.
        differentiable: arrays with a gradient.
        others: arrays without one.
    """
    if _recorded:
        return _stand_in(forward, backward, differentiable, others)

    @mx.custom_function
    def apply(*arrays: mx.array) -> mx.array:
        return forward(*arrays, *others)

    @apply.vjp
    def gradient(primals: Any, slope: mx.array, _: mx.array) -> Any:
        # MLX hands a single array over as it is, and takes a single gradient so
        arrays = [primals] if isinstance(primals, mx.array) else primals
        gradients = backward(slope, *arrays, *others)
        return tuple(gradients) if len(gradients) > 1 else gradients[0]

    result: Any = apply(*differentiable)
    return result


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """Put stand-ins in the place of such functions within, and give the calls that were met."""
    _recorded.append([])
    try:
        yield _recorded[-1]
    finally:
        _recorded.pop()


def _stand_in(
    forward: Callable[..., mx.array],
    backward: Callable[..., Sequence[mx.array]],
    differentiable: Sequence[mx.array],
    others: Sequence[mx.array],
) -> mx.array:
    """Record a call, and return an array that can be found again in the graph that is read.

    The array must have the output's shape and dtype, and the graph that MLX exports must hold an
    edge to it from every array that the function reads, and from it a gradient to every one. MLX
    leaves out what does not contribute. So all arrays are summed up to one number, and the number
    is squared: the square's gradient by each array follows from the value of the sum, so from every
    other array as well, as the real gradient may.

    On its way into the sum each array passes a shape that says whose it is, ``(call, array, 1,
    …)``, and a transpose; ``core/graph/handwritten.py`` finds stand-ins by these.
    """
    like = forward(*differentiable, *others)  # only its shape is asked for, so it is not read
    number = len(_recorded[-1])
    _recorded[-1].append(
        Call(
            forward=forward,
            backward=backward,
            differentiable=[_look(array) for array in differentiable],
            others=[_look(array) for array in others],
            output=_look(like),
        )
    )
    every_axis = tuple(range(AXES))
    numbers = []
    for i, array in enumerate([*differentiable, *others]):
        wide = array.reshape(_with_axes(array)).astype(mx.float32)
        one = wide.sum(every_axis, keepdims=True)  # (1, 1, …)
        marked = mx.broadcast_to(one, (number + FIRST, i + FIRST) + (1,) * (AXES - 2))
        turned = marked.transpose(every_axis[::-1])  # (1, …, array, call)
        numbers.append(turned.sum(every_axis, keepdims=True))  # (1, 1, …)
    square = mx.square(sum(numbers[1:], numbers[0]))
    spread = mx.broadcast_to(square, _with_axes(like))
    return spread.astype(like.dtype).reshape(like.shape)


def _look(array: mx.array) -> Look:
    return array.shape, array.dtype


def _with_axes(array: mx.array) -> tuple[int, ...]:
    """Return an array's shape with leading axes of 1, ``AXES`` in all."""
    return (1,) * (AXES - array.ndim) + array.shape
