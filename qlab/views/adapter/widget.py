"""The live adapter panel: two widgets, one for each direction. Sees states, never a model."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import anywidget
import numpy as np
import traitlets as T

from qlab import registry
from qlab.core.adapt.recovery import GRID, noise_squares, on_grid
from qlab.core.config.lora import INITS
from qlab.core.panels.adapter import AdapterState
from qlab.views.shared.panel import LivePanel
from qlab.views.shared.wire import CSS, source

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


class AdapterPanel(LivePanel[AdapterState]):
    """The live panel of an ``Adapter``."""

    view = AdapterView
    operations = _OPS
    _sent_at = 0.0  # when curves were sent last

    def payload(self, state: AdapterState) -> dict[str, Any]:
        return payload(state)

    def large(self, before: AdapterState, state: AdapterState, ended: bool) -> dict[str, Any]:
        now = time.monotonic()
        measuring = state.progress is not None
        if measuring and now - self._sent_at <= _EVERY_S:
            return {}
        self._sent_at = now
        return _arrays(state)

    def small(self, state: AdapterState, ack: int) -> dict[str, Any]:
        return choice(state, ack)

    def outdates_complaint(self, before: AdapterState, state: AdapterState) -> bool:
        return (before.config, before.storage) != (state.config, state.storage)

    def settled(self, intent: dict[str, Any]) -> dict[str, Any]:
        return _settled(intent)


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
