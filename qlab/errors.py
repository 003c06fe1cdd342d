"""Every error that a user can meet. Each says what is wrong, where, and the nearest legal value.

Knows nothing of models, widgets or MLX.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from functools import wraps
from inspect import getattr_static, signature
from typing import Any, ParamSpec, TypeVar

T = TypeVar("T")
P = ParamSpec("P")


class QlabError(Exception):
    """Base class of all errors that qlab raises on purpose."""


class ConfigError(QlabError, ValueError):
    """A setting is not legal (bits, group size, mode, budget, option name)."""


class LayerNotFoundError(QlabError, KeyError):
    """A layer path names no layer of the model."""

    def __str__(self) -> str:  # KeyError would show the repr, with quotes and escapes
        return str(self.args[0]) if self.args else ""


class LoadError(QlabError, OSError):
    """A model source is missing, truncated, not a model, or of an unknown architecture."""


class SaveError(QlabError, OSError):
    """A model could not be written; whatever stood at the path before is untouched."""


class WeightsError(QlabError, ValueError):
    """Weights hold NaN or infinity, or no layer of the model can be quantized."""


class DataError(QlabError, ValueError):
    """Rows to train on have faults; names every row, its key and what is wrong."""


class UnsupportedError(QlabError, NotImplementedError):
    """The model is built in a way that this cannot serve; says which way."""


class BusyError(QlabError, RuntimeError):
    """The object is in use by a running job."""


class RankError(QlabError, RuntimeError):
    """Another process of a run on several devices is gone, failed, or would train otherwise."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the candidate closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(str(name), list(candidates), n=1, cutoff=0.4)
    return f" Did you mean {matches[0]!r}?" if matches else ""


def reject_unknown_arguments(cls: type[T]) -> type[T]:
    """Decorate a class so that it answers an unknown argument with the nearest known one.

    Python's own ``TypeError`` would not list what there is. Names with an underscore are private
    and pass.

    Raises:
        ConfigError: from the class's constructor; names every unknown argument.
    """
    make = cls.__init__
    legal = _settings_of(make)

    @wraps(make)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        _check_known(cls.__name__, settings, legal)
        make(self, *args, **settings)

    cls.__init__ = init
    return cls


def reject_unknown_settings(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function or method so that it answers as ``reject_unknown_arguments`` does.

    Raises:
        ConfigError: from the function; names every unknown argument and the nearest known one.
    """
    legal = _settings_of(function)

    @wraps(function)
    def call(*args: P.args, **settings: P.kwargs) -> T:
        _check_known(function.__qualname__, settings, legal)
        return function(*args, **settings)

    return call


def _settings_of(function: Callable[..., Any]) -> list[str]:
    """Return the public arguments of a function by name, without ``self``."""
    names = signature(function).parameters
    return [name for name in names if name != "self" and not name.startswith("_")]


def _check_known(owner: str, settings: Iterable[str], legal: list[str]) -> None:
    """Refuse names that are no settings; those with an underscore are private and pass."""
    unknown = [name for name in settings if name not in legal and not name.startswith("_")]
    if unknown:
        refusals = [f"{name!r} is no setting.{nearest(name, legal)}" for name in unknown]
        raise ConfigError(f"{owner}: {' '.join(refusals)} The settings are {', '.join(legal)}.")


def reject_unknown_attributes(cls: type[T]) -> type[T]:
    """Decorate a class so that its objects refuse to set a public attribute that they do not have.

    Python would accept ``q.bit = 4`` and the typo would be lost.

    Raises:
        AttributeError: from setting an attribute once the object is built; names the nearest.
    """
    make = cls.__init__
    set_any = cls.__setattr__
    # methods of qlab's classes are called, not set; traitlets does set what it inherits
    own_classes = [kind for kind in cls.__mro__ if kind is cls or _is_of_qlab(kind)]
    own = {name for kind in own_classes for name in vars(kind)}
    legal = {
        name
        for name in dir(cls)
        if name not in own or hasattr(getattr_static(cls, name), "__set__")
    }

    @wraps(make)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        make(self, *args, **settings)
        self._is_built = True

    def set_attribute(self: Any, name: str, value: Any) -> None:
        present = vars(self)
        is_known = name.startswith("_") or name in legal or name in present
        if "_is_built" in present and not is_known:
            raise AttributeError(
                f"{cls.__name__} has no settable attribute {name!r}.{hint(name, present)}"
            )
        set_any(self, name, value)

    def hint(name: str, present: Iterable[str]) -> str:
        if hasattr(cls, name):
            return " It is a method: call it."
        return nearest(name, [x for x in (*present, *legal) if not x.startswith("_")])

    cls.__init__ = init
    cls.__setattr__ = set_attribute
    return cls


def _is_of_qlab(kind: type) -> bool:
    return kind.__module__.split(".")[0] == "qlab"
