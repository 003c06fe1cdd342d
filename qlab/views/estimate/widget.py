"""The live estimate panel: two widgets, one for each direction. Sees states, never a model."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

import anywidget
import traitlets as T

from qlab import registry
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.core.graph.formula import PHASES, Formula
from qlab.core.graph.parts import INPUTS, PARTS
from qlab.core.graph.sizes import CHUNKS
from qlab.core.machine import Machine
from qlab.core.memory.estimate import MemoryEstimate
from qlab.core.panels.estimate import Choice, EstimateState
from qlab.views.shared.panel import LivePanel
from qlab.views.shared.wire import CSS, source

ESM = source(
    "shared/panel.js", "estimate/widget.js"
)  # text, not a Path: a Path keeps every instance alive
STYLES = CSS + "\n" + source("estimate/widget.css")

_OPS = {
    "hello": {},
    "bye": {},
    "set": {"choice": dict},
    "budget": {"name": str},
    "measure": {},
    "cancel": {},
}
_CONTROLS = {f.name: {"str": str, "int": int, "bool": bool}[str(f.type)] for f in fields(Choice)}


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
    own = state.setup.plan.overrides if state.setup.plan else {}
    return {
        "choice": asdict(state.choice),
        "known": _known(state.estimate) if state.estimate else None,
        "band": list(state.band),
        "budget": _budget(state.machine),
        "budgets": [_budget(m) for m in state.budgets],
        "changes": None
        if state.changes is None
        else [
            {
                "name": c.name,
                "now": str(c.now),
                "then": str(c.then),
                "total": c.total_nbytes,
                "quality": c.quality,
                "remark": c.remark,
                "choice": asdict(Choice.of(c.setup, state.blocks)),
            }
            for c in state.changes
        ],
        "own": _own(own),
        "scale": state.setup.adapter.scale,
        "notes": list(state.notes),
        "progress": [state.progress.what, state.progress.done, state.progress.total]
        if state.progress
        else None,
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


def _own(overrides: Any) -> list[list[Any]]:
    return [[path, [c.mode, c.bits, c.group_size] if c else None] for path, c in overrides.items()]


def _meta(state: EstimateState) -> dict[str, Any]:
    lora = state.setup.adapter
    train = state.setup.train
    return {
        "name": state.spec.name,
        "params": state.spec.size,
        "blocks": state.blocks,
        "context": state.context,
        "stored": bool(state.spec.storage),
        "parts": [[name, text, name in INPUTS] for name, text in PARTS.items()],
        "phases": list(PHASES),
        "chunks": CHUNKS,
        "modes": [
            [s.name, s.title, s.bits, s.group_sizes, s.default_bits, s.default_group_size]
            for s in registry.shelf("schemes").values()
        ],
        "adapter": _fields(lora),
        "train": _fields(train),
        "rslora": lora.rslora,
        "loaded": state.loaded,
        "linked": state.linked,
    }


def _fields(config: LoRAConfig | TrainConfig) -> list[list[Any]]:
    """Name, how Python writes the value, and how it writes the default, for every field."""
    return [[f.name, repr(getattr(config, f.name)), repr(f.default)] for f in fields(config)]


def _reach(state: EstimateState) -> dict[str, Any]:
    reach = state.reach
    return {
        "tables": {
            "configs": [[c.mode, c.bits, c.group_size] if c else ["", 0, 0] for c in reach.configs],
            "weights": reach.weights_nbytes.tolist(),
            "ranks": list(reach.ranks),
            "optimizers": list(reach.optimizers),
            "kinds": {
                str(row): [[k[0], list(k[1])] if k else None for k in kinds]
                for row, kinds in reach.kinds.items()
            },
        },
        "adapters": reach.adapter_nbytes.astype("<f8").tobytes(),
        "states": reach.optimizer_nbytes.astype("<f8").tobytes(),
        "formulas": {name: _formula(formula) for name, formula in reach.formulas.items()},
    }


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
    """Return an intent whose choice is a value."""
    if intent["op"] != "set":
        return intent
    given = intent["choice"]
    for name, kind in _CONTROLS.items():
        if not isinstance(given.get(name), kind) or (kind is int and isinstance(given[name], bool)):
            raise ValueError(f"The panel sent no usable {name!r}: {given.get(name)!r}.")
    return {**intent, "choice": Choice(**{name: given[name] for name in _CONTROLS})}
