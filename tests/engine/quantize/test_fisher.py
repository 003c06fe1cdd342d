"""Calibration against a direct computation of the weight gradients."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from qlab.engine.quantize.fisher import calibrate
from qlab.runtime.job import Job
from qlab.runtime.job import mlx_call


class Tiny(nn.Module):
    """An embedding tied to the head around one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.middle = nn.Linear(6, 6, bias=True)

    def __call__(self, tokens):
        return self.embed.as_linear(nn.silu(self.middle(self.embed(tokens))))


def test_margins_are_those_of_the_squared_weight_gradient():
    def build():
        mx.random.seed(3)
        model = Tiny()
        mx.eval(model.parameters())
        return model

    model = mlx_call(build)
    tokens = mx.array([[1, 4, 4, 7, 2]])
    shapes = {"embed": (11, 6), "middle": (6, 6)}
    found = Job(lambda: calibrate(model, shapes, [tokens], "test", seed=5)).start().wait()

    def direct():
        _, key = mx.random.split(mx.random.key(5))
        drawn = mx.random.categorical(model(tokens), key=key)

        def score(weight):
            twin = Tiny()
            twin.update(model.parameters())
            twin.middle.weight = weight
            return -nn.losses.cross_entropy(twin(tokens), drawn, reduction="sum")

        square = mx.square(mx.grad(score)(model.middle.weight))
        return np.array(square.sum(1)), np.array(square.sum(0))

    rows, columns = mlx_call(direct)
    r, c = found.pairs["middle"][0]
    assert np.allclose(r, rows / 5, rtol=1e-4)
    assert np.allclose(c * r.sum() * 5, columns, rtol=1e-4)
    assert len(found.pairs["embed"]) == 2 and found.tokens == 5
    lookup, _ = found.pairs["embed"][1]
    assert set(np.flatnonzero(lookup)) <= {1, 2, 4, 7}
    assert "inner" not in model.middle and "weight" in model.middle
