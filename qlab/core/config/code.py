"""The Python that rebuilds what a panel shows, to be pasted into a cell. Knows no model.

Panels call the ``…_code`` functions; ``code_line`` is a quantizer's.
"""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.train import TrainConfig

_ADAPTER_ORDER = ("kind", "scale", "dropout", "keys", "num_layers", "init", "rslora", "dtype")


def adapter_code(config: LoRAConfig, source: str) -> str:
    """Return the line that rebuilds an adapter, with only what differs from the defaults.

    Args:
        config: of the adapter.
        source: name of the variable that is adapted, such as ``q``.
    """
    default = LoRAConfig()
    settings = [f"rank={config.rank}"]
    for name in _ADAPTER_ORDER:
        value = getattr(config, name)
        if value != getattr(default, name):
            settings.append(f"{name}={_literal(value)}")
    return f"a = qlab.Adapter({source}, {', '.join(settings)})"


def _literal(value: Any) -> str:
    """Write a setting of an adapter as Python, with double quotes and short numbers."""
    if isinstance(value, str):
        return f'"{value}"'.replace("'", '"')
    if isinstance(value, tuple):
        return repr(list(value)).replace("'", '"')
    if isinstance(value, bool):
        return str(value)
    return f"{value:g}"


def _storage_arguments(config: QuantConfig) -> str:
    return f'bits={config.bits}, group_size={config.group_size}, mode="{config.mode}"'


def code_line(plan: QuantPlan, solver: str = "rtn") -> str:
    """Return the lines that rebuild a plan, a line for the quantizer and one for each override.

    Args:
        plan: storage of every layer.
        solver: name of the solver.
    """
    chosen = "" if solver == "rtn" else f', solver="{solver}"'
    lines = [f"q = qlab.Quantizer(model, {_storage_arguments(plan.default)}{chosen})"]
    for path, config in plan.overrides.items():
        storage = _storage_arguments(config) if config else "bits=None"
        lines.append(f'q.set("{path}", {storage})')
    return "\n".join(lines)


def base_code(source: str, plan: QuantPlan | None, solver: str) -> str:
    """Return the lines that write a model to the folder ``base``.

    Args:
        source: what ``qlab.load`` opens.
        plan: how the model is stored; None leaves it as it came.
        solver: name of the solver.
    """
    lines = ["import qlab", "", f"model = qlab.load({json.dumps(source)})"]
    if plan is None:
        return "\n".join([*lines, 'model.save("base")'])
    text = "" if solver == "rtn" else "  # with the calibration text of then, if it was your own"
    return "\n".join([*lines, code_line(plan, solver), f'q.quantize().save("base"){text}'])


def setup_code(plan: QuantPlan | None, adapter: LoRAConfig, train: TrainConfig) -> str:
    """Return the lines that estimate a setup."""
    return "\n".join(
        [
            f"quant = {_plan(plan)}",
            f"adapter = {_short(adapter)}",
            f"train = {_short(train)}",
            "est = qlab.estimate(model, quant, adapter, train)",
        ]
    )


def train_code(config: TrainConfig) -> str:
    """Return the lines that make a run again, with the adapter ``a`` and the rows ``data``."""
    return f"t = qlab.Trainer(a, data, {_short(config)})\nt.start()"


def _plan(plan: QuantPlan | None) -> str:
    if plan is None:
        return "None"
    default = _config(plan.default)
    if not plan.overrides:
        return default
    pairs = [f'"{path}": {_config(config)}' for path, config in plan.overrides.items()]
    return f"qlab.QuantPlan({default}, {{{', '.join(pairs)}}})"


def _config(config: QuantConfig | None) -> str:
    if config is None:
        return "None"
    return f'qlab.QuantConfig("{config.mode}", bits={config.bits}, group_size={config.group_size})'


def _short(config: LoRAConfig | TrainConfig) -> str:
    """Write a config with only what differs from its defaults."""
    settings = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value != field.default:
            settings.append(f"{field.name}={value!r}")
    return f"qlab.{type(config).__name__}({', '.join(settings)})"
