"""The live quantizer panel: what its browser half receives and may ask.

``Quantizer.widget`` makes one. Layers are columns and configs are rows of one table; the browser
looks costs and sizes up there, so that a slider needs no answer from the kernel.
"""

from __future__ import annotations

from typing import Any

import anywidget
import numpy as np
import traitlets as T

from qlab.core.config.spec import LayerSpec
from qlab.core.panels.quantizer import QuantizerState
from qlab.views.shared.panel import LivePanel
from qlab.views.shared.wire import CSS, progress_row, source

# text, not a Path: a Path keeps every instance alive
ESM = source(
    "shared/panel.js",
    "shared/layers.js",
    "quantizer/model.js",
    "quantizer/map.js",
    "quantizer/parts.js",
    "quantizer/widget.js",
)
_NOT_QUANTIZED = -1  # in place of a row of the table

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


def payload(state: QuantizerState) -> dict[str, Any]:
    """Return a state as the traits of the view (without ``controls``)."""
    return {"meta": _meta(state), **_arrays(state), "state": choice(state, None)}


def choice(state: QuantizerState, ack: int | None) -> dict[str, Any]:
    """Return what changes while a user works: the plan, the running job, the last error."""
    default = state.plan.default
    return {
        "mode": default.mode,
        "bits": default.bits,
        "group_size": default.group_size,
        "solver": state.solver,
        "measure": state.measure,
        "overrides": _overrides(state),
        "progress": progress_row(state.progress),
        "error": state.error,
        "calibration": state.calibration,
        "totals": [[name, value] for name, value in state.totals],
        "ack": ack or 0,
    }


def _overrides(state: QuantizerState) -> dict[str, int]:
    """Return the row of the table that a layer with an override has, by column."""
    columns = {layer.path: str(column) for column, layer in enumerate(state.table.layers)}
    rows = {}
    for path, config in state.plan.overrides.items():
        rows[columns[path]] = state.table.row(config) if config else _NOT_QUANTIZED
    return rows


def _meta(state: QuantizerState) -> dict[str, Any]:
    """Return what never changes: the layers, the configs and the shelves."""
    spec = state.spec
    machine = state.machine
    return {
        "name": spec.name,
        "params": spec.size,
        "other": spec.other_nbytes,
        "before": spec.nbytes,
        "layers": [_layer(layer) for layer in state.table.layers],
        "configs": [[c.mode, c.bits, c.group_size] for c in state.table.configs],
        "modes": [list(mode) for mode in state.modes],
        "solvers": [list(solver) for solver in state.solvers],
        "machine": {
            "label": machine.label,
            "total": machine.total_nbytes,
            "free": machine.free_nbytes,
        },
        "text": state.calibration,
    }


def _layer(layer: LayerSpec) -> dict[str, Any]:
    names = ("path", "kind", "role", "block", "shape", "dtype", "nbytes", "obstacle")
    sent = {name: getattr(layer, name) for name in names}
    sent["stored"] = layer.storage_label
    return sent


def _arrays(state: QuantizerState) -> dict[str, bytes]:
    """Return the error table: S configs by L layers, M measures of each."""
    table = state.table
    legal = table.legal.astype(np.uint8)
    exact = table.exact.astype(np.uint8)
    flags = legal | (exact << 1)  # (S, L)
    return {
        "values": table.values.astype("<f4").tobytes(),  # (M, S, L)
        "sizes": table.nbytes.astype("<f8").tobytes(),  # (S, L)
        "flags": flags.tobytes(),
        "kurtosis": table.kurtosis.astype("<f4").tobytes(),  # (L,)
    }


class QuantizerPanel(LivePanel[QuantizerState]):
    """The live panel of a ``Quantizer``."""

    view = QuantizerView
    operations = _OPS

    def payload(self, state: QuantizerState) -> dict[str, Any]:
        return payload(state)

    def large(self, before: QuantizerState, state: QuantizerState, ended: bool) -> dict[str, Any]:
        return _arrays(state)

    def small(self, state: QuantizerState, ack: int) -> dict[str, Any]:
        return choice(state, ack)

    def outdates_complaint(self, before: QuantizerState, state: QuantizerState) -> bool:
        return (before.plan, before.solver) != (state.plan, state.solver)
