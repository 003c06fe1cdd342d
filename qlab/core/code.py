"""The Python that rebuilds a panel's state. Knows no model."""

from __future__ import annotations

from qlab.core.config import QuantConfig, QuantPlan


def _arguments(config: QuantConfig) -> str:
    return f'bits={config.bits}, group_size={config.group_size}, mode="{config.mode}"'


def code_line(plan: QuantPlan, solver: str = "rtn") -> str:
    """Return the lines that rebuild a plan, a line for the quantizer and one for each override."""
    chosen = "" if solver == "rtn" else f', solver="{solver}"'
    lines = [f"q = qlab.Quantizer(model, {_arguments(plan.default)}{chosen})"]
    for path, config in plan.overrides.items():
        lines.append(f'q.set("{path}", {_arguments(config) if config else "bits=None"})')
    return "\n".join(lines)
