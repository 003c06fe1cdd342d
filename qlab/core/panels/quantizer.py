"""What the quantizer panel shows at one moment, as a value.

``Quantizer.state`` returns it, and the views in ``qlab.views.quantizer`` draw it.
"""

from __future__ import annotations

from dataclasses import dataclass

from qlab.core.config.quant import QuantPlan
from qlab.core.config.spec import ModelSpec
from qlab.core.machine import Machine
from qlab.core.progress import Progress
from qlab.core.quantize.table import ErrorTable


@dataclass(frozen=True, eq=False, kw_only=True)
class PanelState:
    """One moment of a quantizer panel.

    Attributes:
        spec: the model.
        table: errors and sizes, all slider positions.
        plan: the storage chosen now.
        solver: name of the solver chosen now.
        solvers: ``(name, title)`` of every solver on the shelf.
        modes: ``(name, title, bits, group_sizes, default_bits, default_group_size)`` of every
            scheme on the shelf.
        machine: the budget.
        calibration: what text the predicted ΔKL comes from, such as ``embedded text, 1024 tokens``;
            empty if none yet.
        totals: measured end-to-end numbers: ``kl_nats``, ``perplexity``, ``perplexity_before`` of
            the plan, and the true KL of single layers by path; may be empty.
        progress: the running job, or None.
        error: the last error in words, or an empty string.
        code: the line of Python that rebuilds this state.
        measure: measure that the bars show: ``kl_nats`` or ``relative_error``.
    """

    spec: ModelSpec
    table: ErrorTable
    plan: QuantPlan
    solver: str
    solvers: tuple[tuple[str, str], ...]
    modes: tuple[tuple[str, str, tuple[int, ...], tuple[int, ...], int, int], ...]
    machine: Machine
    calibration: str = ""
    totals: tuple[tuple[str, float], ...] = ()
    progress: Progress | None = None
    error: str = ""
    code: str = ""
    measure: str = "relative_error"
