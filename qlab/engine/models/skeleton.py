"""What a model is made of: from a module tree or from a config alone, without touching a weight.

Works for every architecture that mlx-lm has, because it asks the modules. Called when a model is
loaded, and for every estimate of a model that need not exist.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from qlab import registry
from qlab.core.config.quant import QuantConfig, stock_config
from qlab.core.config.spec import LayerSpec, ModelSpec
from qlab.engine.models.surgery import cast
from qlab.errors import LoadError, nearest
from qlab.nn.kinds import is_layer, layer_kind
from qlab.nn.linear import Packed, floating_dtype, is_quantized


def describe(module: nn.Module, name: str) -> ModelSpec:
    """Return the spec of a model; no array is evaluated.

    Args:
        module: an mlx-lm model, dense, quantized or lazy.
        name: what to call it.
    """
    leaves = [(path, leaf) for path, leaf in module.named_modules() if is_layer(leaf)]
    order = _order_of_leaves(module)
    leaves.sort(key=lambda item: order.get(item[0], len(order)))
    tied = not any(path.split(".")[-1] == "lm_head" for path, _ in leaves)
    layers = tuple(_layer(path, leaf, tied) for path, leaf in leaves)
    weights = {f"{path}.{name}" for path, leaf in leaves for name in _weight_arrays(leaf)}
    arrays: dict[str, Any] = dict(tree_flatten(module.parameters()))
    others = [array for path, array in arrays.items() if path not in weights]
    nbytes = sum(array.nbytes for array in others)
    size = sum(array.size for array in others)
    return ModelSpec(name, layers, nbytes, size)


def _order_of_leaves(module: nn.Module) -> dict[str, int]:
    """Number of each leaf module by path, in the order in which the model lists them."""
    leaves = tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)
    return {path: number for number, (path, _) in enumerate(leaves)}


def skeleton(config: dict[str, Any]) -> nn.Module:
    """Build mlx-lm's model from a config dict; its weights are lazy and need never exist.

    Args:
        config: the contents of a ``config.json``; ``torch_dtype`` or ``dtype`` names the
            checkpoint's dtype.

    Raises:
        LoadError: unknown architecture, or a config that its class refuses.
    """
    model_class, args_class = model_classes(config)
    try:
        module = model_class(args_class.from_dict(config))
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise LoadError(
            f"The config does not describe a {config['model_type']!r} model: {error}."
        ) from error
    return cast(module, getattr(mx, _dtype_name(config), mx.bfloat16))


def _dtype_name(config: dict[str, Any]) -> str:
    """Name of the checkpoint's dtype: of the model, else of its text part, else bfloat16."""
    for part in (config, config.get("text_config") or {}):
        name = part.get("torch_dtype") or part.get("dtype")
        if name:
            return str(name)
    return "bfloat16"


def model_classes(config: dict[str, Any]) -> tuple[type, Any]:
    """Return mlx-lm's model class and arguments class for a config.

    Raises:
        LoadError: no ``model_type``, or one that mlx-lm does not have; names the nearest.
    """
    import pkgutil

    from mlx_lm import models
    from mlx_lm.utils import _get_classes

    kind = config.get("model_type")
    if not isinstance(kind, str):
        raise LoadError(
            "config.json has no model_type, so this is not a model that mlx-lm could open."
        )
    try:
        return _get_classes(config)
    except ValueError:
        known = [info.name for info in pkgutil.iter_modules(models.__path__)]
        raise LoadError(
            f"Unknown architecture {kind!r}: mlx-lm has no such model_type.{nearest(kind, known)}"
        ) from None


def _weight_arrays(leaf: nn.Module) -> list[str]:
    """Names of a layer's parameters that hold its weight (not its bias)."""
    return [name for name, value in leaf.items() if isinstance(value, mx.array) and name != "bias"]


def _layer(path: str, leaf: Any, tied: bool) -> LayerSpec:
    kind = layer_kind(leaf)
    nbytes = sum(leaf[name].nbytes for name in _weight_arrays(leaf))
    shape, dtype = _logical(leaf)
    groups = {
        g for scheme in registry.shelf("schemes").values() for g in scheme.group_sizes if g >= 32
    }
    obstacle = None
    if all(shape[-1] % group for group in groups):
        obstacle = f"input width {shape[-1]} is not a multiple of 32, the smallest group"
    return LayerSpec(
        path=path,
        kind=kind,
        shape=shape,
        dtype=str(dtype).removeprefix("mlx.core."),
        itemsize=dtype.size,
        nbytes=nbytes,
        storage=_storage(leaf),
        tied=tied and kind == "embedding",
        obstacle=obstacle,
    )


def _logical(leaf: Any) -> tuple[tuple[int, ...], mx.Dtype]:
    """Shape of the dense weight ``(…, out, in)``, and the dtype that dequantizing gives."""
    if isinstance(leaf, Packed):
        return leaf.shape, leaf.dtype
    if not is_quantized(leaf):
        return leaf.weight.shape, leaf.weight.dtype
    *outer, words = leaf.weight.shape  # uint32 words of codes
    return (*outer, words * 32 // leaf.bits), floating_dtype(leaf.scales)


def _storage(leaf: Any) -> QuantConfig | None:
    if isinstance(leaf, Packed):
        return leaf.config
    if is_quantized(leaf):
        return stock_config(leaf.mode, leaf.bits, leaf.group_size)
    return None
