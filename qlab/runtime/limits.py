"""Watches memory while something runs, so that a run ends with its weights saved before the machine
is in danger.

Running out of memory aborts the process, uncatchably, and wiring all of it has brought whole Macs
down. So nothing is wired here, MLX is held below a limit, and the limits that were found are put
back. Knows no model.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from qlab.core.display import size_text
from qlab.runtime.device import machine, ram

_SHARE = 0.92  # of what was free at the start, that MLX may hold
_CACHE_SHARE = 0.25  # of that, freed buffers kept for reuse
_RESERVE = 0.04  # of the machine's memory, that stays free for everything else


class Guard:
    """A limit on what MLX holds, chosen from what is free now.

    Attributes:
        limit_nbytes: what MLX may hold, active and cached.
    """

    def __init__(self, limit_nbytes: int | None = None) -> None:
        place = machine()
        held = mx.get_active_memory() + mx.get_cache_memory()
        self.limit_nbytes = limit_nbytes or int(
            _SHARE * min(place.free_nbytes + held, place.total_nbytes)
        )

    def reason(self) -> str:
        """Say why a run must end now; empty while all is well. Frees MLX's cache before it says so."""
        if self._over():
            mx.clear_cache()
        if held := self._over():
            return held
        return ""

    def _over(self) -> str:
        held = mx.get_active_memory() + mx.get_cache_memory()
        if held > self.limit_nbytes:
            return f"MLX holds {size_text(held)}, and {size_text(self.limit_nbytes)} is the limit"
        total, left = ram()
        if left < _RESERVE * total:
            return f"only {size_text(left)} of this machine's memory are left"
        return ""

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Hold MLX below the limit within; put back what was set before."""
        memory = mx.set_memory_limit(self.limit_nbytes)
        cache = mx.set_cache_limit(0)
        mx.set_cache_limit(min(cache, int(_CACHE_SHARE * self.limit_nbytes)))
        try:
            yield
        finally:
            mx.set_memory_limit(memory)
            mx.set_cache_limit(cache)


def release(expected_nbytes: int) -> str:
    """Collect garbage and empty MLX's cache; say what came back and what did not."""
    before = mx.get_active_memory() + mx.get_cache_memory()
    gc.collect()
    mx.clear_cache()
    after = mx.get_active_memory() + mx.get_cache_memory()
    text = (
        f"{max(before - after, 0) / 1e9:.3f} GB given back, {after / 1e9:.3f} GB still held by MLX."
    )
    if after > 0.5 * expected_nbytes:
        text += " Other models, quantizers made from this one, or IPython's Out and _ may hold the rest."
    return text
