"""The script that compares estimates with peaks on a card prints both levels, with the loss in chunks and at once."""

from __future__ import annotations

import re
import sys

from tests.bench import cuda_memory


def test_every_setting_of_a_shape_is_measured_traced_and_foreseen(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cuda_memory", "tiny"])
    monkeypatch.setitem(
        cuda_memory.SHAPES, "tiny", {**cuda_memory.SHAPES["tiny"], "num_hidden_layers": 4}
    )
    cuda_memory.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("tiny ")]
    assert (
        len(rows) == len(cuda_memory.SETTINGS["tiny"])
        and sum("chunk none" in line for line in rows) == 2
    )
    for line in rows:
        traced, formula = (float(x) for x in re.findall(r"\(\s*([+-][0-9.]+) %\)", line))
        assert -3 < traced < 15 and abs(formula - traced) < 5, (
            line
        )  # tiny products let the device keep up
    assert [line.split()[0] for line in lines[-2:]] == ["traced", "formula"]
