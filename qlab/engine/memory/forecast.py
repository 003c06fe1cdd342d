"""Foresees the memory of a training step from a model's structure.

By formula at once, by a full trace, or by a real step.

Reads no weights (a real step aside). Runs on the MLX thread. Knows no budget.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import replace
from functools import cached_property
from math import prod

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.core.graph.formula import Formula, Reference, Sample, chunks, formula, references, sizes
from qlab.core.graph.graph import Graph
from qlab.core.graph.parts import INPUTS, PARTS, labels, over_time
from qlab.core.graph.simulate import Runahead, simulate
from qlab.core.machine import Machine
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.memory.setup import Setup
from qlab.engine.adapt.attach import attach
from qlab.engine.memory.blockwise_step import Pieces
from qlab.engine.memory.whole_step import whole
from qlab.engine.models.blocks import BlockStack
from qlab.engine.models.lazy_storage import stored
from qlab.engine.models.skeleton import describe
from qlab.engine.models.surgery import put_module, twin
from qlab.engine.quantize.quantize import chosen, quantize
from qlab.engine.step.blockwise import WINDOWS
from qlab.engine.step.choose import make_step
from qlab.engine.step.protocol import LossAndGradients, StepBatch
from qlab.engine.train.update import Update
from qlab.errors import ConfigError, UnsupportedError
from qlab.nn.frozen import usual_compute
from qlab.runtime import peaks as record
from qlab.runtime.device import backend
from qlab.runtime.job import finished

# dispatches of a task, and tasks that may be unfinished (mlx/backend/*/eval.cpp, mlx/scheduler.h):
# the CPU's as in its source, CUDA's set by eight steps on one H100 (docs/guide/memory_accuracy.md),
# Metal's read, not measured
_TASK = {"cpu": 10, "cuda": 27, "metal": 40}
_TASKS = 11
Look = tuple[
    tuple, ...
]  # role, shape, present storage, chosen storage and whether it is adapted, of each layer
SAMPLE = {
    True: 3,
    False: 4,
}  # blocks of each kind in the step that a formula is read from, with checkpoints and without
_REMEMBERED = 48  # formulas kept


def runahead() -> Runahead:
    """Return how far the host runs ahead here; MLX's own setting for GPUs counts."""
    name = backend()
    ops = os.environ.get("MLX_MAX_OPS_PER_BUFFER", "")
    own = name != "cpu" and ops.isdigit() and int(ops)
    return Runahead(_TASKS * (own or _TASK[name]), kernels=name != "cpu")


