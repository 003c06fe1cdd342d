"""``Sweep``: what the sliders of an estimate reach without asking the kernel.

Exact bytes at every position, and formulas of the kinds of step read so far. The live estimate
(``qlab.lab.estimate``) makes it grow; the panel carries it to the browser. Runs on the MLX thread.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import NamedTuple

import numpy as np

from qlab import registry
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.graph.formula import Formula
from qlab.core.graph.sizes import CHUNKS
from qlab.core.memory.setup import Setup
from qlab.core.panels.estimate import Reach, rank_stops, step_name
from qlab.engine.memory.forecast import Forecast
from qlab.engine.memory.step_kind import SAMPLE_BLOCKS
from qlab.errors import ConfigError

_MOST_FORMULAS = 40  # that the browser remembers
_CHUNK = 512  # tokens of a chunk of the loss, where the user has none yet
# the browser does not ask whether blocks are checkpointed before it looks up a kind of step
_SAMPLE = max(SAMPLE_BLOCKS.values())


class _Shared(NamedTuple):
    """What all positions of the sliders share; with another of these a reach is out of date."""

    overrides: tuple[tuple[str, QuantConfig | None], ...]
    keys: tuple[str, ...] | None
    kind: str
    dtype: str
    dropout: float


class Sweep:
    """What the sliders of one estimate reach; grows as kinds of step are read.

    Args:
        forecast: of the model.
        setup: shown first. Its overrides, and keys, kind and dtype of its adapter, hold for all
            positions until ``follow``.

    Attributes:
        reach: the present reach, replaced as a whole when it grows.
    """

    reach: Reach

    def __init__(self, forecast: Forecast, setup: Setup) -> None:
        self._forecast = forecast
        self._spec: ModelSpec = forecast.spec
        self._numbers: dict[Hashable, int] = {}  # kinds of step, counted from 0
        self._shared = _shared(setup, ())
        self._take_up(setup, formulas={})

    def follow(self, setup: Setup) -> None:
        """Take up other overrides or another rank than the slider has; formulas stay."""
        self._shared = _shared(setup, self._shared.overrides)
        self._take_up(setup, self.reach.formulas)

    def _take_up(self, setup: Setup, formulas: Mapping[str, Formula]) -> None:
        lora = setup.adapter
        configs = _storages(self._spec, setup)
        weights = [self._weights_nbytes(setup, config) for config in configs]
        everywhere = replace(lora, rank=1, num_layers=-1)
        targets = everywhere.targets(self._spec)
        largest_rank = min(min(layer.shape[-2:]) for layer in targets)
        ranks = rank_stops(largest_rank, lora.rank)
        optimizers = tuple(registry.shelf("optimizers"))
        blocks = self._spec.blocks
        adapter, states = _trained_nbytes(setup, targets, ranks, optimizers, blocks)
        self.reach = Reach(
            configs=configs,
            weights_nbytes=np.array(weights, float),
            ranks=ranks,
            optimizers=optimizers,
            adapter_nbytes=adapter,
            optimizer_nbytes=states,
            kinds={},
            formulas=formulas,
        )

    def _weights_nbytes(self, setup: Setup, config: QuantConfig | None) -> int:
        stored = replace(setup, plan=None)
        if config is not None:
            stored = _stored(setup, config)
        inputs = self._forecast.inputs(stored)
        return inputs["weights"]

    def read(self, setup: Setup) -> None:
        """Add the formula of a setup's kind of step, and the kinds of its storage.

        Raises:
            ConfigError, LayerNotFoundError, UnsupportedError: as ``Forecast.formula``.
        """
        is_outdated = _shared(setup, self._shared.overrides) != self._shared
        if is_outdated or setup.adapter.rank not in self.reach.ranks:
            self.follow(setup)
        config = setup.plan.default if setup.plan else None
        row = self.reach.configs.index(config)
        if row not in self.reach.kinds:
            kinds = {**self.reach.kinds, row: self._kinds(setup)}
            self.reach = replace(self.reach, kinds=kinds)
        count = setup.adapter.num_layers
        if count < 0:
            count = len(self._spec.blocks)
        kind = self.reach.kinds[row][count - 1]
        if kind is None:
            setup.adapter.targets(self._spec)  # raises, and says why nothing is adapted
            return
        name = step_name(kind[0], setup.train)
        # the one read last stands last, so that the oldest is forgotten first
        formulas = dict(self.reach.formulas)
        formulas.pop(name, None)
        formulas[name] = self._forecast.formula(setup)
        surplus = list(formulas)[:-_MOST_FORMULAS]
        for oldest in surplus:
            del formulas[oldest]
        self.reach = replace(self.reach, formulas=formulas)

    def _kinds(self, setup: Setup) -> tuple[tuple[int, tuple[int, ...]] | None, ...]:
        """Return the kind of step for each number of adapted blocks, as in ``Reach.kinds``."""
        most = len(self._spec.blocks)
        kinds = []
        for count in range(1, most + 1):
            other = setup.with_value("num_layers", count)
            kinds.append(self._kind(other))
        return tuple(kinds)

    def _kind(self, setup: Setup) -> tuple[int, tuple[int, ...]] | None:
        try:
            kind = self._forecast.kind(setup)
        except ConfigError:
            return None
        key = kind.key(_SAMPLE)
        newest = len(self._numbers)
        number = self._numbers.setdefault(key, newest)
        return number, kind.counts

    # --- what a user is likely to reach next ------------------------------------------------------

    def nearby(self, setup: Setup) -> Iterator[Setup]:
        """Yield setups of the kinds of step that a user may reach next, the likeliest first."""
        checkpoint = not setup.train.grad_checkpoint
        other = setup.with_value("grad_checkpoint", checkpoint)
        yield other
        yield from _other_numbers_of_chunks(setup)
        yield from self._same_mode(setup)
        yield from _other_numbers_of_chunks(other)
        yield setup.with_value("loss_chunk", 0 if setup.train.loss_chunk else _CHUNK)
        yield replace(setup, plan=None)
        yield from self._other_modes(setup)
        for name in self.reach.optimizers:
            yield setup.with_value("optimizer", name)

    def _same_mode(self, setup: Setup) -> Iterator[Setup]:
        plan = setup.plan
        if plan is None or plan.default not in self.reach.configs:
            return
        default = plan.default
        scheme = default.scheme
        for bits in scheme.bits:
            config = QuantConfig(default.mode, bits, default.group_size)
            yield _stored(setup, config)
        for group_size in scheme.group_sizes:
            config = QuantConfig(default.mode, default.bits, group_size)
            yield _stored(setup, config)

    def _other_modes(self, setup: Setup) -> Iterator[Setup]:
        now = setup.plan.default.mode if setup.plan else None
        modes = dict.fromkeys(config.mode for config in self.reach.configs if config)
        for mode in modes:
            if mode != now:
                config = QuantConfig(mode)
                yield _stored(setup, config)


def _shared(setup: Setup, overrides: tuple[tuple[str, QuantConfig | None], ...]) -> _Shared:
    """Return what all positions share with a setup.

    Args:
        setup: of one position.
        overrides: taken where the setup leaves the weights as they are, so that the storage slider
            may pass "as stored" without losing them.
    """
    lora = setup.adapter
    if setup.plan is not None:
        overrides = tuple(setup.plan.overrides.items())
    return _Shared(overrides, lora.keys, lora.kind, lora.dtype, lora.dropout)


def _storages(spec: ModelSpec, setup: Setup) -> tuple[QuantConfig | None, ...]:
    """Return the storages that the controls can choose; None leaves the weights as they are."""
    configs: list[QuantConfig | None] = [None]
    if spec.storage is None:  # weights that came quantized are not quantized again
        schemes = registry.shelf("schemes")
        for scheme in schemes.values():
            for bits, group_size in product(scheme.bits, scheme.group_sizes):
                config = QuantConfig(scheme.name, bits, group_size)
                configs.append(config)
    if setup.plan and setup.plan.default not in configs:
        configs.append(setup.plan.default)
    return tuple(configs)


def _stored(setup: Setup, config: QuantConfig) -> Setup:
    """Return a setup with another default storage; overrides stay."""
    overrides = setup.plan.overrides if setup.plan else {}
    plan = QuantPlan(config, overrides)
    return replace(setup, plan=plan)


def _other_numbers_of_chunks(setup: Setup) -> Iterator[Setup]:
    """Yield one row of the length at which the loss is made in 1, 2, … ``CHUNKS`` chunks."""
    chunk = setup.train.loss_chunk
    if not chunk:
        return
    for number in range(1, CHUNKS + 1):
        length = number * chunk + 1  # the last position of a row has no target
        length = max(length, 2)
        train = replace(setup.train, batch_size=1, max_seq_length=length)
        yield replace(setup, train=train)


def _trained_nbytes(
    setup: Setup,
    targets: Sequence[LayerSpec],
    ranks: Sequence[int],
    optimizers: Sequence[str],
    blocks: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of adapter and optimizer state at every position of the sliders.

    Args:
        setup: kind and dtype of its adapter count.
        targets: the layers that are adapted if all blocks are.
        ranks: stops of the rank's slider.
        optimizers: names on the shelf.
        blocks: numbers of all blocks, ascending; the last ones are adapted first.

    Returns:
        Adapter ``(ranks, blocks)`` and optimizer state ``(optimizers, ranks, blocks)``, float64.
    """
    by_shape = {}
    for shape in {layer.shape for layer in targets}:
        by_shape[shape] = _layer_nbytes(setup, shape, ranks, optimizers)
    rows = 1 + len(optimizers)  # the adapter, then each optimizer's state
    outside = np.zeros((rows, len(ranks), 1))
    by_block = np.zeros((rows, len(ranks), len(blocks)))  # the last block first
    last = len(blocks) - 1
    for layer in targets:
        nbytes = by_shape[layer.shape]
        if layer.block is None:
            outside[..., 0] += nbytes
        else:
            place = last - blocks.index(layer.block)
            by_block[..., place] += nbytes
    total = outside + np.cumsum(by_block, axis=2)
    return total[0], total[1:]


def _layer_nbytes(
    setup: Setup, shape: tuple[int, ...], ranks: Sequence[int], optimizers: Sequence[str]
) -> np.ndarray:
    """Return the bytes for one layer: float64 ``(1 + optimizers, ranks)``, the adapter first."""
    lora = setup.adapter
    itemsize = lora.itemsize
    kinds = [registry.get("optimizers", name) for name in optimizers]
    rows = 1 + len(kinds)
    nbytes = np.zeros((rows, len(ranks)))
    for column, rank in enumerate(ranks):
        shapes = lora.adapter_kind.shapes(shape, rank)
        arrays = list(shapes.values())
        numbers = sum(prod(array) for array in arrays)
        nbytes[0, column] = itemsize * numbers
        for row, kind in enumerate(kinds, start=1):
            states = [kind.state_nbytes(array, itemsize) for array in arrays]
            nbytes[row, column] = sum(states)
    return nbytes
