"""The rules of the house, checked by machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "qlab", "tests", "docs"],
        ["ruff", "format", "--check", "qlab", "tests", "docs"],
        ["lint-imports"],
        ["pyright"],
    ],
    ids=lambda c: c[0] + c[1] if len(c) > 1 else c[0],
)
def test_linter_is_content(command):
    tool = Path(sys.executable).with_name(command[0])
    done = subprocess.run([str(tool), *command[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_importing_qlab_loads_neither_mlx_nor_widgets_and_is_quick():
    code = (
        "import sys, time; t = time.perf_counter(); import qlab; t = time.perf_counter() - t;"
        "print(t, [m for m in ('mlx', 'mlx.core', 'mlx_lm', 'ipywidgets', 'anywidget', 'traitlets', 'plotly') if m in sys.modules])"
    )
    times = []
    for _ in range(3):
        seconds, loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split(
            " ", 1
        )
        assert loaded.strip() == "[]"
        times.append(float(seconds))
    assert min(times) < 0.3


def test_a_quant_config_is_checked_without_mlx():
    code = (
        "import sys, qlab;"
        "qlab.QuantPlan(qlab.QuantConfig('nf4', group_size=32), {'a': qlab.QuantConfig(bits=3)});"
        "print([m for m in ('mlx', 'mlx.core', 'mlx_lm') if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"


def test_misspelt_public_name_gets_the_nearest():
    import qlab

    with pytest.raises(AttributeError, match="Quantizer"):
        _ = qlab.Quantiser
