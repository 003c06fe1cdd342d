"""Shelves: a file dropped on one (``schemes/``, ``solvers/``, …) is found by its name.

A notebook cell may register its kinds too. A shelf file ends with ``SHELF = (object, …)``, each
object with a unique ``name``. Knows the names of the shelves, not what stands on them.
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
_shelves: dict[str, dict[str, Any]] = {}  # those that have been read, by kind


def shelf(kind: str) -> dict[str, Any]:
    """Return every object on a shelf by name, in file order; the first call imports the files.

    Args:
        kind: ``"schemes"``, ``"solvers"``, ``"adapters"`` or ``"optimizers"``.

    Raises:
        ConfigError: there is no such shelf.
    """
    if kind not in SHELVES:
        raise ConfigError(f"There is no shelf {kind!r}; shelves are {', '.join(SHELVES)}.")
    if kind not in _shelves:
        _shelves[kind] = _read(kind)
    return _shelves[kind]


def _read(kind: str) -> dict[str, Any]:
    package = importlib.import_module(f"qlab.{kind}")
    names = sorted(info.name for info in pkgutil.iter_modules(package.__path__))
    objects: dict[str, Any] = {}
    for name in names:
        for item in importlib.import_module(f"qlab.{kind}.{name}").SHELF:
            if item.name in objects:
                raise ConfigError(f"Two objects on the shelf {kind!r} are called {item.name!r}.")
            objects[item.name] = item
    return objects


def get(kind: str, name: str) -> Any:
    """Return one object of a shelf.

    Raises:
        ConfigError: no object has that name; the message lists the names and the nearest one.
    """
    objects = shelf(kind)
    if not isinstance(name, str) or name not in objects:
        word = _WORDS[kind]
        legal = ", ".join(objects)
        raise ConfigError(
            f"Unknown {word} {name!r}; choose one of {legal}.{nearest(name, objects)}"
        )
    return objects[name]


def register(kind: str, item: Any) -> Any:
    """Put an object that was defined in a notebook cell on a shelf, replacing one of the same name.

    Example:
        >>> qlab.register("adapters", Gain())  # a subclass of qlab.AdapterKind
        >>> a = qlab.Adapter(model, kind="gain")

    Args:
        kind: ``"schemes"``, ``"solvers"``, ``"adapters"`` or ``"optimizers"``.
        item: an instance of ``qlab.Scheme``, ``qlab.Solver``, ``qlab.AdapterKind`` or
            ``qlab.OptimizerKind``.

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
