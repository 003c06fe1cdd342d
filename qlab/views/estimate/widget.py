"""The live estimate panel: what is sent to the browser, and what comes back.

Sees states, never a model. The browser's half is ``answers.js`` (the arithmetic), ``draw.js``
(values to nodes) and ``widget.js`` (the controls).
"""

from __future__ import annotations

from dataclasses import asdict, astuple, fields
from typing import Any

import anywidget
import traitlets as T

from qlab import registry
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan, Scheme
from qlab.core.config.train import TrainConfig
from qlab.core.graph.formula import PHASES, Formula
from qlab.core.graph.parts import INPUTS, PARTS
from qlab.core.graph.sizes import CHUNKS
from qlab.core.machine import Machine
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.panels.estimate import Choice, EstimateState
from qlab.views.shared.panel import LivePanel
from qlab.views.shared.wire import CSS, source

# text, not a Path: a Path keeps every instance alive
ESM = source("shared/panel.js", "estimate/answers.js", "estimate/draw.js", "estimate/widget.js")
STYLES = CSS + "\n" + source("estimate/widget.css")

_OPS = {
    "hello": {},
    "bye": {},
    "set": {"choice": dict},
    "budget": {"name": str},
    "measure": {},
    "cancel": {},
}
_TYPES = {"str": str, "int": int, "bool": bool}
_CONTROLS = {field.name: _TYPES[str(field.type)] for field in fields(Choice)}


class EstimateView(anywidget.AnyWidget):
    """Kernel → browser: what every position needs, and the present choice."""

    _esm = ESM
    _css = STYLES
    meta = T.Dict().tag(sync=True)
    tables = T.Dict().tag(sync=True)
    adapters = T.Bytes(b"").tag(sync=True)
    states = T.Bytes(b"").tag(sync=True)
    formulas = T.Dict().tag(sync=True)
    state = T.Dict().tag(sync=True)
    controls = anywidget.WidgetTrait().tag(sync=True)


def payload(state: EstimateState) -> dict[str, Any]:
    """Return a state as the traits of the view (without ``controls``)."""
    return {"meta": _meta(state), **_reach(state), "state": choice(state, None)}


def choice(state: EstimateState, ack: int | None) -> dict[str, Any]:
    """Return what changes while a user works.

    The settings, what is known of them, the running job, the last error.
    """
    plan = state.setup.plan
    return {
        "choice": asdict(state.choice),
        "known": _known(state.estimate) if state.estimate else None,
        "band": list(state.band),
        "budget": _budget(state.machine),
        "budgets": [_budget(machine) for machine in state.budgets],
        "changes": _changes(state),
        "own": _overrides(plan) if plan else [],
        "scale": state.setup.adapter.scale,
        "notes": list(state.notes),
        "progress": list(astuple(state.progress)) if state.progress else None,
        "error": state.error,
        "ack": ack or 0,
    }


def _known(est: MemoryEstimate) -> dict[str, Any]:
    return {
        "level": est.level,
        "moment": est.moment,
        "parts": list(est.parts.values()),
        "band": list(est.band),
    }


def _budget(machine: Machine) -> list[Any]:
    return [machine.label, machine.free_nbytes, machine.total_nbytes]


def _changes(state: EstimateState) -> list[dict[str, Any]] | None:
    """Return the changes that would make it fit; None if not looked for yet."""
    if state.changes is None:
        return None
    return [
        {
            "name": change.name,
            "now": str(change.now),
            "then": str(change.then),
            "total": change.total_nbytes,
            "quality": change.quality,
            "remark": change.remark,
            "choice": asdict(Choice.of(change.setup, state.blocks)),
        }
        for change in state.changes
    ]


def _triple(config: QuantConfig) -> list[Any]:
    return [config.mode, config.bits, config.group_size]


def _overrides(plan: QuantPlan) -> list[list[Any]]:
    """Return path and storage of every override; None stands for 16 bits."""
    return [[path, _triple(config) if config else None] for path, config in plan.overrides.items()]


