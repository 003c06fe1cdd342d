"""The Pareto front of configs."""

from __future__ import annotations

from qlab.core.config.quant import QuantConfig
from qlab.core.config.spec import LayerSpec
from qlab.core.config.spec import ModelSpec
from qlab.core.quantize.compare import compare
from qlab.core.quantize.table import ErrorTable


def test_front_holds_what_nothing_beats():
    layers = tuple(
        LayerSpec(path=f"l.{i}.w", kind="linear", shape=(128, 128), nbytes=32768) for i in range(3)
    )
    configs = (
        QuantConfig("affine", 4, 64),
        QuantConfig("affine", 5, 64),
        QuantConfig("symmetric", 5, 64),
    )
    table = ErrorTable.empty(layers, configs)
    for row, error in enumerate((0.1, 0.05, 0.06)):
        table.values[0, row] = error
    report = compare(ModelSpec("m", layers), table)
    assert [p.config for p in report.front] == [configs[0], configs[1]]
    assert {p.config: p.dominated_by for p in report.points}[configs[2]] == "affine 5-bit g64"
