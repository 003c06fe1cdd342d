"""``RunMemory``: the peak memory of a training run, predicted by formula or measured by one step.

``Trainer`` asks it for ``t.estimate`` and ``t.probe()``.
"""

from __future__ import annotations

from typing import Any

from qlab.core.config.train import TrainConfig
from qlab.core.memory.estimate import MemoryEstimate
from qlab.engine.data.batches import Feed
from qlab.engine.train.setup import with_largest_batch
from qlab.lab.adapter import Adapter
from qlab.lab.estimation import estimate, with_largest_window


class RunMemory:
    """Peak memory of a run, for the storage and the adapter that are chosen now.

    Args:
        adapter: adapter to train; its sliders may still move.
        feed: batches to train on.
    """

    def __init__(self, adapter: Adapter, feed: Feed) -> None:
        self._adapter = adapter
        self._feed = feed
        self._choice: Any = None  # storage and adapter that the estimate is for
        self._estimate: MemoryEstimate | None = None

    @property
    def predicted_nbytes(self) -> int:
        """The last estimate's total, or 0 if there was none."""
        return self._estimate.total_nbytes if self._estimate is not None else 0

    def estimate(self, config: TrainConfig) -> MemoryEstimate:
        """Return the estimate; computed again only if storage or adapter have changed."""
        choice = self._present_choice()
        if self._estimate is None or self._choice != choice:
            adapter = self._adapter
            planned = adapter.model.plan is None and adapter.plan
            self._estimate = self._by_formula(adapter if planned else adapter.model, config)
            self._choice = choice
        return self._estimate

    def measure(self, config: TrainConfig) -> MemoryEstimate:
        """Run one step with the largest batch and return what it took; nothing is changed by it."""
        base = self._adapter.base
        setup = self._by_formula(base, config).setup
        measured = estimate(base, None, setup.adapter, setup.train, level="measured")
        self._estimate = measured
        self._choice = self._present_choice()
        return measured

    def _present_choice(self) -> Any:
        return self._adapter.plan, self._adapter.config

    def _by_formula(self, source: Any, config: TrainConfig) -> MemoryEstimate:
        train = with_largest_batch(config, self._feed)
        return with_largest_window(estimate(source, adapter=self._adapter.config, train=train))
