"""Estimates of a model that does not exist, by arithmetic that a test can follow."""

from __future__ import annotations

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.config.train import TrainConfig
from qlab.core.graph.parts import PARTS
from qlab.core.machine import budget
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import Setup

MACHINE = budget(1e9)
SPEC = ModelSpec(
    "toy",
    tuple(
        LayerSpec(
            path=f"model.layers.{block}.mlp.up_proj", kind="linear", shape=(64, 128), nbytes=16384
        )
        for block in range(4)
    ),
)
SETUP = Setup(
    QuantPlan(QuantConfig(bits=4)),
    LoRAConfig(rank=8),
    TrainConfig(batch_size=4, max_seq_length=100, loss_chunk=0),
)


def at(setup: Setup) -> MemoryEstimate:
    """Every token of a batch takes 1000 bytes, half of that with checkpoints."""
    train = setup.train
    token_nbytes = 500 if train.grad_checkpoint else 1000
    blocks = setup.adapter.num_layers if setup.adapter.num_layers > 0 else len(SPEC.blocks)
    bits = setup.plan.default.bits if setup.plan else 16
    parts = dict.fromkeys(PARTS, 0)
    parts["weights"] = 10_000 * bits
    parts["adapter"] = 100 * blocks * setup.adapter.rank
    parts["activations"] = token_nbytes * train.batch_size * train.max_seq_length
    parts["logits"] = 50_000 if train.loss_chunk else 100_000
    return MemoryEstimate(
        spec=SPEC,
        setup=setup,
        parts=parts,
        level="formula",
        moment="loss",
        band=(0.9, 1.2),
        machine=MACHINE,
        context=512,
    )


EST = at(SETUP)
