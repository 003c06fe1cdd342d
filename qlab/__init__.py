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
    "load": "qlab.lab.model",
    "Model": "qlab.lab.model",
    "Quantizer": "qlab.lab.quantizer",
    "Adapter": "qlab.lab.adapter",
    "Trainer": "qlab.lab.trainer",
    "runs": "qlab.lab.trainer",
    "QuantConfig": "qlab.core.config.quant",
    "QuantPlan": "qlab.core.config.quant",
    "QuantReport": "qlab.core.quantize.report",
    "QlabError": "qlab.errors",
    "estimate": "qlab.lab.estimation",
    "LoRAConfig": "qlab.core.config.lora",
    "TrainConfig": "qlab.core.config.train",
    "Estimate": "qlab.lab.estimate",
    "MemoryEstimate": "qlab.core.memory.estimate",
    "doctor": "qlab.runtime.doctor",
    "reporters": "qlab.engine.train.reporters",
    "register": "qlab.registry",
}
__all__ = [*_HOME, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        from qlab.errors import nearest

        raise AttributeError(f"qlab has no attribute {name!r}.{nearest(name, _HOME)}")
    home = importlib.import_module(_HOME[name])
    value = (
        home if name == "reporters" else getattr(home, name)
    )  # the one room that is public as a whole
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
