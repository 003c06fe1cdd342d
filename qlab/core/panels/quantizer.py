"""What the quantizer panel shows at one moment, as a value.

``Quantizer.state`` returns it, and the views in ``qlab.views.quantizer`` draw it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from qlab import registry
from qlab.core.config.quant import QuantPlan
from qlab.core.config.spec import ModelSpec
from qlab.core.machine import Machine
from qlab.core.progress import Progress
from qlab.core.quantize.table import ErrorTable


class ModeChoice(NamedTuple):
    """A scheme on the shelf, as the menu and the sliders need it.

    Attributes:
        name: the ``mode``.
        title: one line that says what the format is.
        bits: legal bits, ascending.
        group_sizes: legal group sizes, ascending.
        default_bits: taken when only the mode is named.
        default_group_size: taken when only the mode is named.
    """

    name: str
    title: str
    bits: tuple[int, ...]
    group_sizes: tuple[int, ...]
    default_bits: int
    default_group_size: int


class SolverChoice(NamedTuple):
    """A solver on the shelf: its name, and one line that says how it chooses codes."""

    name: str
    title: str


def mode_choices() -> tuple[ModeChoice, ...]:
    """Return every scheme on the shelf."""
    return tuple(
        ModeChoice(
            name=scheme.name,
            title=scheme.title,
            bits=scheme.bits,
            group_sizes=scheme.group_sizes,
            default_bits=scheme.default_bits,
            default_group_size=scheme.default_group_size,
        )
        for scheme in registry.shelf("schemes").values()
    )


def solver_choices() -> tuple[SolverChoice, ...]:
    """Return every solver on the shelf."""
    shelf = registry.shelf("solvers").values()
    return tuple(SolverChoice(solver.name, solver.title) for solver in shelf)


@dataclass(frozen=True, eq=False, kw_only=True)
class QuantizerState:
    """One moment of a quantizer panel.

    Attributes:
        spec: the model.
        table: errors and sizes, all slider positions.
        plan: the storage chosen now.
        solver: name of the solver chosen now.
        solvers: every solver on the shelf.
        modes: every scheme on the shelf.
        machine: the memory that the weights should fit into.
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
    solvers: tuple[SolverChoice, ...]
    modes: tuple[ModeChoice, ...]
    machine: Machine
    calibration: str = ""
    totals: tuple[tuple[str, float], ...] = ()
    progress: Progress | None = None
    error: str = ""
    code: str = ""
    measure: str = "relative_error"
