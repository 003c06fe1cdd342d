"""What the panel sends and draws, without a browser."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import qlab
from qlab.views.quantizer import widget as view
from qlab.views.quantizer.static import html
from qlab.views.quantizer.static import page
from qlab.views.quantizer.static import text_line


@pytest.fixture(scope="module")
def state(demo):
    q = qlab.Quantizer(demo)
    q.predict()
    q.set("model.layers.0.mlp.down_proj", bits=8)
    yield q.state()
    q.close()


def test_panel_is_small_and_loads_nothing_from_the_network():
    assert len(view.ESM.encode()) + len(view.CSS.encode()) < 30 * 1024
    assert set(re.findall(r"https?://[^/\"']+", view.ESM + view.CSS)) <= {"http://www.w3.org"}
    assert not re.search(r"\bimport\b\s*[({\"']", view.ESM)


def test_payload_holds_the_table(state):
    sent = view.payload(state)
    values = np.frombuffer(sent["values"], "<f4").reshape(state.table.values.shape)
    assert np.array_equal(values, state.table.values, equal_nan=True)
    assert len(sent["flags"]) == state.table.legal.size
    assert list(sent["state"]["overrides"].values()) == [
        state.table.row(qlab.QuantConfig("affine", 8, 64))
    ]


def test_static_forms_tell_the_numbers(state):
    assert re.search(r"4\.\d\d bits/weight, 10\.5 MB → 3\.\d MB, predicted ΔKL", text_line(state))
    text = html(state)
    assert "<table" in text and "predicted ΔKL" in text and "down_proj" in text


def test_names_from_outside_are_escaped(state):
    evil = replace(state, spec=replace(state.spec, name="</script><img src=x>"))
    for text in (html(evil), page(evil)):
        assert "<img src=x>" not in text


def test_page_needs_nothing_from_outside(state):
    assert set(re.findall(r"https?://[^/\"' ]+", page(state))) <= {"http://www.w3.org"}


def test_pure_functions_of_the_panel(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("NODE IS MISSING: THE PANEL'S PURE FUNCTIONS ARE NOT TESTED")
    (tmp_path / "widget.mjs").write_text(view.ESM)
    shutil.copy(Path(__file__).with_name("widget.test.mjs"), tmp_path)
    done = subprocess.run(
        [node, "--test", "widget.test.mjs"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
