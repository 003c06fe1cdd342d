"""Finds, copies and replaces modules of a model: the only file that does.

It knows nothing of formats: the caller decides what is put in a place.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


def module_at(root: nn.Module, path: str) -> Any:
    """Return the module, or list of modules, at a path.

    Example:
        >>> module_at(model, "model.layers.0.mlp.down_proj")
        Linear(input_dims=192, output_dims=64, bias=False)

    Args:
        root: the model.
        path: keys and numbers in lists, joined by dots.
    """
    node: Any = root
    for key in path.split("."):
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


def put_module(root: nn.Module, path: str, module: nn.Module | Sequence[Any]) -> None:
    """Put a module, or a list of modules, at a path, in place of what is there."""
    parent_path, _, key = path.rpartition(".")
    parent: Any = module_at(root, parent_path) if parent_path else root
    if isinstance(parent, list):
        parent[int(key)] = module
    else:
        parent[key] = module


def twin(root: nn.Module, replacements: Mapping[str, nn.Module] | None = None) -> nn.Module:
    """Copy a model's tree of modules, sharing every array; then replace modules of the copy.

    The original never changes, so a job that works on a twin may be interrupted at any point.

    Args:
        root: the model.
        replacements: new modules by path.
    """
    copied = _copy(root, {})
    for path, module in (replacements or {}).items():
        put_module(copied, path, module)
    return copied


def map_layers(
    root: nn.Module, paths: list[str], make: Callable[[str, Any], nn.Module]
) -> nn.Module:
    """Return a twin in which each named module is replaced by ``make(path, module)``."""
    copied = twin(root)
    for path in paths:
        put_module(copied, path, make(path, module_at(copied, path)))
    return copied


def cast(root: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """Cast every floating-point parameter of a model in place, lazily, and return the model.

    Integers (packed codes) stay.
    """

    def cast_one(array: mx.array) -> mx.array:
        return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array

    root.update(tree_map(cast_one, root.parameters()))
    return root


def _copy(node: Any, copies: dict[int, Any]) -> Any:
    """Copy a tree of modules.

    Args:
        node: a module, a container, or anything else, which is shared.
        copies: of the modules copied so far, by the identity of the original: a module that stands
            in two places stays one module.
    """
    if isinstance(node, nn.Module):
        if id(node) not in copies:
            copied = copy.copy(node)
            copies[id(node)] = copied
            copied._no_grad = set(node._no_grad)  # or freezing the copy would freeze the original
            for key, value in node.items():
                dict.__setitem__(copied, key, _copy(value, copies))
        return copies[id(node)]
    if isinstance(node, dict):
        return {key: _copy(value, copies) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_copy(value, copies) for value in node)
    return node
