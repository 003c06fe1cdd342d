"""Every error that a user can meet. Each says what is wrong, where, and the nearest legal value.

Knows nothing of models, widgets or MLX.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from functools import wraps
from inspect import getattr_static, signature
from typing import Any, TypeVar

T = TypeVar("T")


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
    """Another process of a run on several devices is gone, has failed, or would not train the same."""


def nearest(name: str, candidates: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the candidate closest to ``name``, or an empty string."""
    found = difflib.get_close_matches(str(name), list(candidates), n=1, cutoff=0.4)
    return f" Did you mean {found[0]!r}?" if found else ""


def named(cls: type[T]) -> type[T]:
    """Let a class refuse an argument that it does not know with the nearest that it knows, as a
    file's key is refused.
    """
    make = cls.__init__
    legal = tuple(
        name for name in signature(make).parameters if name != "self" and not name.startswith("_")
    )

    @wraps(make)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        unknown = [key for key in settings if key not in legal and not key.startswith("_")]
        if unknown:
            told = " ".join(f"{key!r} is no setting.{nearest(key, legal)}" for key in unknown)
            raise ConfigError(f"{cls.__name__}: {told} The settings are {', '.join(legal)}.")
        make(self, *args, **settings)

    cls.__init__ = init
    return cls


def sealed(cls: type[T]) -> type[T]:
    """Let a class refuse to set, on an object once made, a public attribute that it has not.

    A typo would be lost.
    """
    make = cls.__init__
    put = cls.__setattr__
    # its own methods are called, not set; traitlets sets inherited ones
    legal = {
        name
        for name in dir(cls)
        if name not in vars(cls) or hasattr(getattr_static(cls, name), "__set__")
    }

    @wraps(make)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        make(self, *args, **settings)
        self._made = True

    def set_attribute(self: Any, name: str, value: Any) -> None:
        has = vars(self)
        if "_made" in has and not name.startswith("_") and name not in legal and name not in has:
            known = [known for known in (*has, *legal) if not known.startswith("_")]
            hint = " It is a method: call it." if hasattr(cls, name) else nearest(name, known)
            raise AttributeError(f"{name!r} of {cls.__name__} is nothing to set.{hint}")
        put(self, name, value)

    cls.__init__ = init
    cls.__setattr__ = set_attribute
    return cls
