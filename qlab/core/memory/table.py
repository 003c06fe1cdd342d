"""``EstimateTable``: estimates side by side."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from qlab.core.display import size_text, wide
from qlab.core.graph.parts import PARTS
from qlab.core.memory.estimate import MemoryEstimate


@dataclass(frozen=True)
class EstimateTable:
    """Estimates side by side.

    Attributes:
        rows: one estimate each.
    """

    rows: tuple[MemoryEstimate, ...]

    def __iter__(self) -> Iterator[MemoryEstimate]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> MemoryEstimate:
        return self.rows[index]

    def records(self) -> list[dict[str, Any]]:
        """One flat record a row; sizes in bytes."""
        return [
            {
                "model": est.spec.name,
                "weights as": est.setup.label,
                "rank": est.setup.adapter.rank,
                "batch_size": est.setup.train.batch_size,
                "max_seq_length": est.setup.train.max_seq_length,
                "grad_checkpoint": est.setup.train.grad_checkpoint,
                **{f"{name}_nbytes": n for name, n in est.parts.items()},
                "total_nbytes": est.total_nbytes,
                "low_nbytes": est.low_nbytes,
                "high_nbytes": est.high_nbytes,
                "level": est.level,
                "verdict": est.verdict().word,
            }
            for est in self.rows
        ]

    def to_pandas(self) -> Any:
        """Return a data frame, one row an estimate; sizes in bytes."""
        import pandas as pd

        return pd.DataFrame(self.records())

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        names = [name for name in PARTS if any(est.parts[name] for est in self.rows)]
        head = [
            "model",
            "weights as",
            "adapter",
            "batch",
            "total",
            "verdict",
            *names,
        ]  # a narrow page shows the first
        rows = []
        for est in self.rows:
            train = est.setup.train
            adapter = est.setup.adapter
            batch = f"{train.batch_size}×{train.max_seq_length}" + (
                " ckpt" if train.grad_checkpoint else ""
            )
            whole = [size_text(est.total_nbytes), est.verdict().word]
            sizes = [size_text(est.parts[name]) for name in names]
            rows.append(
                [
                    est.spec.name,
                    est.setup.label,
                    f"{adapter.kind} r{adapter.rank}",
                    batch,
                    *whole,
                    *sizes,
                ]
            )
        return head, rows

    def __repr__(self) -> str:
        head, rows = self._cells()
        widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
        return "\n".join(
            "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
            for row in [head, *rows]
        )

    def _repr_html_(self) -> str:
        head, rows = self._cells()
        body = "".join(
            f"<tr>{''.join(f'<td>{html.escape(c)}</td>' for c in row)}</tr>" for row in rows
        )
        return wide(
            f"<table><thead><tr>{''.join(f'<th>{c}</th>' for c in head)}</tr></thead><tbody>{body}</tbody></table>"
        )
