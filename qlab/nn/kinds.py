"""What kind of layer a module is: the one place that asks, whatever its storage format.

Used wherever a layer is described, stored, adapted or read.
"""

from __future__ import annotations

from typing import Any

import mlx.nn as nn

from qlab.nn.linear import LayerKind, Packed

# mlx-lm's experts of a mixture, known by name: importing mlx_lm takes seconds
_SWITCH_CLASSES = ("SwitchLinear", "QuantizedSwitchLinear")


def is_layer(module: Any) -> bool:
    """Whether a module is a layer whose weight qlab can store, adapt and read."""
    return _kind_or_none(module) is not None


def layer_kind(layer: nn.Module) -> LayerKind:
    """Return what kind of layer a module is: dense, quantized or packed makes no difference.

    Example:
        >>> layer_kind(nn.Linear(64, 64))
        'linear'

    Args:
        layer: one for which ``is_layer`` is true.

    Returns:
        ``linear`` (weight ``(out, in)``), ``embedding`` (weight ``(tokens, width)``, looked up or
        used as output head) or ``switch`` (experts of a mixture, weight ``(experts, out, in)``).

    Raises:
        TypeError: the module is none of these.
    """
    kind = _kind_or_none(layer)
    if kind is None:
        raise TypeError(f"{type(layer).__name__} is no linear layer, embedding or set of experts.")
    return kind


def _kind_or_none(module: Any) -> LayerKind | None:
    if isinstance(module, Packed):
        return module.kind
    if isinstance(module, (nn.Linear, nn.QuantizedLinear)):
        return "linear"
    if isinstance(module, (nn.Embedding, nn.QuantizedEmbedding)):
        return "embedding"
    if type(module).__name__ in _SWITCH_CLASSES:
        return "switch"
    return None
