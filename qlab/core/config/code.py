"""The Python that rebuilds a panel's state. Knows no model."""

from __future__ import annotations

import json
from dataclasses import fields

from qlab.core.config.lora import LoRAConfig
from qlab.core.config.quant import QuantConfig, QuantPlan
from qlab.core.config.train import TrainConfig


def adapter_code(config: LoRAConfig, source: str) -> str:
    """Return the line that rebuilds an adapter, with only what differs from the defaults."""
    default = LoRAConfig()
    shown = [f"rank={config.rank}"]
    for name in ("kind", "scale", "dropout", "keys", "num_layers", "init", "rslora", "dtype"):
        value = getattr(config, name)
        if value != getattr(default, name):
            text = (
                f'"{value}"'
                if isinstance(value, str)
                else repr(list(value))
                if isinstance(value, tuple)
                else f"{value:g}"
            )
            shown.append(f"{name}={value if isinstance(value, bool) else text}".replace("'", '"'))
    return f"a = qlab.Adapter({source}, {', '.join(shown)})"


def _arguments(config: QuantConfig) -> str:
    return f'bits={config.bits}, group_size={config.group_size}, mode="{config.mode}"'


def code_line(plan: QuantPlan, solver: str = "rtn") -> str:
    """Return the lines that rebuild a plan, a line for the quantizer and one for each override."""
    chosen = "" if solver == "rtn" else f', solver="{solver}"'
    lines = [f"q = qlab.Quantizer(model, {_arguments(plan.default)}{chosen})"]
    for path, config in plan.overrides.items():
        lines.append(f'q.set("{path}", {_arguments(config) if config else "bits=None"})')
    return "\n".join(lines)


def base_code(source: str, plan: QuantPlan | None, solver: str) -> str:
    """Return the lines that write a model of a source to the folder ``base``, stored by a plan or,
    without one, as it came.
    """
    lines = ["import qlab", "", f"model = qlab.load({json.dumps(source)})"]
    if plan is None:
        return "\n".join([*lines, 'model.save("base")'])
    text = "" if solver == "rtn" else "  # with the calibration text of then, if it was your own"
    return "\n".join([*lines, code_line(plan, solver), f'q.quantize().save("base"){text}'])


def setup_code(plan: QuantPlan | None, adapter: LoRAConfig, train: TrainConfig) -> str:
    """Return the lines that estimate a setup."""
    lines = [f"quant = {_plan(plan)}", f"adapter = {_short(adapter)}", f"train = {_short(train)}"]
    return "\n".join([*lines, "est = qlab.estimate(model, quant, adapter, train)"])


def train_code(config: TrainConfig) -> str:
    """Return the lines that make a run again, with the adapter ``a`` and the rows ``data`` at hand."""
    return f"t = qlab.Trainer(a, data, {_short(config)})\nt.start()"


def _plan(plan: QuantPlan | None) -> str:
    if plan is None or not plan.overrides:
        return _config(plan.default if plan else None)
    own = ", ".join(f'"{path}": {_config(config)}' for path, config in plan.overrides.items())
    return f"qlab.QuantPlan({_config(plan.default)}, {{{own}}})"


def _config(config: QuantConfig | None) -> str:
    if config is None:
        return "None"
    return f'qlab.QuantConfig("{config.mode}", bits={config.bits}, group_size={config.group_size})'


def _short(config: LoRAConfig | TrainConfig) -> str:
    """Write a config with only what differs from its defaults."""
    shown = [
        f"{f.name}={getattr(config, f.name)!r}"
        for f in fields(config)
        if getattr(config, f.name) != f.default
    ]
    return f"qlab.{type(config).__name__}({', '.join(shown)})"