def _meta(state: EstimateState) -> dict[str, Any]:
    """Return what stays for the life of a panel."""
    lora = state.setup.adapter
    return {
        "name": state.spec.name,
        "params": state.spec.size,
        "blocks": state.blocks,
        "context": state.context,
        "stored": bool(state.spec.storage),
        "parts": [[name, text, name in INPUTS] for name, text in PARTS.items()],
        "phases": list(PHASES),
        "chunks": CHUNKS,
        "modes": [_mode(scheme) for scheme in registry.shelf("schemes").values()],
        "adapter": _fields(lora),
        "train": _fields(state.setup.train),
        "rslora": lora.rslora,
        "loaded": state.loaded,
        "linked": state.linked,
    }


def _mode(scheme: Scheme) -> list[Any]:
    defaults = [scheme.default_bits, scheme.default_group_size]
    return [scheme.name, scheme.title, scheme.bits, scheme.group_sizes, *defaults]


def _fields(config: LoRAConfig | TrainConfig) -> list[list[Any]]:
    """Return name, present value and default of every field, as Python writes them."""
    rows = []
    for field in fields(config):
        rows.append([field.name, repr(getattr(config, field.name)), repr(field.default)])
    return rows


def _reach(state: EstimateState) -> dict[str, Any]:
    """Return what the sliders reach; it is large, and grows while nearby settings are read."""
    reach = state.reach
    return {
        "tables": {
            "configs": [_triple(config) if config else ["", 0, 0] for config in reach.configs],
            "weights": reach.weights_nbytes.tolist(),
            "ranks": list(reach.ranks),
            "optimizers": list(reach.optimizers),
            "kinds": {str(row): _kinds(kinds) for row, kinds in reach.kinds.items()},
        },
        "adapters": reach.adapter_nbytes.astype("<f8").tobytes(),
        "states": reach.optimizer_nbytes.astype("<f8").tobytes(),
        "formulas": {name: _formula(formula) for name, formula in reach.formulas.items()},
    }


def _kinds(kinds: tuple[tuple[int, tuple[int, ...]] | None, ...]) -> list[Any]:
    """Return the number of the kind of step and its blocks, for each number of adapted blocks."""
    return [[kind[0], list(kind[1])] if kind else None for kind in kinds]


def _formula(formula: Formula) -> dict[str, Any]:
    return {
        "products": [list(row) for row in formula.products],
        "phases": [rows.tolist() for rows in formula.phases],
        "slopes": [[phase.tolist() for phase in kind] for kind in formula.slopes],
        "blocks": list(formula.blocks),
    }


class EstimatePanel(LivePanel[EstimateState]):
    """The live panel of a ``LiveEstimate``."""

    view = EstimateView
    operations = _OPS

    def payload(self, state: EstimateState) -> dict[str, Any]:
        return payload(state)

    def large(self, before: EstimateState, state: EstimateState, ended: bool) -> dict[str, Any]:
        return _reach(state) if ended or state.reach is not before.reach else {}

    def small(self, state: EstimateState, ack: int) -> dict[str, Any]:
        return choice(state, ack)

    def settled(self, intent: dict[str, Any]) -> dict[str, Any]:
        return _settled(intent)


def _settled(intent: dict[str, Any]) -> dict[str, Any]:
    """Return an intent whose choice is a ``Choice``.

    Raises:
        ValueError: a control is missing, or its value is of the wrong type.
    """
    if intent["op"] != "set":
        return intent
    values = intent["choice"]
    for name, kind in _CONTROLS.items():
        value = values.get(name)
        bool_for_int = kind is int and isinstance(value, bool)  # Python counts True as an int
        if not isinstance(value, kind) or bool_for_int:
            raise ValueError(f"The panel sent no usable {name!r}: {value!r}.")
    controls = {name: values[name] for name in _CONTROLS}
    return {**intent, "choice": Choice(**controls)}
