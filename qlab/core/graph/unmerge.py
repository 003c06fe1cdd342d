"""A graph as it is evaluated.

Reading a graph merges what is equal, and here every reader gets back what it really has.

Follows how MLX 0.32 builds a graph (``mlx/ops.cpp``, ``mlx/transforms.cpp``). Knows no framework.
"""

from __future__ import annotations

from dataclasses import replace

from qlab.core.graph.graph import Array, Graph, Node


def unmerged(graph: Graph, loss: int | None = None) -> Graph:
    """Return a graph in which nothing is shared that is not shared when it is evaluated.

    - Numbers that follow from numbers alone are computed by every reader for itself, unless they
      are asked for.
    - Every operation on the way forward makes its own broadcasts and flattens its own operands; its
      gradient reads the same.

    Args:
        graph: as it was read, before fusion.
        loss: id of the array that gradients start from: the way forward is what it follows from.
            None if there is no way back.
    """
    return _Unmerging(graph, loss).run()


class _Unmerging:
    def __init__(self, graph: Graph, loss: int | None) -> None:
        self.graph = graph
        self.makers = graph.makers()
        self.made = replace(graph, arrays=dict(graph.arrays), nodes=[])
        self.forward = set(range(len(graph.nodes))) if loss is None else self._history(loss)
        self.fixed = {
            a for a, array in graph.arrays.items() if array.role == "constant"
        }  # follows from constants alone
        asked = {*graph.outputs, *graph.held}
        self.numbers: set[int] = set()
        for node in graph.nodes:
            if all(a in self.fixed for a in node.inputs):
                self.fixed.update(node.outputs)
            sides = (*node.inputs, *node.outputs)
            plain = all(a in self.numbers or a not in self.makers for a in node.inputs)
            if (
                node.inputs
                and plain
                and all(graph.arrays[a].size == 1 for a in sides)
                and asked.isdisjoint(node.outputs)
            ):
                self.numbers.update(node.outputs)
        self.taken: set[int] = set()

    def run(self) -> Graph:
        for n, node in enumerate(self.graph.nodes):
            self.made.nodes.append(
                replace(node, inputs=tuple(self._input(n, node, a) for a in node.inputs))
            )
        return self.made

    def _input(self, n: int, node: Node, a: int) -> int:
        """What a node reads in place of an array."""
        maker = self.graph.nodes[self.makers[a]] if a in self.makers else None
        if maker is None:
            return a
        own = a in self.numbers
        if maker.name == "Broadcast":
            own = (
                n in self.forward
                or self.makers[a] not in self.forward
                and self.graph.arrays[maker.inputs[0]].size == 1
            )
        elif maker.name == "Flatten":
            own = n in self.forward and node.name == "Matmul"
        elif maker.name == "Full":
            own = a in self.fixed
        return self._own(n, a) if own else a

    def _own(self, n: int, a: int) -> int:
        """Give the first reader the array itself, and every other one a copy."""
        if a not in self.taken:
            self.taken.add(a)
            return a
        maker = self.graph.nodes[self.makers[a]]
        inputs = tuple(self._input(n, maker, x) for x in maker.inputs)
        copy = self._add(a)
        self.made.nodes.append(replace(maker, inputs=inputs, outputs=(copy,)))
        return copy

    def _history(self, a: int) -> set[int]:
        """Nodes that an array follows from."""
        chain: set[int] = set()
        waiting = [a]
        while waiting:
            x = waiting.pop()
            if x in self.makers and self.makers[x] not in chain:
                chain.add(self.makers[x])
                waiting.extend(self.graph.nodes[self.makers[x]].inputs)
        return chain

    def _add(self, like: int) -> int:
        """Take in another array; return its id."""
        array = self.graph.arrays[like]
        return self.made.add(Array(array.shape, array.itemsize))
