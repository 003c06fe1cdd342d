"""``RunInputs``: everything that a run is computed from, as one value.

The lab (``Trainer``) and ``qlab.run`` make one and hand it to ``setup.prepare_run``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import mlx.nn as nn

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.spec import ModelSpec
from qlab.core.config.train import TrainConfig
from qlab.core.train.rows import Rows
from qlab.engine.data.batches import Feed
from qlab.engine.step.protocol import Arrays
from qlab.engine.train.distributed import ALONE, Ranks


@dataclass(frozen=True, kw_only=True, eq=False)
class RunInputs:
    """Everything that a run is computed from.

    Attributes:
        module: the base model, frozen; it is not changed.
        spec: layers of the base.
        lora: config of the adapter.
        config: config of the run.
        feed: batches to train on, by number.
        held_out: rows for validation, or None.
        parameters: the adapter's arrays by path, evaluated.
        source: where the base was loaded from; written into each checkpoint's adapter config.
        folder: where checkpoints are written, or None for no checkpoints.
        start_from: folder of the checkpoint to continue from, or None for a new run.
        ranks: the processes that train together, all with the same parameters.
        limit_nbytes: memory at which the run ends; None derives it from the free memory.
    """

    module: nn.Module
    spec: ModelSpec
    lora: LoRAConfig
    config: TrainConfig
    feed: Feed
    held_out: Rows | None
    parameters: Arrays
    source: str = ""
    folder: Path | None = None
    start_from: Path | None = None
    ranks: Ranks = ALONE
    limit_nbytes: int | None = None
