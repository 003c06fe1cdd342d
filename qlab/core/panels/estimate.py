"""What the estimate panel shows at one moment, and what its sliders can reach, as values.

``qlab.lab.estimate.LiveEstimate`` makes an ``EstimateState``, ``views/estimate`` draws it, and the
browser answers with a ``Choice``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np

from qlab.core.config.code import setup_code
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import ModelSpec
from qlab.core.config.train import TrainConfig
from qlab.core.graph.formula import Formula
from qlab.core.graph.sizes import chunks
from qlab.core.machine import Machine
from qlab.core.memory.changes import Change
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.core.progress import Progress

BUDGETS = (
    "8 GB Mac",
    "16 GB Mac",
    "24 GB Mac",
    "32 GB Mac",
    "64 GB Mac",
    "128 GB Mac",
    "12 GB card",
    "16 GB card",
    "24 GB card",
    "48 GB card",
    "80 GB card",
)
_RANKS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The settings that the panel's controls show; the rest of a setup stays as it was.

    Attributes:
        mode: of the storage; empty leaves the weights as they are.
        bits: of the storage; 0 without a mode.
        group_size: of the storage; 0 without a mode.
        rank: of the adapter.
        num_layers: adapted blocks, counted from the last; never −1.
        batch_size: rows.
        max_seq_length: tokens in a row.
        grad_checkpoint: whether blocks are computed again in the backward pass.
        loss_chunk: tokens whose logits exist at once; 0 means all.
        optimizer: on the shelf.
        grad_accumulation_steps: batches that make one optimizer step.
    """

    mode: str
    bits: int
    group_size: int
    rank: int
    num_layers: int
    batch_size: int
    max_seq_length: int
    grad_checkpoint: bool
    loss_chunk: int
    optimizer: str
    grad_accumulation_steps: int

    @classmethod
    def of(cls, setup: Setup, blocks: int) -> Choice:
        """Return where the controls stand for a setup of a model with so many blocks."""
        storage = setup.plan.default if setup.plan else None
        lora = setup.adapter
        return cls(
            mode=storage.mode if storage else "",
            bits=storage.bits if storage else 0,
            group_size=storage.group_size if storage else 0,
            rank=lora.rank,
            num_layers=blocks if lora.num_layers < 0 else lora.num_layers,
            **{name: getattr(setup.train, name) for name in _OF_TRAIN},
        )

    def setup(self, base: Setup, blocks: int) -> Setup:
        """Return a setup with these settings; alpha, overrides and all else are those of ``base``.

        Raises:
            ConfigError: a setting is not legal.
        """
        now = Choice.of(base, blocks)
        setup = base
        if (self.mode, self.bits, self.group_size) != (now.mode, now.bits, now.group_size):
            setup = replace(setup, plan=self._plan(base))
        if self.rank != now.rank:
            setup = setup.with_value("rank", self.rank)
        if self.num_layers != now.num_layers:
            all_blocks = self.num_layers == blocks
            setup = setup.with_value("num_layers", -1 if all_blocks else self.num_layers)
        changed = {
            name: getattr(self, name)
            for name in _OF_TRAIN
            if getattr(self, name) != getattr(now, name)
        }
        if changed:
            setup = replace(setup, train=replace(setup.train, **changed))
        return setup

    def _plan(self, base: Setup) -> QuantPlan | None:
        if not self.mode:
            return None
        config = QuantConfig(self.mode, self.bits, self.group_size)
        return QuantPlan(config, base.plan.overrides if base.plan else {})


_RUN_SETTINGS = {field.name for field in fields(TrainConfig)}
_OF_TRAIN = tuple(field.name for field in fields(Choice) if field.name in _RUN_SETTINGS)


@dataclass(frozen=True, kw_only=True, eq=False)
class Reach:
    """What the sliders reach without asking the kernel.

    Exact bytes at every position, the peak wherever its formula is known.

    Attributes:
        configs: storages; None leaves the weights as they are.
        weights_nbytes: of the model by storage: float64 ``(configs,)``.
        ranks: that the slider stops at.
        optimizers: on the shelf.
        adapter_nbytes: by rank and number of adapted blocks: float64 ``(ranks, blocks)``.
        optimizer_nbytes: float64 ``(optimizers, ranks, blocks)``.
        kinds: by index of a config, for each number of adapted blocks: the number of the kind of
            step, and how many blocks of each sort a gradient reaches; None where no layer would be
            adapted.
        formulas: by ``step_name``.
    """

    configs: tuple[QuantConfig | None, ...]
    weights_nbytes: np.ndarray
    ranks: tuple[int, ...]
    optimizers: tuple[str, ...]
    adapter_nbytes: np.ndarray
    optimizer_nbytes: np.ndarray
    kinds: Mapping[int, tuple[tuple[int, tuple[int, ...]] | None, ...]] = field(
        default_factory=dict
    )
    formulas: Mapping[str, Formula] = field(default_factory=dict)


def step_name(kind: int, train: TrainConfig) -> str:
    """Return the name of the formula of a kind of step with these settings of the run.

    The browser makes the same name (``estimate`` in ``views/estimate/answers.js``).
    """
    count = 0
    if train.loss_chunk:
        count = chunks(train.batch_size, train.max_seq_length, train.loss_chunk)
    accumulates = int(train.grad_accumulation_steps > 1)
    return f"{kind} {train.optimizer} {int(train.grad_checkpoint)} {count} {accumulates}"


def rank_stops(most: int, now: int) -> tuple[int, ...]:
    """Return where the rank's slider stops, ascending.

    Args:
        most: the largest legal rank.
        now: the present rank, at which the slider stops too.
    """
    legal = {rank for rank in _RANKS if rank <= most}
    return tuple(sorted(legal | {now}))


@dataclass(frozen=True, kw_only=True, eq=False)
class EstimateState:
    """One moment of an estimate panel.

    Attributes:
        spec: the model.
        setup: what is chosen now.
        estimate: of that setup, at the best level known; None while its kind of step is being read.
        reach: what the sliders reach.
        machine: the budget chosen now.
        budgets: that the menu offers.
        band: of a formula or a trace, as in ``MemoryEstimate``.
        context: tokens that the model was made for, or None.
        changes: those that would make it fit; None if not looked for yet.
        progress: the running job, or None.
        error: the last error in words, or an empty string.
        loaded: whether the weights are there, so that a real step can be run.
        linked: what moves together with the sliders, such as ``quantizer``; or empty.
        notes: what to know about the model's source.
    """

    spec: ModelSpec
    setup: Setup
    estimate: MemoryEstimate | None
    reach: Reach
    machine: Machine
    budgets: tuple[Machine, ...]
    band: tuple[float, float]
    context: int | None = None
    changes: tuple[Change, ...] | None = None
    progress: Progress | None = None
    error: str = ""
    loaded: bool = False
    linked: str = ""
    notes: tuple[str, ...] = ()

    @property
    def blocks(self) -> int:
        """Number of the model's blocks."""
        return len(self.spec.blocks)

    @property
    def choice(self) -> Choice:
        """Where the controls stand."""
        return Choice.of(self.setup, self.blocks)

    @property
    def code(self) -> str:
        """The Python that rebuilds this state."""
        return setup_code(self.setup.plan, self.setup.adapter, self.setup.train)
