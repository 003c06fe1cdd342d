"""Guards memory while something runs, so that a run saves its weights before it is too late.

Running out of memory aborts the process, uncatchably, and in a notebook that loses every variable.
Wiring all memory (as mlx-lm's ``train`` does and does not undo) has brought whole Macs down (mlx
issue 3186, mlx-lm issues 828 and 883). So nothing is wired here, MLX is kept below a limit, and the
limits that were set before are put back.
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
_MUCH_LEFT = 0.5  # of a model's bytes: if MLX still holds more, something still refers to it


class Guard:
    """A limit on what MLX holds, chosen from what is free now.

    Args:
        limit_nbytes: a limit to set instead.

    Attributes:
        limit_nbytes: what MLX may hold, active and cached.
    """

    def __init__(self, limit_nbytes: int | None = None) -> None:
        here = machine()
        available = min(here.free_nbytes + _mlx_nbytes(), here.total_nbytes)
        self.limit_nbytes = limit_nbytes or int(_SHARE * available)

    def reason(self) -> str:
        """Say why a run must end now; an empty string while all is well.

        MLX's cache is given back first: that may be enough.
        """
        if not self._excess():
            return ""
        mx.clear_cache()
        return self._excess()

    def _excess(self) -> str:
        """Say which limit is exceeded; an empty string if none is."""
        nbytes = _mlx_nbytes()
        if nbytes > self.limit_nbytes:
            return f"MLX holds {size_text(nbytes)}, and {size_text(self.limit_nbytes)} is the limit"
        total, free = ram()
        if free < _RESERVE * total:
            return f"only {size_text(free)} of this machine's memory are left"
        return ""

    @contextmanager
    def limits(self) -> Iterator[None]:
        """Within, keep MLX below the limit; afterwards, put back what was set before."""
        memory = mx.set_memory_limit(self.limit_nbytes)  # returns the limit before
        cache = mx.set_cache_limit(0)  # the only way to read it
        mx.set_cache_limit(min(cache, int(_CACHE_SHARE * self.limit_nbytes)))
        try:
            yield
        finally:
            mx.set_memory_limit(memory)
            mx.set_cache_limit(cache)


def _mlx_nbytes() -> int:
    """Bytes that MLX holds: in use, and cached for reuse."""
    return mx.get_active_memory() + mx.get_cache_memory()


def release(expected_nbytes: int) -> str:
    """Collect garbage and empty MLX's cache; say what came back and what did not.

    Args:
        expected_nbytes: size of the model whose memory should come back.
    """
    before = _mlx_nbytes()
    gc.collect()
    mx.clear_cache()
    after = _mlx_nbytes()
    given_back = max(before - after, 0)
    text = f"{given_back / 1e9:.3f} GB given back, {after / 1e9:.3f} GB still held by MLX."
    if after > _MUCH_LEFT * expected_nbytes:
        text += (
            " Other models, quantizers made from this one, or IPython's Out and _ may hold the "
            "rest."
        )
    return text
