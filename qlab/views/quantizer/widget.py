"""The live quantizer panel: two widgets, one for each direction. Sees states, never a model."""

from __future__ import annotations

from typing import Any

import anywidget
import numpy as np
import traitlets as T

from qlab.core.panels.quantizer import PanelState
from qlab.views.shared.panel import LivePanel
from qlab.views.shared.wire import CSS, source

ESM = source(
    "shared/panel.js", "quantizer/widget.js"
)  # text, not a Path: a Path keeps every instance alive

_OPS = {
    "hello": {},
    "set": {"mode": str, "bits": int, "group_size": int},
    "solver": {"solver": str},
    "measure": {"measure": str},
    "override": {"paths": list, "config": (list, str, type(None))},
    "compute": {"what": str},
    "cancel": {},
}


class QuantizerView(anywidget.AnyWidget):
    """Kernel → browser: the whole table and the present choice."""

    _esm = ESM
    _css = CSS
    meta = T.Dict().tag(sync=True)
    values = T.Bytes(b"").tag(sync=True)
    sizes = T.Bytes(b"").tag(sync=True)
    flags = T.Bytes(b"").tag(sync=True)
    kurtosis = T.Bytes(b"").tag(sync=True)
    state = T.Dict().tag(sync=True)
    controls = anywidget.WidgetTrait().tag(sync=True)


def payload(state: PanelState) -> dict[str, Any]:
    """Return a state as the traits of the view (without ``controls``)."""
    return {"meta": _meta(state), **_arrays(state), "state": choice(state, None)}


def choice(state: PanelState, ack: int | None) -> dict[str, Any]:
    """Return what changes while a user works: the plan, the running job, the last error."""
    table = state.table
    default = state.plan.default
    columns = {layer.path: str(i) for i, layer in enumerate(table.layers)}
    return {
        "mode": default.mode,
        "bits": default.bits,
        "group_size": default.group_size,
        "solver": state.solver,
        "measure": state.measure,
        "overrides": {
            columns[p]: table.row(c) if c else -1 for p, c in state.plan.overrides.items()
        },
        "progress": [state.progress.what, state.progress.done, state.progress.total]
        if state.progress
        else None,
        "error": state.error,
        "calibration": state.calibration,
        "totals": [[name, value] for name, value in state.totals],
        "ack": ack or 0,
    }


def _meta(state: PanelState) -> dict[str, Any]:
    keys = ("path", "kind", "role", "block", "shape", "dtype", "nbytes", "obstacle")
    return {
        "name": state.spec.name,
        "params": state.spec.size,
        "other": state.spec.other_nbytes,
        "before": state.spec.nbytes,
        "layers": [
            {**{key: getattr(layer, key) for key in keys}, "stored": layer.storage_label}
            for layer in state.table.layers
        ],
        "configs": [[c.mode, c.bits, c.group_size] for c in state.table.configs],
        "modes": [list(mode) for mode in state.modes],
        "solvers": [list(solver) for solver in state.solvers],
        "machine": {
            "label": state.machine.label,
            "total": state.machine.total_nbytes,
            "free": state.machine.free_nbytes,
        },
        "judged": [],
        "text": state.calibration,
    }


def _arrays(state: PanelState) -> dict[str, bytes]:
    table = state.table
    flags = table.legal.astype(np.uint8) | (table.exact.astype(np.uint8) << 1)
    return {
        "values": table.values.astype("<f4").tobytes(),
        "sizes": table.nbytes.astype("<f8").tobytes(),
        "flags": flags.tobytes(),
        "kurtosis": table.kurtosis.astype("<f4").tobytes(),
    }


class QuantizerPanel(LivePanel[PanelState]):
    """The live panel of a ``Quantizer``."""

    view = QuantizerView
    operations = _OPS

    def payload(self, state: PanelState) -> dict[str, Any]:
        return payload(state)

    def large(self, before: PanelState, state: PanelState, ended: bool) -> dict[str, Any]:
        return _arrays(state)

    def small(self, state: PanelState, ack: int) -> dict[str, Any]:
        return choice(state, ack)

    def outdates_complaint(self, before: PanelState, state: PanelState) -> bool:
        return (before.plan, before.solver) != (state.plan, state.solver)
