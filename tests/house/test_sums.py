"""No sum over a whole array is left to MLX's CPU, which adds float32 numbers one after the other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

QLAB = Path(__file__).parents[2] / "qlab"
ROOMS = ("adapters", "engine", "nn", "ops", "optimizers", "schemes", "solvers")
FILES = [file for room in ROOMS for file in sorted((QLAB / room).rglob("*.py"))]
REDUCTIONS = {"sum", "mean", "norm", "var", "std"}
OVER_A_VOCABULARY = {"logsumexp", "cross_entropy", "log_softmax"}
MODULES = {"mx", "mx.fast", "mx.linalg", "nn", "nn.losses"}  # functions, not methods of an array

# what is reduced, by file: arrays of numpy, of few numbers, or whose sum nobody reads
ALLOWED = {
    "engine/adapt/activations.py": ["self.power"],  # as many as a layer has inputs
    "engine/adapt/preview.py": ["left", "whole"],  # numpy
    "engine/adapt/recovery.py": ["energies[chosen]", "energies"],  # numpy
    "engine/data/batches.py": ["is_real", "of_members"],  # numpy
    "engine/evaluate/divergence.py": ["kl_per_token(p, q)"],  # one of each token of a row
    "engine/evaluate/judge.py": [  # numpy
        "row.nll",
        "row.hits",
        "row.kl",
        "row.flips",
        "~np.isfinite(column.scores.nll)",
    ],
    "engine/evaluate/teacher.py": ["self.floor"],  # numpy
    "engine/memory/read_graph.py": ["logits"],  # read for its memory, never computed
    "engine/quantize/fisher.py": [
        "rows",
        "cross_entropy(logits, labels)",
    ],  # numpy; tokens of a row
    "engine/step/blockwise.py": ["batch.weights"],  # ones, at most 2²⁴
    # 32,768 losses are 6e-7 off; MLX's CUDA kernel, which adds in a tree
    "engine/step/loss.py": ["losses * weights", "logits"],
    # ones, at most 2²⁴; differentiated, but not read
    "engine/step/whole.py": ["batch.weights", "hidden * mx.stop_gradient(cotangent)"],
    "engine/train/validate.py": ["mask", "losses"],  # numpy; 512 at once
    "solvers/searched.py": ["power"],  # as many as a layer has inputs
}


def reductions(file: Path) -> list[tuple[str, int, str]]:
    """What is reduced over all its numbers by something else than ``ops/sums.py``."""
    found = []
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        owner = ast.unparse(node.func.value)
        name = node.func.attr
        if owner == "np":  # numpy adds pairwise
            continue
        is_function = owner in MODULES
        has_axis = bool(node.args[is_function:]) or any(k.arg == "axis" for k in node.keywords)
        if name in OVER_A_VOCABULARY or (name in REDUCTIONS and not has_axis):
            argument = ast.unparse(node.args[0]) if is_function and node.args else owner
            found.append((file.relative_to(QLAB).as_posix(), node.lineno, argument))
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(QLAB).as_posix())
def test_whole_arrays_are_summed_in_stretches(file):
    if file.name == "sums.py":
        return
    bare = [
        f"line {line}: {what}"
        for path, line, what in reductions(file)
        if what not in ALLOWED.get(path, [])
    ]
    assert not bare, "use qlab.ops.sums, or say in ALLOWED why not"


def test_every_exception_is_used():
    used = {(path, what) for file in FILES for path, _, what in reductions(file)}
    allowed = {(path, what) for path, arrays in ALLOWED.items() for what in arrays}
    assert allowed <= used


def test_a_bare_sum_is_found(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "QLAB", tmp_path)
    file = tmp_path / "x.py"
    file.write_text("x.sum()\nmx.sum(x)\nx.sum(0)\nmx.mean(x, axis=1)\nmx.linalg.norm(x)\n")
    assert [line for _, line, _ in reductions(file)] == [1, 2, 5]
