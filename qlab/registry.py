"""Shelves: a file dropped on one (``schemes/``, ``solvers/``, …) is found.

A cell may register its own kind.

Knows the names of the shelves, not what stands on them. A shelf file ends with ``SHELF = (object,
…)``, each object with a unique ``name``.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any

from qlab.errors import ConfigError, nearest

_WORDS = {
    "schemes": "mode",
    "solvers": "solver",
    "adapters": "kind of adapter",
    "optimizers": "optimizer",
}
SHELVES = tuple(_WORDS)
_found: dict[str, dict[str, Any]] = {}


def shelf(kind: str) -> dict[str, Any]:
    """Return every object on a shelf by name, in file order; the first call imports the files.

    Args:
        kind: ``"schemes"``, ``"solvers"``, ``"adapters"`` or ``"optimizers"``.

    Raises:
        ConfigError: there is no such shelf.
    """
    if kind not in SHELVES:
        raise ConfigError(f"There is no shelf {kind!r}; shelves are {', '.join(SHELVES)}.")
    if kind not in _found:
        package = importlib.import_module(f"qlab.{kind}")
        objects: dict[str, Any] = {}
        for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
            for item in importlib.import_module(f"qlab.{kind}.{info.name}").SHELF:
                if item.name in objects:
                    raise ConfigError(
                        f"Two objects on the shelf {kind!r} are called {item.name!r}."
                    )
                objects[item.name] = item
        _found[kind] = objects
    return _found[kind]


def get(kind: str, name: str) -> Any:
    """Return one object of a shelf.

    Raises:
        ConfigError: no object has that name; the message lists the names and the nearest one.
    """
    objects = shelf(kind)
    if not isinstance(name, str) or name not in objects:
        word = _WORDS[kind]
        raise ConfigError(
            f"Unknown {word} {name!r}; choose one of {', '.join(objects)}.{nearest(name, objects)}"
        )
    return objects[name]


def register(kind: str, item: Any) -> Any:
    """Put an object that was defined in a notebook cell on a shelf, replacing one of the same name.

    Args:
        kind: ``"schemes"``, ``"solvers"``, ``"adapters"`` or ``"optimizers"``.
        item: an instance of ``Scheme``, ``Solver``, ``AdapterKind`` or ``OptimizerKind``
            (``qlab.core``).

    Returns:
        The object, so that the call can be an expression.
    """
    shelf(kind)[item.name] = item
    return item


class LazyModule:
    """A module that is imported when something in it is first asked for.

    To check a config, the files of a shelf are imported; what only their methods need (MLX above
    all) should not be loaded by that. A shelf file therefore says::

        if TYPE_CHECKING:
            import mlx.core as mx
        else:
            mx = LazyModule("mlx.core")

    Args:
        name: the module's full name.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(importlib.import_module(self._name), attribute)
