"""Pauses Python's garbage collector while very many small objects are made.

The graph of a training step is some hundred thousand tuples that all live until its formula is
read. The collector scans them again and again and finds nothing: no graph refers to itself.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collection() -> Iterator[None]:
    """Pause the garbage collector within; afterwards it is as it was.

    The pause is the whole process's, so use it for seconds, not for minutes.

    Example:
        >>> with paused_collection():
        ...     graph = read_step()
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
