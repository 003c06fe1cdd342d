"""A graph as MLX really builds it: what reading has merged is taken apart again.

``mx.export_function`` merges operations that are equal; when a step is evaluated without
compilation, each of its operations has made its own. Follows how MLX 0.32 builds a graph
(``mlx/ops.cpp``, ``mlx/transforms.cpp``). Knows no framework.
"""

from __future__ import annotations

from dataclasses import replace

from qlab.core.graph.graph import Array, Graph, Node


def unmerged(graph: Graph, loss: int | None = None) -> Graph:
    """Return a graph in which nothing is shared that is not shared when it is evaluated.

    - Single numbers that follow from single numbers alone are computed by every reader for itself
      (``ops.cpp`` makes a new array of each Python number), unless they are asked for.
    - Every operation of the forward pass makes its own broadcasts, and every product flattens its
      own operands; its gradient reads the same arrays as it does.

    Args:
        graph: as it was read, before fusion.
        loss: id of the array that gradients start from: the forward pass is what it follows from.
            None if there is no backward pass.
    """
    return _Unmerging(graph, loss).run()


class _Unmerging:
    def __init__(self, graph: Graph, loss: int | None) -> None:
        self._graph = graph
        self._makers = graph.makers()
        arrays = dict(graph.arrays)
        self._new = replace(graph, arrays=arrays, nodes=[])
        if loss is None:
            self._forward = set(range(len(graph.nodes)))
        else:
            self._forward = self._nodes_behind(loss)
        self._constant = self._constants()
        self._numbers = self._single_numbers()
        self._taken: set[int] = set()  # arrays whose first reader has them

    def run(self) -> Graph:
        nodes = self._new.nodes
        for n, node in enumerate(self._graph.nodes):
            inputs = tuple(self._input(n, node, a) for a in node.inputs)
            unshared = node._replace(inputs=inputs)
            nodes.append(unshared)
        return self._new

    def _constants(self) -> set[int]:
        """Arrays that follow from constants alone."""
        constant = set()
        for a, array in self._graph.arrays.items():
            if array.role == "constant":
                constant.add(a)
        for node in self._graph.nodes:
            if all(a in constant for a in node.inputs):
                constant.update(node.outputs)
        return constant

    def _single_numbers(self) -> set[int]:
        """Arrays of one element that follow from such arrays alone, and are not asked for."""
        arrays = self._graph.arrays
        asked = {*self._graph.outputs, *self._graph.held}
        numbers: set[int] = set()
        for node in self._graph.nodes:
            if not node.inputs:
                continue
            sides = (*node.inputs, *node.outputs)
            if any(arrays[a].size != 1 for a in sides):
                continue
            follows = all(a in numbers or a not in self._makers for a in node.inputs)
            if follows and asked.isdisjoint(node.outputs):
                numbers.update(node.outputs)
        return numbers

    def _input(self, n: int, node: Node, a: int) -> int:
        """Return what a node reads in the place of an array."""
        if a in self._makers and self._has_own(n, node, a):
            return self._own(n, a)
        return a

    def _has_own(self, n: int, node: Node, a: int) -> bool:
        """Whether a reader of an array has made it for itself."""
        maker = self._graph.nodes[self._makers[a]]
        if maker.name == "Broadcast":
            if n in self._forward:
                return True
            source = self._graph.arrays[maker.inputs[0]]
            made_by_backward = self._makers[a] not in self._forward
            return made_by_backward and source.size == 1
        if maker.name == "Flatten":
            return n in self._forward and node.name == "Matmul"
        if maker.name == "Full":
            return a in self._constant
        return a in self._numbers

    def _own(self, n: int, a: int) -> int:
        """Give the first reader the array itself, and every other one a copy."""
        if a not in self._taken:
            self._taken.add(a)
            return a
        maker = self._graph.nodes[self._makers[a]]
        inputs = tuple(self._input(n, maker, x) for x in maker.inputs)
        array = self._graph.arrays[a]
        copy = Array(array.shape, array.itemsize)
        copy_id = self._new.add(copy)
        node = maker._replace(inputs=inputs, outputs=(copy_id,))
        self._new.nodes.append(node)
        return copy_id

    def _nodes_behind(self, a: int) -> set[int]:
        """Nodes that an array follows from."""
        behind: set[int] = set()
        waiting = [a]
        while waiting:
            made = waiting.pop()
            n = self._makers.get(made)
            if n is not None and n not in behind:
                behind.add(n)
                node = self._graph.nodes[n]
                waiting.extend(node.inputs)
        return behind
