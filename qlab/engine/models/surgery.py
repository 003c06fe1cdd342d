"""Finds, copies and replaces modules of a model: the only file that does.

Knows nothing of formats: what is put in a place is the caller's affair.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map


def module_at(root: nn.Module, path: str) -> nn.Module:
    """Return the module at a path such as ``model.layers.0.mlp.down_proj``."""
    node: Any = root
    for key in path.split("."):
        node = node[int(key)] if isinstance(node, list) else node[key]
    return node


def put_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put a module at a path, in place of what is there."""
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
    made = _copy(root, {})
    for path, module in (replacements or {}).items():
        put_module(made, path, module)
    return made


def _copy(node: Any, seen: dict[int, Any]) -> Any:
    if isinstance(node, nn.Module):
        if id(node) not in seen:  # a module that stands in two places stays one module
            seen[id(node)] = made = copy.copy(node)
            made._no_grad = set(node._no_grad)  # or freezing the copy would freeze the original
            for key, value in node.items():
                dict.__setitem__(made, key, _copy(value, seen))
        return seen[id(node)]
    if isinstance(node, dict):
        return {key: _copy(value, seen) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_copy(value, seen) for value in node)
    return node


def cast(root: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """Cast every floating-point parameter of a model in place, lazily.

    Integers (packed codes) stay.
    """
    root.update(
        tree_map(
            lambda a: a.astype(dtype) if mx.issubdtype(a.dtype, mx.floating) else a,
            root.parameters(),
        )
    )
    return root


def map_layers(
    root: nn.Module, paths: list[str], make: Callable[[str, nn.Module], nn.Module]
) -> nn.Module:
    """Return a twin in which each named module is replaced by ``make(path, module)``."""
    made = twin(root)
    for path in paths:
        put_module(made, path, make(path, module_at(made, path)))
    return made
