"""The order in which MLX evaluates a graph (``mlx/transforms.cpp``, 0.32). Computes nothing."""

from __future__ import annotations

from qlab.core.graph.graph import Graph

MAX_WIDTH = 20  # MLX_BFS_MAX_WIDTH


def order(graph: Graph) -> list[list[int]]:
    """Return node indices in the order in which MLX evaluates them, round by round.

    Each round goes breadth first from what is asked for, of limited width.
    """
    makers = graph.makers()
    done = set()
    made = []
    for asked in graph.rounds or [tuple(graph.outputs)]:
        made.append(_round(graph, makers, asked, done))
        done.update(made[-1])
    return made


def _round(
    graph: Graph, makers: dict[int, int], asked: tuple[int, ...], done: set[int]
) -> list[int]:
    """What is evaluated when arrays are asked for, and some nodes are done."""
    wanted = [makers[a] for a in asked if a in makers and makers[a] not in done]
    degree: dict[int, int] = {}
    for n in wanted:
        degree[n] = degree.get(n, 0) + 1
    stack = list(dict.fromkeys(wanted))
    seen = set(wanted)
    while stack:
        for array in graph.nodes[stack.pop()].inputs:
            n = makers.get(array, -1)
            if n >= 0 and n not in done:
                degree[n] = degree.get(n, 0) + 1
                if n not in seen:
                    seen.add(n)
                    stack.append(n)
    tape: list[int] = [-1]  # -1 asks for the outputs
    waiting: list[tuple[int, int]] = []
    i = 0
    left = len(degree)
    while left and (i < len(tape) or waiting):
        if i >= len(tape):
            node, j = waiting.pop()
        else:
            node = tape[i]
            j = 0
            i += 1
        inputs = wanted if node < 0 else [makers.get(a, -1) for a in graph.nodes[node].inputs]
        while j < len(inputs):
            if inputs[j] in degree:
                if len(tape) - i >= MAX_WIDTH:
                    waiting.append((node, j))
                    break
                degree[inputs[j]] -= 1
                if not degree[inputs[j]]:
                    left -= 1
                    tape.append(inputs[j])
            j += 1
    return tape[:0:-1]
