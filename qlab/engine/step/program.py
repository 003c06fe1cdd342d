"""Forward and backward pass of blocks that differ in their arrays only, each compiled once.

A model of eighty blocks alike has one ``BlockProgram``: every block's arrays are its arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx

from qlab.engine.models.functional import ArrayValues, Functional
from qlab.engine.step.block import Block
from qlab.engine.step.patches import CallSites, patched


class BlockProgram:
    """The compiled forward and backward pass of one kind of block.

    Args:
        block: one of its blocks, whose modules are run with the arrays of all.
        call_sites: see ``patches.call_sites``.
        on_trace: called whenever a function is compiled.

    Attributes:
        block: that block.
    """

    def __init__(self, block: Block, call_sites: CallSites, on_trace: Callable[[], None]) -> None:
        self.block = block
        self._call_sites = call_sites
        self._on_trace = on_trace
        # set before each call: whatever is no array in it is the same for all calls of this kind
        self._call = Functional([])
        self._forward = mx.compile(self._run)
        self._backward = mx.compile(self._run_backward)

    def forward(self, block: Block, call: Functional, x: mx.array) -> mx.array:
        """Return a block's output, ``(batch, length, hidden)``.

        Args:
            block: of this kind.
            call: its other arguments, a list of positional ones and a dict of named ones.
            x: its input, ``(batch, length, hidden)``.
        """
        self._call = call
        return self._forward(x, block.functional.arrays, call.arrays)

    def backward(
        self, block: Block, call: Functional, x: mx.array, cotangent: mx.array
    ) -> list[mx.array]:
        """Return the gradients by a block's input and by its trained arrays.

        The block's output is computed again.

        Args:
            block: of this kind.
            call: its other arguments.
            x: its input, ``(batch, length, hidden)``.
            cotangent: gradient by its output, ``(batch, length, hidden)``.
        """
        self._call = call
        return self._backward(x, cotangent, block.functional.arrays, call.arrays)

    def serves(self, block: Block, call: Functional, x: mx.array) -> bool:
        """Whether this block computes what another does when it has that one's arrays.

        Tried out on ``x``, ``(batch, length, hidden)``.
        """
        args, kwargs = call.root
        mine = self.block.functional
        theirs = block.functional
        with mine.using(theirs.arrays):
            result = mine.root(x, *args, **kwargs)
        expected = theirs.root(x, *args, **kwargs)
        return bool(mx.array_equal(result, expected).item())

    def _run(self, x: mx.array, arrays: ArrayValues, others: ArrayValues) -> mx.array:
        """What ``forward`` compiles: all arrays are arguments."""
        self._on_trace()
        with patched(self._call_sites, forward=True):
            return self._apply(x, arrays, others)

    def _run_backward(
        self, x: mx.array, cotangent: mx.array, arrays: ArrayValues, others: ArrayValues
    ) -> list[mx.array]:
        """What ``backward`` compiles: all arrays are arguments."""
        self._on_trace()
        numbers = self.block.trained_numbers

        def run(h: mx.array, *trained: mx.array) -> list[mx.array]:
            every = list(arrays)
            for n, array in zip(numbers, trained, strict=True):
                every[n] = array
            return [self._apply(h, every, others)]

        primals = [x, *(arrays[n] for n in numbers)]
        with patched(self._call_sites):
            _, gradients = mx.vjp(run, primals, [cotangent])
        return gradients

    def _apply(self, x: mx.array, arrays: ArrayValues, others: ArrayValues) -> mx.array:
        """Run the block with some arrays of its own and some in its other arguments."""
        function = self.block.functional
        with function.using(arrays), self._call.using(others):
            args, kwargs = self._call.root
            return function.root(x, *args, **kwargs)


class PlannedBlock(NamedTuple):
    """One block of a step, with what computes it.

    Attributes:
        block: the block.
        program: of its kind.
        call: its other arguments in this step.
    """

    block: Block
    program: BlockProgram
    call: Functional

    def forward(self, x: mx.array) -> mx.array:
        """Return its output; see ``BlockProgram``."""
        return self.program.forward(self.block, self.call, x)

    def backward(self, x: mx.array, cotangent: mx.array) -> list[mx.array]:
        """Return the gradients by its input and by its trained arrays; see ``BlockProgram``."""
        return self.program.backward(self.block, self.call, x, cotangent)
