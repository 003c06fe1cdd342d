"""Finds what the sliders of an estimate reach.

Exact bytes at every position, and formulas of the kinds of step nearby.

Runs on the MLX thread. Knows no budget and shows nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import replace
from math import prod

import numpy as np

from qlab import registry
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import LayerSpec
from qlab.core.graph.formula import CHUNKS, Formula
from qlab.core.memory.setup import Setup
from qlab.core.panels.estimate import Reach, rank_stops, step_name
from qlab.engine.memory.forecast import SAMPLE, Forecast
from qlab.errors import ConfigError

_KEPT = 40  # formulas that the browser holds
_FEW = (
    max(SAMPLE.values()) + 1
)  # from so many blocks of a sort on, a formula holds for any number of them


class Sweep:
    """What the sliders of one estimate reach; grows as kinds of step are read.

    Args:
        forecast: of the model.
        setup: shown first. Its overrides, keys, kind and dtype of the adapter hold for all
            positions until ``follow``.
    """

    def __init__(self, forecast: Forecast, setup: Setup) -> None:
        self._forecast = forecast
        self._numbers: dict[Hashable, int] = {}
        self.follow(setup)

    def follow(self, setup: Setup) -> None:
        """Take up other overrides or another rank than the slider has; formulas stay."""
        spec = self._forecast.spec
        plan = setup.plan
        lora = setup.adapter
        modes = () if spec.storage else registry.shelf("schemes").values()
        configs = (
            None,
            *(QuantConfig(s.name, b, g) for s in modes for b in s.bits for g in s.group_sizes),
        )
        if plan and plan.default not in configs:
            configs = (*configs, plan.default)
        own = plan.overrides if plan else {}
        plans = [QuantPlan(c, own) if c else None for c in configs]
        sizes = [self._forecast.inputs(replace(setup, plan=p))["weights"] for p in plans]
        targets = replace(lora, rank=1, num_layers=-1).targets(spec)
        ranks = rank_stops(min(min(x.shape[-2:]) for x in targets), lora.rank)
        optimizers = tuple(registry.shelf("optimizers"))
        adapter, states = _trained_nbytes(setup, targets, ranks, optimizers, self._blocks)
        known = self.reach.formulas if hasattr(self, "reach") else {}
        self.reach = Reach(
            configs, np.array(sizes, float), ranks, optimizers, adapter, states, {}, known
        )
        self._held = self._ground(setup)

    @property
    def _blocks(self) -> list[int]:
        return list(self._forecast.spec.blocks)

    def read(self, setup: Setup) -> None:
        """Add the formula of a setup's kind of step, and the kinds of its storage.

        Raises:
            ConfigError, LayerNotFoundError, UnsupportedError: as ``Forecast.formula``.
        """
        if self._ground(setup) != self._held or setup.adapter.rank not in self.reach.ranks:
            self.follow(setup)
        reach = self.reach
        row = self._row(setup)
        kinds = reach.kinds if row in reach.kinds else {**reach.kinds, row: self._kinds(setup)}
        count = len(self._blocks) if setup.adapter.num_layers < 0 else setup.adapter.num_layers
        self.reach = replace(reach, kinds=kinds)
        if (kind := kinds[row][count - 1]) is None:
            setup.adapter.targets(self._forecast.spec)  # says why nothing is adapted
            return
        name = step_name(kind[0], setup.train)
        formulas: dict[str, Formula] = {k: f for k, f in reach.formulas.items() if k != name}
        formulas[name] = self._forecast.formula(setup)
        for oldest in list(formulas)[:-_KEPT]:
            del formulas[oldest]
        self.reach = replace(self.reach, formulas=formulas)

    def nearby(self, setup: Setup) -> Iterator[Setup]:
        """Yield setups of the kinds of step that a user is likely to reach next, the likeliest
        first.
        """
        train = setup.train
        plan = setup.plan
        yield replace(setup, train=replace(train, grad_checkpoint=not train.grad_checkpoint))
        chunk = train.loss_chunk
        lengths = [n * chunk + 1 for n in range(1, CHUNKS + 1)] if chunk else []
        for length in lengths:
            yield replace(setup, train=replace(train, batch_size=1, max_seq_length=max(length, 2)))
        if plan and plan.default in self.reach.configs:
            own = plan.overrides
            default = plan.default
            for bits in default.scheme.bits:
                yield replace(
                    setup, plan=QuantPlan(QuantConfig(default.mode, bits, default.group_size), own)
                )
            for group_size in default.scheme.group_sizes:
                yield replace(
                    setup, plan=QuantPlan(QuantConfig(default.mode, default.bits, group_size), own)
                )
        for length in lengths:
            other = replace(
                train,
                batch_size=1,
                max_seq_length=max(length, 2),
                grad_checkpoint=not train.grad_checkpoint,
            )
            yield replace(setup, train=other)
        yield replace(setup, train=replace(train, loss_chunk=0 if chunk else 512))
        yield replace(setup, plan=None)
        for config in {c.mode: c for c in self.reach.configs if c}.values():
            if plan is None or config.mode != plan.default.mode:
                yield replace(
                    setup, plan=QuantPlan(QuantConfig(config.mode), plan.overrides if plan else {})
                )
        for name in self.reach.optimizers:
            yield replace(setup, train=replace(train, optimizer=name))

    def _ground(self, setup: Setup) -> tuple:
        """What all positions share.

        A storage without overrides of its own takes over those that are there.
        """
        lora = setup.adapter
        plan = setup.plan
        own = tuple(plan.overrides.items()) if plan else getattr(self, "_held", ((),))[0]
        return own, lora.keys, lora.kind, lora.dtype, lora.dropout

    def _row(self, setup: Setup) -> int:
        return self.reach.configs.index(setup.plan.default if setup.plan else None)

    def _kinds(self, setup: Setup) -> tuple[tuple[int, tuple[int, ...]] | None, ...]:
        """For each number of adapted blocks, the kind of step and the blocks of each sort that a
        gradient reaches.
        """
        return tuple(
            self._kind(setup.with_value("num_layers", n)) for n in range(1, len(self._blocks) + 1)
        )

    def _kind(self, setup: Setup) -> tuple[int, tuple[int, ...]] | None:
        try:
            groups, outside = self._forecast.looks(setup)
        except ConfigError:
            return None
        counts = tuple(len(group) for group in groups.values())
        key = (tuple(map(_plain, groups)), _plain(outside), tuple(min(n, _FEW) for n in counts))
        return self._numbers.setdefault(key, len(self._numbers)), counts


def _plain(look: tuple) -> tuple:
    """What a layer's storage means for a step.

    How it is made into numbers, scales on their way included.
    """
    return tuple(
        tuple((x.mode, x.bits, x.group_size) if isinstance(x, QuantConfig) else x for x in layer)
        for layer in look
    )


def _trained_nbytes(
    setup: Setup,
    targets: tuple[LayerSpec, ...],
    ranks: tuple[int, ...],
    optimizers: tuple[str, ...],
    blocks: list[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes of adapter ``(ranks, blocks)`` and of optimizer state ``(optimizers, ranks, blocks)``,
    by adapted blocks.
    """
    lora = setup.adapter
    states = [registry.get("optimizers", name) for name in optimizers]
    known: dict[tuple[int, ...], np.ndarray] = {}
    for shape in {x.shape for x in targets}:
        known[shape] = np.zeros((1 + len(states), len(ranks)))
        for i, rank in enumerate(ranks):
            arrays = lora.adapter_kind.shapes(shape, rank).values()
            known[shape][0, i] = lora.itemsize * sum(map(prod, arrays))
            known[shape][1:, i] = [
                sum(s.state_nbytes(a, lora.itemsize) for a in arrays) for s in states
            ]
    each = np.zeros((1 + len(states), len(ranks), len(blocks)))
    outside = np.zeros((1 + len(states), len(ranks), 1))
    for layer in targets:
        place = (
            outside[..., 0]
            if layer.block is None
            else each[..., len(blocks) - 1 - blocks.index(layer.block)]
        )
        place += known[layer.shape]
    total = outside + np.cumsum(each, axis=2)
    return total[0], total[1:]
