"""The live quantizer panel: two widgets, one for each direction. Sees states, never a model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import anywidget
import numpy as np
import traitlets as T

from qlab.core.panels.quantizer import PanelState
from qlab.views.shared.wire import CSS, Controls, source

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
    keys = ("path", "kind", "role", "block", "shape", "dtype", "nbytes", "stored", "obstacle")
    return {
        "name": state.spec.name,
        "params": state.spec.size,
        "other": state.spec.other_nbytes,
        "before": state.spec.nbytes,
        "layers": [{key: getattr(layer, key) for key in keys} for layer in state.table.layers],
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


class QuantizerPanel:
    """One panel: shows states and passes on what the user wants.

    Args:
        state: shown first.
        on_intent: called on a widget thread with a checked intent; what it raises is shown in the
            panel.
    """

    def __init__(self, state: PanelState, on_intent: Callable[[dict[str, Any]], None]) -> None:
        self._state = state
        self._lock = threading.Lock()
        self._controls = Controls()
        self.widget = QuantizerView(controls=self._controls, **payload(state))
        self._controls.listen(_OPS, on_intent, self._refused)

    def show(self, state: PanelState, ack: int | None = None) -> None:
        """Send what has changed, in one message.

        After a job everything, so that a view can never stay behind.
        """
        arrays = _arrays(state)
        # hold_sync loses what another thread sets while it flushes
        with self._lock:
            ended = self._state.progress is not None and state.progress is None
            self._state = state
            with self.widget.hold_sync():
                for name, value in arrays.items():
                    if getattr(self.widget, name) != value:
                        setattr(self.widget, name, value)
                self.widget.state = choice(state, ack)
            if ended:
                self.widget.send_state([*arrays, "state"])

    def close(self) -> None:
        """Take the panel off the page."""
        self.widget.close()
        self._controls.close()

    def _refused(self, seq: int | None, error: str) -> None:
        with self._lock:
            self.widget.state = {**choice(self._state, seq), "error": error}
