"""What this machine is: MLX's back end, and memory.

Estimates, guards and trials of products ask it. What needs MLX runs on the MLX thread.
"""

from __future__ import annotations

import os
import sys

from qlab.core.machine import Machine


def backend() -> str:
    """Name of MLX's back end: ``metal``, ``cuda`` or ``cpu``. Runs on the MLX thread."""
    import mlx.core as mx

    if mx.default_device() == mx.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def mlx_version() -> str:
    """Version of the MLX that is loaded, such as ``0.32.4``."""
    import mlx.core as mx

    return mx.__version__  # type: ignore[attr-defined]  # MLX has it, its stub does not


def wants_float32() -> bool:
    """Whether products should be computed in float32.

    Off the GPU, 16-bit products have no fast kernel.
    """
    return sys.platform.startswith("linux") and backend() == "cpu"


def machine() -> Machine:
    """Return the memory that a model must fit into. Runs on the MLX thread.

    On Metal, what the system recommends as working set less what MLX holds now; on CUDA the card's
    free memory; otherwise the available RAM. ``device_info`` has none of these keys on other back
    ends.
    """
    import mlx.core as mx

    name = backend()
    info = mx.device_info() if name != "cpu" else {}
    total, free = ram()
    if name == "metal":
        total = int(info.get("max_recommended_working_set_size", total))
        free = min(max(total - mx.get_active_memory(), 0), free or total)
    elif name == "cuda":
        total = int(info.get("total_memory", total))
        free = int(info.get("free_memory", total))
    return Machine(f"this machine ({name}, {total / 1e9:.1f} GB)", total, free)


def ram() -> tuple[int, int]:
    """Return physical memory and the part available, in bytes.

    All of it counts as available where the system does not say (macOS has no /proc).
    """
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable"):
                    return total, int(line.split()[1]) * 1024  # kB
    except OSError:
        pass
    return total, total
