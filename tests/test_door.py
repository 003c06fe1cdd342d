"""The door: its names, and that opening it loads nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qlab

# a name leaves this list only after a release in which it warned
NAMES = [
    "Adapter",
    "AdapterKind",
    "Estimate",
    "EvalReport",
    "JudgeReport",
    "LoRAConfig",
    "MemoryEstimate",
    "Model",
    "OptimizerKind",
    "QlabError",
    "QuantConfig",
    "QuantPlan",
    "QuantReport",
    "Quantizer",
    "RunReport",
    "Scheme",
    "Solver",
    "StepEvent",
    "TrainConfig",
    "Trainer",
    "__version__",
    "doctor",
    "estimate",
    "load",
    "register",
    "reporters",
    "runs",
]


def test_the_public_names_are_these():
    assert sorted(qlab.__all__) == NAMES == dir(qlab)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_there_and_says_what_it_is(name):
    value = getattr(qlab, name)
    assert value.__doc__ or name == "__version__"


def test_a_name_that_is_not_there_is_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="no attribute 'Quantiser'. Did you mean 'Quantizer'"):
        _ = qlab.Quantiser


def test_importing_loads_neither_mlx_nor_widgets_nor_the_lab():
    code = (
        "import sys, qlab\n"
        "heavy = ('mlx', 'mlx_lm', 'traitlets', 'anywidget', 'numpy', 'pandas', 'qlab.lab')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "[]"


@pytest.mark.parametrize("name", ["Scheme", "Solver", "AdapterKind", "OptimizerKind"])
def test_a_base_class_of_a_shelf_loads_no_mlx(name):
    code = f"import sys, qlab\nqlab.{name}\nprint('mlx' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == "False"
