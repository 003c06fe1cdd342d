"""An optimizer that is registered in a cell does all that those on the shelf do."""

from __future__ import annotations

from math import prod

import mlx.core as mx
import mlx.optimizers as optim
import pytest

import qlab
from qlab import registry
from qlab.core.config.train import MlxLmOptimizer, OptimizerKind
from qlab.engine.train import checkpoint
from qlab.errors import ConfigError
from qlab.runtime.job import mlx_call

ROWS = [{"text": f"Row {n}: the house is tall."} for n in range(24)]
SMALL = {"rank": 2, "num_layers": 1, "keys": ["q_proj"]}


class Momentum(OptimizerKind):
    """Gradient descent with momentum."""

    name = "momentum"
    title = "Momentum: one moment a parameter"
    elementwise = True

    def state_nbytes(self, shape, itemsize):
        return itemsize * prod(shape)

    def make(self, learning_rate, weight_decay=0.0):
        return optim.SGD(learning_rate, momentum=0.9, weight_decay=weight_decay)


class Rowwise(Momentum):
    """The same, but taken array by array, and known to mlx-lm."""

    name = "rowwise"
    elementwise = False
    mlx_lm = MlxLmOptimizer("sgd", {"momentum": 0.9}, "It takes the same steps.")


@pytest.fixture(params=[Momentum, Rowwise])
def kind(request):
    kind = qlab.register("optimizers", request.param())
    yield kind
    registry.shelf("optimizers").pop(kind.name)


@pytest.fixture(scope="module")
def base(demo):
    q = qlab.Quantizer(demo, bits=4)
    yield q.quantize()
    q.close()


def config_of(kind, **changes):
    settings = {"iters": 6, "batch_size": 2, "max_seq_length": 16, "learning_rate": 0.05}
    return qlab.TrainConfig(optimizer=kind.name, **{**settings, **changes})


def test_it_trains_and_resumes_bit_for_bit(kind, base, tmp_path):
    config = config_of(kind, steps_per_save=3)
    whole = qlab.Trainer(qlab.Adapter(base, **SMALL), ROWS, config, val=0, path=tmp_path / "run")
    report = whole.run()
    assert report.status == "done" and report.steps == 6
    moved = [array for path, array in whole.adapter.parameters.items() if path.endswith("lora_b")]
    assert mlx_call(lambda: all(mx.any(array).item() for array in moved))  # zero at first
    resumed = qlab.Trainer.load(tmp_path / "run" / "step-000003", qlab.Adapter(base, **SMALL))
    resumed.run()
    assert [e.loss for e in resumed.events] == [e.loss for e in whole.events]
    one, other = whole.adapter.parameters, resumed.adapter.parameters
    assert one.keys() == other.keys()
    assert mlx_call(lambda: all(mx.array_equal(one[path], other[path]).item() for path in one))


def test_its_state_is_estimated_and_stored_to_the_byte(kind, base, tmp_path):
    adapter = qlab.Adapter(base, **SMALL)
    trainer = qlab.Trainer(adapter, ROWS, config_of(kind, iters=1), val=0, path=tmp_path / "run")
    trainer.run()
    file = str(checkpoint.latest(tmp_path / "run") / "optimizer.safetensors")
    stored = mlx_call(
        lambda: sum(array.nbytes for name, array in mx.load(file).items() if "." in name)
    )
    assert trainer.estimate.parts["optimizer"] == stored
    assert stored == sum(array.nbytes for array in adapter.parameters.values())


def test_the_recipe_for_mlx_lm_says_what_the_kind_says(kind, base, tmp_path):
    adapter = qlab.Adapter(base, **SMALL)
    trainer = qlab.Trainer(adapter, ROWS, config_of(kind), val=0, path=tmp_path / "run")
    if kind.mlx_lm is None:
        with pytest.raises(ConfigError, match="no optimizer 'momentum'; it has adafactor, adamw"):
            trainer.to_yaml("data", model="base")
    else:
        text = trainer.to_yaml("data", model="base")
        assert "optimizer: sgd" in text and "momentum: 0.9" in text
        assert "# - It takes the same steps." in text


def test_a_run_file_names_it(kind, base, tmp_path):
    adapter = qlab.Adapter(base, **SMALL)
    trainer = qlab.Trainer(adapter, ROWS, config_of(kind), val=0, path=tmp_path / "run")
    assert f"optimizer: {kind.name}" in trainer.to_yaml()
