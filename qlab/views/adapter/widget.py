"""The live adapter panel: what its browser half receives and may ask.

``Adapter.widget`` makes one. The browser gets, for every layer, what each rank recovers, so that
the sliders need no answer from the kernel.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import anywidget
import numpy as np
import traitlets as T

from qlab import registry
from qlab.core.adapt.recovery import GRID, noise_squares, on_grid
from qlab.core.config.lora import INITS, AdapterKind
from qlab.core.config.spec import LayerSpec
from qlab.core.panels.adapter import AdapterState
from qlab.views.shared.panel import LivePanel
from qlab.views.shared.wire import CSS, progress_row, source

# text, not a Path: a Path keeps every instance alive
ESM = source(
    "shared/panel.js",
    "shared/layers.js",
    "adapter/model.js",
    "adapter/map.js",
    "adapter/spectrum.js",
    "adapter/controls.js",
    "adapter/parts.js",
    "adapter/widget.js",
)
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
    config = state.config
    in_any_block = replace(config, num_layers=-1)  # the browser counts the blocks itself
    matched = {layer.path for layer in in_any_block.targets(state.spec)}
    return {
        "kind": config.kind,
        "rank": config.rank,
        "scale": config.scale,
        "dropout": config.dropout,
        "num_layers": config.num_layers,
        "init": config.init,
        "rslora": config.rslora,
        "keys": list(config.keys) if config.keys else None,
        "on": [layer.path in matched for layer in state.spec.layers],
        "dtype": config.dtype,
        "itemsize": config.itemsize,
        "storage": state.storage,
        "stale": state.stale,
        "obstacle": state.obstacle,
        "origin": state.origin,
        "optimizer": list(state.optimizer),
        "progress": progress_row(state.progress),
        "error": state.error,
        "ack": ack or 0,
    }


def _meta(state: AdapterState) -> dict[str, Any]:
    """Return what never changes: the layers, the kinds, and what white noise would give."""
    layers = state.spec.layers
    return {
        "name": state.spec.name,
        "params": state.spec.size,
        "source": state.source,
        "grid": list(GRID),
        "layers": [_layer(layer) for layer in layers],
        "noise": _noise(layers),
        "kinds": [[name, title, list(adapts)] for name, title, adapts in state.kinds],
        "sizes": {
            name: [_size_by_rank(registry.get("adapters", name), layer.shape) for layer in layers]
            for name, _, _ in state.kinds
        },
        "inits": [[name, title] for name, title in INITS.items()],
    }


def _layer(layer: LayerSpec) -> dict[str, Any]:
    names = ("path", "kind", "role", "block", "shape", "tied")
    return {name: getattr(layer, name) for name in names}


def _noise(layers: tuple[LayerSpec, ...]) -> dict[str, list[list[float]]]:
    """Return the spectrum of white noise by shape: singular values, and the share of each rank."""
    noise = {}
    for layer in layers:
        shape = layer.shape[-2:]
        squares = noise_squares(*shape)
        singular = on_grid(np.sqrt(squares))
        share = on_grid(np.cumsum(squares))
        noise[" ".join(map(str, shape))] = [_rounded(singular), _rounded(share)]
    return noise


def _size_by_rank(kind: AdapterKind, shape: tuple[int, ...]) -> list[int]:
    """Return a kind's parameters on a layer: a fixed number, and one for each unit of rank."""
    at_one = kind.size(shape, 1)
    at_two = kind.size(shape, 2)
    return [2 * at_one - at_two, at_two - at_one]


def _rounded(values: np.ndarray) -> list[float]:
    return [round(float(v), 5) for v in values[np.isfinite(values)]]


def _arrays(state: AdapterState) -> dict[str, bytes]:
    """Return what was measured: C curves over a grid of G ranks, for each of L layers."""
    layers = state.spec.layers
    curves = np.full((len(CURVES), len(layers), len(GRID)), np.nan, np.float32)  # (C, L, G)
    errors = np.full(len(layers), np.nan, np.float32)  # (L,)
    for column, layer in enumerate(layers):
        recovery = state.recoveries.get(layer.path)
        if recovery is None:
            continue
        errors[column] = recovery.relative_error
        by_name = {
            "singular": recovery.singular,
            "weight": recovery.weight,
            **recovery.output,
        }
        for number, name in enumerate(CURVES):
            if name in by_name:
                curves[number, column] = by_name[name]
    shares = np.clip(np.nan_to_num(curves), 0, 1)
    codes = np.round(shares * (_UNKNOWN - 1))
    codes[~np.isfinite(curves)] = _UNKNOWN
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
    if isinstance(config.get("keys"), list):
        config = {**config, "keys": tuple(config["keys"])}
    return {**intent, "config": config}
