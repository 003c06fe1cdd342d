"""Old spellings that still work, with a ``DeprecationWarning`` that says the new one.

Every deprecation of the package goes through one of these functions, so that a search for
``deprecated`` lists all that a release may drop. Sits beside ``errors`` and knows nothing.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import wraps
from inspect import Parameter, signature
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])
Settings = TypeVar("Settings")


def deprecated_name(old: str, new: str) -> None:
    """Warn that a spelling is old, at the line outside of qlab that wrote it.

    Args:
        old: what was written, such as ``Trainer.resume(path)``.
        new: what to write instead.
    """
    message = f"{old} is deprecated and goes with the next release; use {new}."
    warnings.warn(message, DeprecationWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """Return the ``stacklevel``, seen from ``deprecated_name``, of the first frame outside."""
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and _is_qlab(frame.f_globals["__name__"]):
        frame = frame.f_back
        level += 1
    return level


def _is_qlab(module: str) -> bool:
    return module == "qlab" or module.startswith("qlab.")


def positional_arguments(function: Function) -> Function:
    """Decorate a function whose arguments have become keyword-only: old calls still work.

    Arguments beyond the positional ones fill the keyword-only ones in the order in which they are
    declared, with a warning that names them.

    Example:
        >>> @positional_arguments
        ... def resize(image, *, width, height): ...
        >>> resize(image, 640, 480)  # works, and warns: write width=640, height=480
    """
    parameters = signature(function).parameters.values()
    positional = [p.name for p in parameters if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    keywords = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    most = len(positional) + len(keywords)

    @wraps(function)
    def call(*args: Any, **settings: Any) -> Any:
        extra = args[len(positional) :]
        if not extra or len(args) > most:  # too many: let Python say so
            return function(*args, **settings)
        names = keywords[: len(extra)]
        twice = [name for name in names if name in settings]
        if twice:
            name = function.__qualname__.removesuffix(".__init__")
            raise TypeError(f"{name}() got two values for {twice[0]!r}.")
        by_name = ", ".join(f"{name}=…" for name in names)
        name = function.__qualname__.removesuffix(".__init__")
        deprecated_name(f"{name}(…) with {len(extra)} more values by position", by_name)
        return function(
            *args[: len(positional)], **dict(zip(names, extra, strict=True)), **settings
        )

    return call  # type: ignore[return-value]  # wraps keeps the signature, which no type says


def positional_settings(cls: type[Settings]) -> type[Settings]:
    """Decorate a keyword-only dataclass so that values by position still work, with a warning."""
    cls.__init__ = positional_arguments(cls.__init__)
    return cls
