"""qlab: a notebook-native laboratory for quantized LLMs on MLX.

The door: public names are resolved at first use, so that importing qlab loads neither MLX nor
widgets. On Linux the one thing done at import is to load OpenBLAS, which must happen before MLX is
imported (``qlab.runtime.blas``).
"""

from __future__ import annotations

import importlib
from typing import Any

from qlab.runtime import blas as _blas

__version__ = "0.1.0"

_blas.preload()

_HOME = {
    # what a notebook holds
    "load": "qlab.lab.model",
    "Model": "qlab.lab.model",
    "Quantizer": "qlab.lab.quantizer",
    "Adapter": "qlab.lab.adapter",
    "Trainer": "qlab.lab.trainer",
    "runs": "qlab.lab.kernel_runs",
    "estimate": "qlab.lab.estimation",
    "Estimate": "qlab.lab.estimate",
    # what may be asked
    "QuantConfig": "qlab.core.config.quant",
    "QuantPlan": "qlab.core.config.quant",
    "LoRAConfig": "qlab.core.config.lora",
    "TrainConfig": "qlab.core.config.train",
    # what is answered
    "QuantReport": "qlab.core.quantize.report",
    "MemoryEstimate": "qlab.core.memory.estimate",
    "EvalReport": "qlab.core.evaluate.text",
    "JudgeReport": "qlab.core.evaluate.judge",
    "RunReport": "qlab.core.train.report",
    "StepEvent": "qlab.core.train.events",
    "QlabError": "qlab.errors",
    # what can be added to the shelves
    "Scheme": "qlab.core.config.quant",
    "Solver": "qlab.core.config.solver",
    "AdapterKind": "qlab.core.config.lora",
    "OptimizerKind": "qlab.core.config.train",
    "register": "qlab.registry",
    # everything else
    "doctor": "qlab.runtime.doctor",
    "reporters": "qlab.engine.train.reporters",
}
_MODULES = ("reporters",)  # public as a whole
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        from qlab.errors import nearest

        raise AttributeError(f"qlab has no attribute {name!r}.{nearest(name, _HOME)}")
    home = importlib.import_module(_HOME[name])
    value = home if name in _MODULES else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
