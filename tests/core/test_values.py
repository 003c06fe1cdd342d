"""Configs, plans and reports travel: they pickle, and they copy deeply."""

from __future__ import annotations

import copy
import pickle

import pytest

from qlab.core.adapt.report import AdapterReport
from qlab.core.adapt.report import LayerAdapter
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.config.spec import LayerSpec
from qlab.core.config.spec import ModelSpec
from qlab.core.config.train import TrainConfig
from qlab.core.evaluate.judge import Column
from qlab.core.evaluate.judge import JudgeReport
from qlab.core.evaluate.judge import Sample
from qlab.core.evaluate.text import EvalReport
from qlab.core.graph.parts import PARTS
from qlab.core.machine import Machine
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.core.quantize.report import LayerError
from qlab.core.quantize.report import QuantReport
from qlab.core.train.report import RunReport

PATH = "model.layers.0.mlp.down_proj"
PLAN = QuantPlan(QuantConfig("affine", 3, 32), {PATH: QuantConfig("mxfp4"), "lm_head": None})
LORA = LoRAConfig(rank=4, keys=["q_proj"])
TRAIN = TrainConfig(iters=10, batch_size=2)
SPEC = ModelSpec("tiny", (LayerSpec(path=PATH, kind="linear", shape=(64, 128), nbytes=16384),))

VALUES = {
    "QuantConfig": PLAN.default,
    "QuantPlan": PLAN,
    "LoRAConfig": LORA,
    "TrainConfig": TRAIN,
    "QuantReport": QuantReport(
        plan=PLAN,
        layers=(
            LayerError(
                path=PATH,
                config=PLAN.default,
                relative_error=0.1,
                relative_error_se=0.0,
                depth="exact",
                max_abs_error=0.2,
                kl_nats=0.01,
                kurtosis=3.0,
                nbytes=4096,
            ),
        ),
        nbytes=4096,
        nbytes_before=16384,
        size=8192,
    ),
    "AdapterReport": AdapterReport(
        config=LORA,
        layers=(LayerAdapter(path=PATH, rank=4, size=768, nbytes=3072, relative_error=0.1),),
        model_size=8192,
    ),
    "MemoryEstimate": MemoryEstimate(
        spec=SPEC,
        setup=Setup(PLAN, LORA, TRAIN),
        parts=dict.fromkeys(PARTS, 1000),
        level="formula",
        moment="loss",
        band=(0.9, 1.1),
        machine=Machine("16 GB Mac", int(16e9), int(10e9)),
    ),
    "EvalReport": EvalReport(
        kl_nats=0.01,
        kl_nats_se=0.001,
        kl_nats_p99=0.1,
        top1_flips=0.05,
        perplexity=12.0,
        perplexity_before=11.0,
        tokens=100,
    ),
    "JudgeReport": JudgeReport(
        columns=(
            Column(name="full precision", nll=1.0),
            Column(name="quantized", nll=1.5, kl_nats=0.1),
        ),
        samples=(Sample("2 + 2 =", ("4", "5")),),
        teacher="exact",
    ),
    "RunReport": RunReport(
        name="run",
        model="tiny",
        storage="affine 3-bit g32",
        adapter="lora r4",
        status="done",
        steps=10,
        iters=10,
        loss=1.0,
        val_loss=1.1,
        best_val_loss=1.1,
        best_step=10,
        tokens=1000,
        tokens_per_second=100.0,
        seconds=10.0,
        predicted_nbytes=1000,
        peak_nbytes=1100,
        path="runs/run",
    ),
}
COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", VALUES)
def test_a_value_survives_a_copy(name, how):
    value = VALUES[name]
    copied = COPIES[how](value)
    assert type(copied).__name__ == name
    assert repr(copied) == repr(value)
    assert vars(copied).keys() == vars(value).keys()


def test_a_copied_plan_is_the_same_plan_and_as_immutable():
    copied = pickle.loads(pickle.dumps(PLAN))
    assert copied == PLAN and hash(copied) == hash(PLAN)
    with pytest.raises(TypeError):
        copied.overrides[PATH] = None
