"""How much memory a graph needs while MLX evaluates it, simulated; nothing is allocated.

``Forecast`` simulates the graph of a training step to find its peak. What is simulated:

1. **Order.** Operations run in MLX's order (``order``), round by round.
2. **Buffers.** An output gets a buffer, or shares one (``buffers``).
3. **Frees.** An array goes when its last reader has been evaluated (``array::detach`` in
   ``eval_impl``), and its buffer with the last array in it.
4. **Work in flight.** The host only hands operations over. What an operation reads is held until
   the device has run it (``backend/cpu/eval.cpp`` binds the buffers to the task that it
   dispatches), though nothing needs it any more. How many may be unfinished is limited in two
   ways: MLX's scheduler lets the host wait when too many tasks are (``Runahead``), and a step that
   is handed over in rounds waits after each (``Round.window``).

Follows MLX 0.32 (``mlx/transforms.cpp``, ``mlx/scheduler.h``, ``mlx/backend/cpu/encoder.h``).
Knows no framework.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import NamedTuple

import numpy as np

from qlab.core.graph.buffers import Buffer, Buffers, Change
from qlab.core.graph.graph import Graph, Node
from qlab.core.graph.order import order
from qlab.core.graph.primitives import COPY_FIRST, SHAPES, VIEWS


@dataclass(frozen=True)
class Runahead:
    """How far a back end's host runs ahead of the device, and so how long buffers are held.

    Dispatches are handed over in tasks, and a run meets every position of a step within its tasks;
    so this counts from the position that holds the most.

    Attributes:
        dispatches: that may be unfinished.
        kernels: whether only what computes is a dispatch, as on a GPU; off a GPU each operation,
            also a view, has one more, which lets go of what it read.
    """

    dispatches: int = 110
    kernels: bool = False


class Event(NamedTuple):
    """A change of a buffer.

    Attributes:
        moment: number of the first step at which it has an effect.
        array: id of the array that the buffer was allocated for.
        nbytes: of the buffer.
        change: what happens.
    """

    moment: int
    array: int
    nbytes: int
    change: Change


class Usage:
    """What was in use at every moment of an evaluation.

    Attributes:
        steps: node indices in the order of evaluation; a moment is a place in it.
        events: changes of buffers, in order.
    """

    def __init__(self, steps: list[int]) -> None:
        self.steps = steps
        self.events: list[Event] = []

    @cached_property
    def timeline(self) -> np.ndarray:
        """Bytes in use at every moment, idle buffers included; int64 ``(steps,)``."""
        changes = np.zeros(len(self.steps) + 1, np.int64)
        for moment, _, nbytes, change in self.events:
            if change is Change.TAKEN:
                changes[moment] += nbytes
            elif change is not Change.IDLE:
                changes[moment] -= nbytes
        return np.cumsum(changes)[:-1]

    @property
    def peak_nbytes(self) -> int:
        """The greatest use."""
        return int(self.timeline.max())


def simulate(graph: Graph, runahead: Runahead | None = None) -> Usage:
    """Return what is in use while a graph is evaluated, with its inputs in memory to the end.

    Args:
        graph: the computation.
        runahead: of the back end; None has every operation finished when the next one begins.
    """
    return _Simulation(graph, runahead).run()


class _Flight(NamedTuple):
    """An operation that the device may not have run yet.

    Attributes:
        issued: dispatches that were handed over until then, its own included.
        holds: buffers that it holds.
    """

    issued: int
    holds: list[Buffer]


class _Simulation:
    def __init__(self, graph: Graph, runahead: Runahead | None) -> None:
        self._graph = graph
        self._limit = runahead.dispatches if runahead else 0
        self._kernels = runahead is not None and runahead.kernels
        rounds = order(graph)
        steps = [n for nodes in rounds for n in nodes]
        self._ends = list(accumulate(len(nodes) for nodes in rounds))  # moments after each round
        self._usage = Usage(steps)
        self._moment = 0
        self._issued = 0  # dispatches handed over so far
        self._flights: deque[_Flight] = deque()  # of the steps that are unfinished, in order
        self._readers = _reader_counts(graph, steps)
        self._buffers = Buffers(graph, self._readers, self._kernels, self._record)
        computed = {a for node in graph.nodes for a in node.outputs}
        for a in graph.arrays:
            if a not in computed:
                self._buffers.allocate(a)

    def run(self) -> Usage:
        handed_over = 0  # rounds
        for moment, n in enumerate(self._usage.steps):
            self._moment = moment
            self._run(self._graph.nodes[n])
            while self._flights and self._flights[0].issued <= self._issued - self._limit:
                self._land()
            # the last round ends the evaluation; a round may be empty
            while handed_over + 1 < len(self._ends) and moment + 1 == self._ends[handed_over]:
                handed_over += 1
                self._wait(handed_over)
        return self._usage

    def _run(self, node: Node) -> None:
        """Evaluate an operation on the host, which hands it over to the device."""
        temporary = self._buffers.evaluate(node)
        holds = self._held_by(node) + temporary
        for buffer in holds:
            buffer.flights += 1
        for a in node.inputs:
            self._buffers.read(a)
        for a in node.outputs:
            if not self._readers.get(a):
                self._buffers.drop(a)
        for buffer in temporary:
            self._buffers.leave(buffer)
        self._issued += self._dispatches(node, len(temporary))
        self._flights.append(_Flight(self._issued, holds))

    def _held_by(self, node: Node) -> list[Buffer]:
        """Buffers that an operation holds until the device has run it.

        Those of its inputs and of its outputs but the first, which is not held by itself
        (``backend/cpu/eval.cpp``).
        """
        held = {}
        for a in (*node.inputs, *node.outputs[1:]):
            buffer = self._buffers[a]
            held[id(buffer)] = buffer
        for a in node.outputs[:1]:
            buffer = self._buffers[a]
            held.pop(id(buffer), None)
        return list(held.values())

    def _dispatches(self, node: Node, copies: int) -> int:
        """Dispatches of an operation: those that compute, and off a GPU one that lets go.

        Args:
            node: the operation.
            copies: operands that it copies first.
        """
        first = node.outputs[0]
        if node.name in VIEWS or (node.name in SHAPES and not self._buffers.is_new(first)):
            computing = 0
        elif node.name == "Concatenate":
            computing = len(node.inputs)
        elif (
            node.name in COPY_FIRST
            and self._buffers.target(node) is not None
            and self._buffers.is_new(first)
        ):
            computing = 2  # what could not be written over was copied first
        else:
            computing = 1
        return computing + copies + (0 if self._kernels else 1)

    def _wait(self, handed_over: int) -> None:
        """Let the host wait behind a round, until fewer rounds than its window are unfinished."""
        window = self._graph.rounds[handed_over - 1].window
        if window > handed_over:
            return
        finished = self._ends[handed_over - window]
        landed = self._moment + 1 - len(self._flights)
        for _ in range(landed, finished):
            self._land()

    def _land(self) -> None:
        """Let the device finish its oldest operation: what that read is held no longer."""
        for buffer in self._flights.popleft().holds:
            buffer.flights -= 1
            if not buffer.flights and not buffer.arrays:
                self._record(buffer, Change.LANDED)

    def _record(self, buffer: Buffer, change: Change) -> None:
        # a buffer is in use from the step that takes it, and free after the step that lets it go
        moment = self._moment if change is Change.TAKEN else self._moment + 1
        self._usage.events.append(Event(moment, buffer.array, buffer.nbytes, change))


def _reader_counts(graph: Graph, steps: list[int]) -> dict[int, int]:
    """How often each array is read; what stays to the end counts once more.

    What is never asked for is never evaluated, and keeps nothing alive.
    """
    computed = {a for node in graph.nodes for a in node.outputs}
    inputs = [a for a in graph.arrays if a not in computed]
    read = (a for n in steps for a in graph.nodes[n].inputs)
    counts: dict[int, int] = {}
    for a in chain(read, inputs, graph.outputs, graph.held):
        counts[a] = counts.get(a, 0) + 1
    return counts
