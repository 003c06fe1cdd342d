"""The live adapter panel: two widgets, one for each direction. Sees states, never a model."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anywidget
import numpy as np
import traitlets as T

from qlab import registry
from qlab.core.adapt.recovery import GRID, noise_squares, on_grid
from qlab.core.config.lora import INITS
from qlab.core.panels.adapter import AdapterState
from qlab.views.shared.wire import CSS, Controls, source

ESM = source(
    "shared/panel.js", "adapter/widget.js"
)  # text, not a Path: a Path keeps every instance alive
STYLES = CSS + "\n" + source("adapter/widget.css")
CURVES = ("singular", "weight", "residual", "diagonal", "qera")
_UNKNOWN = 65535  # curves are sent as whole numbers from 0 to 65534, for shares from 0 to 1
_EVERY_S = 1.0  # while a job runs, curves are sent no more often than this

_OPS = {"hello": {}, "set": {"config": dict}, "measure": {}, "cancel": {}, "reset": {}}
_SETTINGS = {
    "kind": str,
    "rank": int,
    "scale": (int, float),
    "dropout": (int, float),
    "num_layers": int,
    "init": str,
    "rslora": bool,
    "keys": (list, str, type(None)),
}


class AdapterView(anywidget.AnyWidget):
    """Kernel → browser: what every rank recovers, and the present choice."""

    _esm = ESM
    _css = STYLES
    meta = T.Dict().tag(sync=True)
    curves = T.Bytes(b"").tag(sync=True)
    errors = T.Bytes(b"").tag(sync=True)
    state = T.Dict().tag(sync=True)
    controls = anywidget.WidgetTrait().tag(sync=True)


def payload(state: AdapterState) -> dict[str, Any]:
    """Return a state as the traits of the view (without ``controls``)."""
    return {"meta": _meta(state), **_arrays(state), "state": choice(state, None)}


def choice(state: AdapterState, ack: int | None) -> dict[str, Any]:
    """Return what changes while a user works: the adapter, the running job, the last error."""
    lora = state.config
    matched = {layer.path for layer in replace(lora, num_layers=-1).targets(state.spec)}
    return {
        **{
            name: getattr(lora, name)
            for name in ("kind", "rank", "scale", "dropout", "num_layers", "init", "rslora")
        },
        "keys": list(lora.keys) if lora.keys else None,
        "on": [layer.path in matched for layer in state.spec.layers],
        "dtype": lora.dtype,
        "itemsize": lora.itemsize,
        "storage": state.storage,
        "stale": state.stale,
        "obstacle": state.obstacle,
        "origin": state.origin,
        "optimizer": list(state.optimizer),
        "progress": [state.progress.what, state.progress.done, state.progress.total]
        if state.progress
        else None,
        "error": state.error,
        "ack": ack or 0,
    }


def _meta(state: AdapterState) -> dict[str, Any]:
    layers = state.spec.layers
    shapes = {" ".join(map(str, layer.shape[-2:])): layer.shape[-2:] for layer in layers}
    noise = {key: noise_squares(*shape) for key, shape in shapes.items()}
    return {
        "name": state.spec.name,
        "params": state.spec.size,
        "source": state.source,
        "grid": list(GRID),
        "layers": [
            {key: getattr(x, key) for key in ("path", "kind", "role", "block", "shape", "tied")}
            for x in layers
        ],
        "noise": {
            key: [_rounded(on_grid(np.sqrt(n))), _rounded(on_grid(np.cumsum(n)))]
            for key, n in noise.items()
        },
        "kinds": [[name, title, list(adapts)] for name, title, adapts in state.kinds],
        # numbers of a rank: those of every kind are a fixed part and one that grows with the rank
        "sizes": {
            name: [_parts(registry.get("adapters", name), x.shape) for x in layers]
            for name, _, _ in state.kinds
        },
        "inits": [[name, title] for name, title in INITS.items()],
    }


def _parts(kind: Any, shape: tuple[int, ...]) -> list[int]:
    first = kind.size(shape, 1)
    second = kind.size(shape, 2)
    return [2 * first - second, second - first]


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 5) for v in values[np.isfinite(values)]]


def _arrays(state: AdapterState) -> dict[str, bytes]:
    layers = state.spec.layers
    curves = np.full((len(CURVES), len(layers), len(GRID)), np.nan, np.float32)
    errors = np.full(len(layers), np.nan, np.float32)
    for column, layer in enumerate(layers):
        if (found := state.recoveries.get(layer.path)) is not None:
            errors[column] = found.relative_error
            curves[0, column] = found.singular
            curves[1, column] = found.weight
            for number, name in enumerate(CURVES[2:], 2):
                if name in found.output:
                    curves[number, column] = found.output[name]
    codes = np.where(
        np.isfinite(curves),
        np.round(np.clip(np.nan_to_num(curves), 0, 1) * (_UNKNOWN - 1)),
        _UNKNOWN,
    )
    return {"curves": codes.astype("<u2").tobytes(), "errors": errors.astype("<f4").tobytes()}


class AdapterPanel:
    """One panel: shows states and passes on what the user wants.

    Args:
        state: shown first.
        on_intent: called on a widget thread with a checked intent; what it raises is shown in the
            panel.
    """

    def __init__(self, state: AdapterState, on_intent: Callable[[dict[str, Any]], None]) -> None:
        self._state = state
        self._on_intent = on_intent
        self._lock = threading.Lock()
        self._told = 0.0
        self._complaint = ""
        self._controls = Controls()
        self.widget = AdapterView(controls=self._controls, **payload(state))
        self._controls.listen(_OPS, self._heard, self._refused)

    def show(self, state: AdapterState, ack: int | None = None) -> None:
        """Send what has changed, in one message.

        After a job everything, so that a view can never stay behind.
        """
        # hold_sync loses what another thread sets while it flushes
        with self._lock:
            ended = self._state.progress is not None and state.progress is None
            due = state.progress is None or time.monotonic() - self._told > _EVERY_S
            arrays = _arrays(state) if due else {}
            if (state.config, state.storage) != (self._state.config, self._state.storage):
                self._complaint = ""  # what was refused is history
            self._state = state
            with self.widget.hold_sync():
                for name, value in arrays.items():
                    if getattr(self.widget, name) != value:
                        setattr(self.widget, name, value)
                        self._told = time.monotonic()
                self.widget.state = self._choice(ack)
            if ended:
                self.widget.send_state([*arrays, "state"])

    def close(self) -> None:
        """Take the panel off the page."""
        self.widget.close()
        self._controls.close()

    def _choice(self, ack: int | None) -> dict[str, Any]:
        sent = choice(self._state, ack)
        return {
            **sent,
            "error": sent["error"] or self._complaint,
        }  # a running job must not wipe it away

    def _heard(self, intent: dict[str, Any]) -> None:
        self._complaint = ""
        self._on_intent(_settled(intent))

    def _refused(self, seq: int | None, error: str) -> None:
        with self._lock:
            self._complaint = error
            self.widget.state = self._choice(seq)


def _settled(intent: dict[str, Any]) -> dict[str, Any]:
    """Return an intent whose settings are of the right types; a list of keys becomes a tuple."""
    if intent["op"] != "set":
        return intent
    config = intent["config"]
    for name, value in config.items():
        if name not in _SETTINGS or not isinstance(value, _SETTINGS[name]):
            raise ValueError(f"The panel sent no usable {name!r}: {value!r}.")
    keys = config.get("keys")
    return {
        **intent,
        "config": {**config, "keys": tuple(keys)} if isinstance(keys, list) else config,
    }
