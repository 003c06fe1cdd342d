"""Measures the memory that a run takes by itself, whatever else the process holds.

The loop starts a measurement before each batch and reads it after the step.
"""

from __future__ import annotations

import mlx.core as mx


class MemoryMeter:
    """Active and peak memory of one run, in bytes; other arrays of the process are not counted.

    Attributes:
        other_nbytes: held by the process besides the run, such as the model before it was
            quantized.
        peak_nbytes: most that the run has taken so far.
        base_nbytes: size of the model and the optimizer's state; the loop sets it once.
    """

    def __init__(self) -> None:
        self.other_nbytes = 0
        self.peak_nbytes = 0
        self.base_nbytes = 0

    @property
    def active_nbytes(self) -> int:
        """What the run holds now."""
        return mx.get_active_memory() - self.other_nbytes

    def start(self, sums_nbytes: int = 0) -> None:
        """Start a measurement: whatever is in memory beyond the run's arrays belongs to others.

        Args:
            sums_nbytes: size of the gradients summed so far in this step.
        """
        run_nbytes = self.base_nbytes + sums_nbytes
        self.other_nbytes = max(mx.get_active_memory() - run_nbytes, 0)
        mx.reset_peak_memory()

    def read(self) -> None:
        """Take the peak since ``start`` into account."""
        peak_nbytes = mx.get_peak_memory() - self.other_nbytes
        self.peak_nbytes = max(self.peak_nbytes, peak_nbytes)
