"""A graph as it is evaluated: reading a graph merges what is equal, and here every reader gets back what it really has.

Follows how MLX 0.32 builds a graph (``mlx/ops.cpp``, ``mlx/transforms.cpp``). Knows no framework.
"""

from __future__ import annotations

from dataclasses import replace

from qlab.core.graph import Array, Graph, Node


def unmerged(graph: Graph, loss: int | None = None) -> Graph:
    """Return a graph in which nothing is shared that is not shared when it is evaluated.

    - Numbers that follow from numbers alone are computed by every reader for itself, unless they are asked for.
    - Every operation on the way forward makes its own broadcasts and flattens its own operands; its gradient reads the same.
    - A product with a dequantized weight dequantizes again on the way back, once its slope is there
      (``engine/linear.product``), and so keeps no dense weight; nor does an adapter keep what it makes of the input.

    Args:
        graph: as it was read, before fusion.
        loss: id of the array that gradients start from: the way forward is what it follows from. None if there is no way back.
    """
    return _Unmerging(graph, loss).run()


class _Unmerging:
    def __init__(self, graph: Graph, loss: int | None) -> None:
        self.graph, self.makers = graph, graph.makers()
        self.made = replace(graph, arrays=dict(graph.arrays), nodes=[])
        self.forward = set(range(len(graph.nodes))) if loss is None else set(self._history(loss)[0])
        self.fixed = {a for a, array in graph.arrays.items() if array.role == "constant"}  # follows from constants alone
        self.frozen = {a for a, array in graph.arrays.items() if array.role == "weights"}  # from weights, and constants
        asked = {*graph.outputs, *graph.held}
        self.numbers: set[int] = set()
        for node in graph.nodes:
            if all(a in self.fixed for a in node.inputs):
                self.fixed.update(node.outputs)
            elif all(a in self.fixed or a in self.frozen for a in node.inputs):
                self.frozen.update(node.outputs)
            sides = (*node.inputs, *node.outputs)
            plain = all(a in self.numbers or a not in self.makers for a in node.inputs)
            if node.inputs and plain and all(graph.arrays[a].size == 1 for a in sides) and asked.isdisjoint(node.outputs):
                self.numbers.update(node.outputs)
        thin = {node.outputs[0]: node.inputs[0] for node in graph.nodes if node.name == "Matmul"}
        added = (node.inputs[2] for node in graph.nodes if node.name == "AddMM")
        self.inner = {thin[a] for a in added if a in thin}  # what adapters make of x
        self.taken = set(self.inner)
        self.products: dict[int, int] = {}  # what a product with a made weight was given, by what it gives

    def run(self) -> Graph:
        for n, node in enumerate(self.graph.nodes):
            inputs = self._product(n, node) if self._is_product(node) else tuple(self._input(n, node, a) for a in node.inputs)
            self.made.nodes.append(replace(node, inputs=inputs))
            if node.name == "Unflatten" and node.inputs[0] in self.products:
                self._hand_written(self.products[node.inputs[0]], node.outputs[0])
        return self.made

    def _input(self, n: int, node: Node, a: int) -> int:
        """What a node reads in place of an array."""
        maker = self.graph.nodes[self.makers[a]] if a in self.makers else None
        if maker is None:
            return a
        own = a in self.numbers
        if maker.name == "Broadcast":
            own = n in self.forward or self.makers[a] not in self.forward and self.graph.arrays[maker.inputs[0]].size == 1
        elif maker.name == "Flatten":
            own = n in self.forward and node.name == "Matmul"
        elif maker.name == "Full":
            own = a in self.fixed
        elif a in self.inner:
            own = n not in self.forward
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

    # --- products with frozen weights -------------------------------------------------------------------------------

    def _is_product(self, node: Node) -> bool:
        """Whether the second operand is a weight that was made, not one that is stored so."""
        return node.name in ("Matmul", "AddMM") and node.inputs[1] in self.frozen and self._root(node.inputs[1]) in self.makers

    def _product(self, n: int, node: Node) -> tuple[int, ...]:
        x, weight, *added = node.inputs
        flat = x in self.makers and self.graph.nodes[self.makers[x]].name == "Flatten"
        given = self._own(n, x) if flat else x
        if n in self.forward:
            self.products[node.outputs[0]] = self.graph.nodes[self.makers[x]].inputs[0] if flat else x
            return given, self._dense(weight, None), *added
        return given, self._dense(self._root(weight), x), *added  # the gradient multiplies by the weight as it is

    def _dense(self, weight: int, after: int | None) -> int:
        """Make a weight anew, once ``after`` is there; the first time it is there already."""
        if weight not in self.taken and after is None:
            self.taken.add(weight)
            return weight
        chain, leaves = self._history(weight)
        new: dict[int, int] = {}
        if after is not None:
            tied = [a for a in leaves if a in self.frozen]
            new = {a: self._add(a) for a in tied}
            self.made.nodes.append(Node("Depends", (*tied, after), tuple(new.values())))
        for n in chain:
            node = self.graph.nodes[n]
            inputs = tuple(new.get(a, a) for a in node.inputs)
            new.update({a: self._add(a) for a in node.outputs})
            self.made.nodes.append(replace(node, inputs=inputs, outputs=tuple(new[a] for a in node.outputs)))
        return new[weight]

    def _hand_written(self, x: int, y: int) -> None:
        """Put what a function with a gradient of its own adds behind the operation that was added last."""
        last = self.made.nodes[-1]
        plain, cut = self._add(y), self._add(y)
        self.made.nodes[-1:] = [
            replace(last, outputs=(plain,)), Node("StopGradient", (plain,), (cut,)), Node("CustomTransforms", (x, cut), (y,)),
        ]  # fmt: skip

    def _root(self, a: int) -> int:
        """The array of which this one is only another view."""
        while a in self.makers and self.graph.nodes[self.makers[a]].name == "Transpose":
            a = self.graph.nodes[self.makers[a]].inputs[0]
        return a

    def _history(self, a: int) -> tuple[list[int], list[int]]:
        """Nodes that make an array, each after those that it needs, and what they start from."""
        chain: set[int] = set()
        leaves: dict[int, None] = {}
        waiting = [a]
        while waiting:
            x = waiting.pop()
            if x not in self.makers:
                leaves[x] = None
            elif self.makers[x] not in chain:
                chain.add(self.makers[x])
                waiting.extend(self.graph.nodes[self.makers[x]].inputs)
        return sorted(chain), list(leaves)

    def _add(self, like: int) -> int:
        """Take in another array; return its id."""
        array = self.graph.arrays[like]
        return self.made.add(Array(array.shape, array.itemsize))
