"""The order in which MLX evaluates a graph (``eval_impl`` of ``mlx/transforms.cpp``, 0.32).

``simulate`` runs a graph in this order. Computes nothing.
"""

from __future__ import annotations

from qlab.core.graph.graph import Graph

MAX_WIDTH = 20  # MLX_BFS_MAX_WIDTH
_OUTPUTS = -1  # stands for a node that reads what is asked for


def order(graph: Graph) -> list[list[int]]:
    """Return node indices in the order in which MLX evaluates them, one list for each round.

    A round holds what its arrays need and earlier rounds have not evaluated; what is never asked
    for is in none.
    """
    makers = graph.makers()
    asked = [asked.arrays for asked in graph.rounds] or [tuple(graph.outputs)]
    done: set[int] = set()
    rounds = []
    for arrays in asked:
        rounds.append(_Tape(graph, makers, arrays, done).order())
        done.update(rounds[-1])
    return rounds


class _Tape:
    """MLX's tape of one evaluation, filled breadth first from what is asked for.

    A node comes on the tape once all its readers are there, so that, read backwards, the tape has
    every node after its inputs. Where more than ``MAX_WIDTH`` nodes of the tape are waiting for
    their inputs to be visited, the rest of the present node's inputs is put off, and the search
    goes deeper first: wide graphs would otherwise hold many arrays at once.

    Args:
        graph: the computation.
        makers: index of the node that makes an array, by the array's id.
        asked: ids of arrays.
        done: indices of nodes that were evaluated before.
    """

    def __init__(
        self, graph: Graph, makers: dict[int, int], asked: tuple[int, ...], done: set[int]
    ) -> None:
        self._graph = graph
        self._makers = makers
        self._wanted = [makers[a] for a in asked if a in makers and makers[a] not in done]
        self._degree = self._readers(done)  # readers that are not on the tape yet, by node
        self._tape = [_OUTPUTS]
        self._visited = 0  # nodes of the tape whose inputs were visited, at least in part

    def order(self) -> list[int]:
        """Return the nodes that are evaluated, first to last."""
        put_off: list[tuple[int, int]] = []  # nodes, and the first of their inputs not visited
        left = len(self._degree)
        while left and (self._visited < len(self._tape) or put_off):
            if self._visited < len(self._tape):
                node = self._tape[self._visited]
                start = 0
                self._visited += 1
            else:
                node, start = put_off.pop()
            before = len(self._tape)
            stopped = self._visit(node, start)
            left -= len(self._tape) - before
            if stopped is not None:
                put_off.append((node, stopped))
        return self._tape[:0:-1]

    def _visit(self, node: int, start: int) -> int | None:
        """Visit a node's inputs from ``start`` on; return where the width stopped it, if it did."""
        inputs = self._inputs(node)
        for at in range(start, len(inputs)):
            if inputs[at] not in self._degree:
                continue
            if len(self._tape) - self._visited >= MAX_WIDTH:
                return at
            self._degree[inputs[at]] -= 1
            if not self._degree[inputs[at]]:
                self._tape.append(inputs[at])
        return None

    def _inputs(self, node: int) -> list[int]:
        if node == _OUTPUTS:
            return self._wanted
        return [self._makers.get(a, -1) for a in self._graph.nodes[node].inputs]

    def _readers(self, done: set[int]) -> dict[int, int]:
        """How often each node that must be evaluated is read, or asked for."""
        degree: dict[int, int] = {}
        for n in self._wanted:
            degree[n] = degree.get(n, 0) + 1
        stack = list(dict.fromkeys(self._wanted))
        seen = set(self._wanted)
        while stack:
            for a in self._graph.nodes[stack.pop()].inputs:
                n = self._makers.get(a, -1)
                if n < 0 or n in done:
                    continue
                degree[n] = degree.get(n, 0) + 1
                if n not in seen:
                    seen.add(n)
                    stack.append(n)
        return degree