class Forecast:
    """A model, seen as the memory that training it takes.

    Args:
        module: an mlx-lm model, lazy or loaded. It is not changed.
        name: what to call it.
        context: tokens that it was made for, or None.
        loaded: whether its weights are in memory.
        notes: what to know about its source.
    """

    def __init__(
        self,
        module: nn.Module,
        name: str,
        context: int | None = None,
        loaded: bool = False,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.module = module
        self.context = context
        self.notes = notes
        self.spec: ModelSpec = describe(module, name)
        self.loaded_nbytes = self.spec.nbytes if loaded else 0
        self.vocabulary = max((x.shape[-2] for x in self.spec.layers if x.block is None), default=0)
        self._formulas: OrderedDict[Hashable, Formula] = OrderedDict()

    def estimate(self, setup: Setup, machine: Machine, level: str = "formula") -> MemoryEstimate:
        """Return the peak of a setup.

        Args:
            setup: storage, adapter, run.
            machine: the budget to judge by.
            level: ``formula``, ``traced`` or ``measured`` (runs one real step; the model must be
                loaded).

        Raises:
            ConfigError, LayerNotFoundError: the setup does not fit the model.
            UnsupportedError: the model's step cannot be built.
        """
        if self.context and setup.train.max_seq_length > self.context:
            raise ConfigError(
                f"max_seq_length={setup.train.max_seq_length} is more than {self.spec.name!r} was made for; "
                f"the largest is {self.context}."
            )
        self._check(setup.plan)
        found, moment, parts, notes = self._foreseen(
            setup, "formula" if level == "formula" else "traced"
        )
        measured = None
        if level == "measured":
            measured = self.by_step(setup, machine)
            exact = sum(parts[name] for name in INPUTS)
            record.add(backend(), sum(parts.values()), exact, measured)
            found = level
            parts = _scaled(parts, measured)
        band = (1.0, 1.0) if measured else record.band(backend())
        return MemoryEstimate(
            spec=self.spec,
            setup=setup,
            parts=parts,
            level=found,
            moment=moment,
            band=band,
            machine=machine,
            context=self.context,
            measured_peak=measured,
            notes=(*self.notes, *notes),
        )

    def _check(self, plan: QuantPlan | None) -> None:
        """Refuse a storage that holds no layer."""
        if plan is None or chosen(self.spec, plan):
            return
        largest = max(self.spec.layers, key=lambda x: x.size)
        reason = largest.refusal(plan.default) or "every layer is to be kept as it is"
        raise ConfigError(
            f"No layer of {self.spec.name!r} can be stored as {plan.default.label} ({largest.path}: {reason})."
        )

    def _foreseen(
        self, setup: Setup, level: str
    ) -> tuple[str, str, dict[str, int], tuple[str, ...]]:
        """Return level, moment, parts and notes; where one level cannot be had, the other."""
        ways = {"formula": self.by_formula, "traced": self.by_trace}
        other = next(name for name in ways if name != level)
        notes = (
            (f"Computed as one graph, without checkpoints and chunks of the loss: {self.whole}",)
            if self._plain(setup)
            else ()
        )
        try:
            return level, *ways[level](setup), notes
        except UnsupportedError as error:
            try:
                return (
                    other,
                    *ways[other](setup),
                    (*notes, f"This is {other}, because {level} could not be had: {error}"),
                )
            except UnsupportedError:
                raise error from None

    @cached_property
    def whole(self) -> str:
        """Why the model can only be computed as one graph; empty if it can be taken apart."""
        try:
            BlockStack(twin(self.module)).before(mx.zeros((1, 2), mx.int32))
        except UnsupportedError as error:
            return str(error)
        return ""

    def _plain(self, setup: Setup) -> bool:
        return bool((setup.train.grad_checkpoint or setup.train.loss_chunk) and self.whole)

    def configs(self, setup: Setup) -> dict[str, QuantConfig]:
        """Storage of the layers that a setup quantizes, by path."""
        return chosen(self.spec, setup.plan) if setup.plan else {}

    def inputs(self, setup: Setup) -> dict[str, int]:
        """Bytes of weights, adapter and optimizer state: exact."""
        configs = self.configs(setup)
        adapter = setup.adapter
        shapes = _trained(adapter, self.spec)
        return {
            "weights": self.spec.other_nbytes
            + sum(x.nbytes_as(configs.get(x.path)) for x in self.spec.layers),
            "adapter": adapter.itemsize * sum(prod(s) for s in shapes),
            "optimizer": sum(
                setup.train.optimizer_kind.state_nbytes(s, adapter.itemsize) for s in shapes
            ),
        }

    # --- formula ----------------------------------------------------------------------------------

    def by_formula(self, setup: Setup) -> tuple[str, dict[str, int]]:
        """Return the moment of the peak and the bytes of every part."""
        train = setup.train
        values = sizes(train.batch_size, train.max_seq_length, setup.adapter.rank, train.loss_chunk)
        moment, parts = self.formula(setup).parts(values, self.counts(setup))
        return moment, {name: round(n) for name, n in (parts | self.inputs(setup)).items()}

    def counts(self, setup: Setup) -> tuple[int, ...]:
        """Number of blocks of each kind that gradients reach."""
        return tuple(len(group) for group in self.looks(setup)[0].values())

    def formula(self, setup: Setup) -> Formula:
        """Return the formula of a setup's kind of step; it is made at its first use."""
        train = setup.train
        adapter = setup.adapter
        (groups, outside) = self.looks(setup)
        several = (
            chunks(train.batch_size, train.max_seq_length, train.loss_chunk)
            if train.loss_chunk
            else 0
        )
        most = SAMPLE[train.grad_checkpoint]
        few = tuple(
            (look, min(len(group), most), len(group) > most) for look, group in groups.items()
        )
        key = (
            few,
            outside,
            adapter.kind,
            adapter.dtype,
            adapter.dropout > 0,
            train.optimizer,
            train.grad_checkpoint,
            train.window,
            train.grad_accumulation_steps > 1,
            train.pack,
            several,
        )
        if key not in self._formulas:
            self._formulas[key] = self._made(setup, list(groups.values()), several)
            while len(self._formulas) > _REMEMBERED:
                self._formulas.popitem(last=False)
        self._formulas.move_to_end(key)
        return self._formulas[key]

    def looks(self, setup: Setup) -> tuple[dict[Look, list[int]], Look]:
        """Return what makes the kind of a step.

        What layers are, how they are stored and which are adapted.

        Returns:
            Numbers of the blocks that a gradient reaches, by the look of their layers; and the look
            of the layers outside.

        Raises:
            ConfigError, LayerNotFoundError: the setup does not fit the model.
        """
        targets = {x.path for x in setup.adapter.targets(self.spec)}
        configs = self.configs(setup)
        blocks: dict[int | None, list[LayerSpec]] = {None: []}
        for layer in self.spec.layers:
            blocks.setdefault(layer.block, []).append(layer)
        looks = {
            block: tuple(
                (x.role, x.shape, x.storage, configs.get(x.path), x.path in targets) for x in layers
            )
            for block, layers in blocks.items()
        }
        outside = looks.pop(None)
        own = [block for block, look in looks.items() if any(adapted for *_, adapted in look)]
        embeds = any(x.path in targets and x.kind == "embedding" for x in self.spec.layers)
        lowest = min(own) if own and not embeds else min(looks, default=0)
        groups: dict[Look, list[int]] = {}
        for block, look in looks.items():
            if block >= lowest:
                groups.setdefault(look, []).append(block)
        return groups, outside

    def _made(self, setup: Setup, groups: list[list[int]], several: int) -> Formula:
        widest = min(min(x.shape[-2:]) for x in setup.adapter.targets(self.spec))
        refs = references(several, widest, tiles=backend() == "cuda")  # ops/attention_tiles.py
        most = SAMPLE[setup.train.grad_checkpoint]
        few = [group[-most:] for group in groups]
        try:
            one, two = (self._graph(setup, sum(few, []), ref) for ref in refs)
        except (IndexError, UnsupportedError):  # a model that counts on its blocks is read whole
            few = groups
            one, two = (self._graph(setup, None, ref) for ref in refs)
        fewer = [
            self._graph(setup, sum((g[i == j :] for j, g in enumerate(few)), []), refs[0])
            if len(group) > most
            else None
            for i, group in enumerate(groups)
        ]
        trained = tuple(_trained(replace(setup.adapter, rank=refs[0].rank), self.spec))
        sample = Sample(
            (one, two), tuple(fewer), refs, tuple(map(len, few)), self.vocabulary, trained
        )
        return formula(sample, runahead())

    def _graph(self, setup: Setup, blocks: list[int] | None, ref: Reference) -> Graph:
        """Read the step of a model with some of the blocks only, at reference sizes."""
        module = self.module
        configs = self.configs(setup)
        targets = [x.path for x in setup.adapter.targets(self.spec)]
        if blocks is not None:
            module = twin(module)
            stack = BlockStack(module)
            put_module(module, stack.path, [stack.blocks[b] for b in sorted(blocks)])  # type: ignore
            places = {
                f"{stack.path}.{b}.": f"{stack.path}.{i}." for i, b in enumerate(sorted(blocks))
            }
            configs = {
                new: configs[path] for path in configs if (new := _moved(path, stack.path, places))
            }
            targets = [new for path in targets if (new := _moved(path, stack.path, places))]
        lora = replace(setup.adapter, rank=ref.rank, num_layers=-1, keys=tuple(targets))
        train = replace(
            setup.train, batch_size=ref.batch, max_seq_length=ref.tokens + 1, loss_chunk=ref.chunk
        )
        return self._read(module, configs, replace(setup, adapter=lora, train=train))

    # --- trace and step ---------------------------------------------------------------------------

    def by_trace(self, setup: Setup) -> tuple[str, dict[str, int]]:
        """Return the moment of the peak and the bytes of every part, from the whole step."""
        graph = self.graph(setup)
        usage = simulate(graph, runahead())
        label = labels(graph, self.vocabulary, _trained(setup.adapter, self.spec))
        at = int(usage.timeline.argmax())
        logits = [
            i
            for i, n in enumerate(usage.steps)
            if any(label[a] == "logits" for a in graph.nodes[n].outputs)
        ]
        moment = "forward" if at < logits[0] else "loss" if at <= logits[-1] else "backward"
        parts = dict(zip(PARTS, over_time(usage, label, {})[at, :, 0].tolist(), strict=True))
        return moment, {name: round(n) for name, n in (parts | self.inputs(setup)).items()}

    def graph(self, setup: Setup) -> Graph:
        """Return the whole step of a setup as a graph; nothing is computed."""
        return self._read(self.module, self.configs(setup), setup)

    def _read(self, module: nn.Module, configs: dict[str, QuantConfig], setup: Setup) -> Graph:
        made = stored(module, configs)
        train = setup.train
        if self._plain(setup):  # as make_step does
            train = replace(train, grad_checkpoint=False, loss_chunk=0)
        work = attach(
            made,
            describe(made, self.spec.name),
            setup.adapter,
            usual_compute(),
            train.grad_checkpoint,
        )
        try:
            if not train.grad_checkpoint:
                return whole(work, train)
            return Pieces(work, train, train.window or WINDOWS[backend()][0]).read()
        except ConfigError:
            raise
        except ValueError as error:  # MLX's own refusal of a shape
            raise UnsupportedError(
                f"A step of {self.spec.name!r} cannot be built: {error}"
            ) from error

    def by_step(self, setup: Setup, machine: Machine) -> int:
        """Run one real step on random tokens of the largest shape.

        Return its peak, other models in memory not counted.

        Raises:
            ConfigError: it surely would not fit.
        """
        if not self.loaded_nbytes:
            raise ConfigError("A real step needs the weights: load the model first.")
        foreseen = sum(self.by_formula(setup)[1].values())
        if foreseen > machine.free_nbytes:
            raise ConfigError(
                f"A real step would need {foreseen / 1e9:.1f} GB, and {machine.free_nbytes / 1e9:.1f} GB are free."
            )
        module = self.module
        if setup.plan:
            module = finished(quantize(module, self.spec, setup.plan, "rtn", {}))
        return measured_peak(module, setup)


def measured_peak(module: nn.Module, setup: Setup) -> int:
    """Run one step as the training loop does.

    Return the peak of what it needs, whatever else MLX holds.
    """
    train = setup.train
    made = attach(
        module, describe(module, ""), setup.adapter, usual_compute(), train.grad_checkpoint
    )
    step = make_step(made, train)
    update = Update(train, step.parameters)
    parameters = update.by_path(update.kept(step.parameters))
    state = update.state
    tokens = mx.random.randint(
        0, 2, (train.batch_size, train.max_seq_length)
    )  # which ones, memory does not mind
    mask = mx.ones(tokens.shape, mx.int32)
    key = mx.random.key(0)
    rate = mx.array(train.learning_rate)
    segments = mx.ones(tokens.shape, mx.int32) if train.pack else None
    several = train.grad_accumulation_steps > 1
    zeros = {path: mx.zeros_like(a) for path, a in parameters.items()} if several else {}
    given = [a for _, a in tree_flatten(made.parameters())] + [
        *state.values(),
        *zeros.values(),
        tokens,
        mask,
        segments,
    ]
    mx.eval(given, parameters)
    mx.clear_cache()
    own = sum(a.nbytes for a in given if a is not None)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    sums = step(parameters, StepBatch(tokens, mask, key, segments))
    sums = LossAndGradients(mx.array(0.0), zeros, mx.array(0.0)).plus(sums) if several else sums
    gathered = update.gather(sums)
    del sums
    mx.eval(gathered)
    mx.eval(update(parameters, state, gathered, rate))
    return mx.get_peak_memory() - before + own


def _trained(adapter: LoRAConfig, spec: ModelSpec) -> list[tuple[int, ...]]:
    """Shapes of the trained arrays."""
    return [
        s
        for x in adapter.targets(spec)
        for s in adapter.adapter_kind.shapes(x.shape, adapter.rank, x.kind).values()
    ]


def _moved(path: str, stack: str, places: dict[str, str]) -> str | None:
    """Path of a layer after blocks were taken out; None if its block was."""
    if not path.startswith(f"{stack}."):
        return path
    number = path[len(stack) + 1 :].split(".")[0]
    old = f"{stack}.{number}."
    return places[old] + path[len(old) :] if old in places else None


def _scaled(parts: dict[str, int], total: int) -> dict[str, int]:
    """Let what is not exact make up the measured total, in the foreseen proportions."""
    exact = sum(parts[name] for name in INPUTS)
    factor = max(total - exact, 0) / max(sum(parts.values()) - exact, 1)
    made = {name: n if name in INPUTS else round(n * factor) for name, n in parts.items()}
    made["in_flight"] += total - sum(made.values())
    return made
