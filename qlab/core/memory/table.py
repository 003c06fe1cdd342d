"""``EstimateTable``: estimates side by side, as ``qlab.estimate`` returns them for lists."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from qlab.core.display import Displayed, size_text
from qlab.core.graph.parts import PARTS
from qlab.core.memory.estimate import MemoryEstimate

Row = TypeVar("Row", bound=MemoryEstimate)

# a narrow page shows the first columns, so what decides comes before the single parts
_COLUMNS = ("model", "weights as", "adapter", "batch", "total", "verdict")


@dataclass(frozen=True)
class EstimateTable(Displayed, Generic[Row]):
    """Estimates side by side; a cell shows them as a table.

    Example::

        table = qlab.estimate("demo", [qlab.QuantConfig(bits=4), qlab.QuantConfig(bits=8)])
        table[0].total_nbytes           # an estimate
        table.to_pandas()               # sizes in bytes

    Attributes:
        rows: one estimate each.
    """

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def records(self) -> list[dict[str, Any]]:
        """Return one flat record a row; sizes in bytes."""
        return [_record(est) for est in self.rows]

    def to_pandas(self) -> Any:
        """Return a pandas data frame, a row for each estimate; sizes in bytes."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def cells(self) -> list[list[str]]:
        """Return the table as text: its head, then a row for each estimate.

        Parts that take no memory in any row have no column.
        """
        names = [name for name in PARTS if any(est.parts[name] for est in self.rows)]
        return [[*_COLUMNS, *names], *(_row(est, names) for est in self.rows)]

    def __repr__(self) -> str:
        lines = self.cells()
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(_padded(line, widths) for line in lines)


def _record(est: MemoryEstimate) -> dict[str, Any]:
    train = est.setup.train
    parts = {f"{name}_nbytes": nbytes for name, nbytes in est.parts.items()}
    return {
        "model": est.spec.name,
        "weights as": est.setup.label,
        "rank": est.setup.adapter.rank,
        "batch_size": train.batch_size,
        "max_seq_length": train.max_seq_length,
        "grad_checkpoint": train.grad_checkpoint,
        **parts,
        "total_nbytes": est.total_nbytes,
        "low_nbytes": est.low_nbytes,
        "high_nbytes": est.high_nbytes,
        "level": est.level,
        "verdict": est.verdict().word,
    }


def _row(est: MemoryEstimate, names: list[str]) -> list[str]:
    """Return the cells of an estimate under ``_COLUMNS`` and the named parts."""
    train = est.setup.train
    lora = est.setup.adapter
    batch = f"{train.batch_size}×{train.max_seq_length}"
    if train.grad_checkpoint:
        batch += " ckpt"
    return [
        est.spec.name,
        est.setup.label,
        f"{lora.kind} r{lora.rank}",
        batch,
        size_text(est.total_nbytes),
        est.verdict().word,
        *(size_text(est.parts[name]) for name in names),
    ]


def _padded(line: list[str], widths: list[int]) -> str:
    cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
    return "  ".join(cells).rstrip()
