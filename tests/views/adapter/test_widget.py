"""What the adapter panel sends and draws, without a browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qlab.core.panels.adapter import AdapterState
from qlab.core.adapt.recovery import GRID
from qlab.core.adapt.recovery import Recovery
from qlab.core.adapt.recovery import noise_squares
from qlab.core.adapt.recovery import on_grid
from qlab.core.config.spec import LayerSpec
from qlab.core.config.spec import ModelSpec
from qlab.core.config.lora import LoRAConfig
from qlab.views.adapter import widget as view
from qlab.views.adapter.static import html
from qlab.views.adapter.static import page
from qlab.views.adapter.static import text_line

WIDTH, OUT = 64, 32
SPEC = ModelSpec(
    "tiny",
    (
        LayerSpec(path="model.embed_tokens", kind="embedding", shape=(97, WIDTH), tied=True),
        *(
            LayerSpec(path=f"model.layers.{i}.{role}", kind="linear", shape=(OUT, WIDTH))
            for i in range(3)
            for role in ("self_attn.q_proj", "mlp.up_proj")
        ),
    ),
    other_size=10,
)
KINDS = (("lora", "LoRA", ("linear", "embedding")), ("dora", "DoRA", ("linear", "embedding")))


def found(path: str) -> Recovery:
    squares = np.linspace(2, 1, OUT) / np.linspace(2, 1, OUT).sum()
    noise, share = noise_squares(OUT, WIDTH), np.cumsum(squares)
    output = {
        init: on_grid(share**power)
        for init, power in (("residual", 1), ("diagonal", 0.5), ("qera", 0.25))
    }
    return Recovery(
        path=path,
        relative_error=0.09,
        singular=on_grid(np.sqrt(squares)),
        noise=on_grid(np.sqrt(noise)),
        weight=on_grid(share),
        noise_weight=on_grid(np.cumsum(noise)),
        output=output,
    )


def state(**changes) -> AdapterState:
    recoveries = {layer.path: found(layer.path) for layer in SPEC.layers[1:]}
    return replace(
        AdapterState(
            spec=SPEC,
            config=LoRAConfig(rank=8),
            storage="affine 4-bit g64",
            recoveries=recoveries,
            source="q",
            kinds=KINDS,
        ),
        **changes,
    )


def test_panel_is_small_and_loads_nothing_from_the_network():
    assert len(view.ESM.encode()) < 30 * 1024
    assert set(re.findall(r"https?://[^/\"']+", view.ESM + view.STYLES)) <= {"http://www.w3.org"}
    assert not re.search(r"\bimport\b\s*[({\"']", view.ESM)


def test_curves_are_sent_to_a_hundred_thousandth_and_unknown_ones_as_such():
    sent = view.payload(state())
    curves = np.frombuffer(sent["curves"], "<u2").reshape(5, len(SPEC.layers), len(GRID))
    assert (curves[:, 0] == 65535).all() and (curves[:, :, GRID.index(32) + 1 :] == 65535).all()
    assert np.allclose(curves[4, 1, :16] / 65534, found("x").output["qera"][:16], atol=1e-5)
    assert np.isnan(np.frombuffer(sent["errors"], "<f4")[0])
    json.dumps([sent["meta"], sent["state"]], allow_nan=False)


def test_choice_says_which_layers_the_keys_name_whatever_num_layers_is():
    sent = view.choice(
        state(config=LoRAConfig(rank=8, num_layers=1, keys=("q_proj", "embed_tokens"))), 7
    )
    assert sent["on"] == [True, True, False, True, False, True, False] and sent["ack"] == 7


def test_sizes_are_those_of_the_kinds():
    sizes = view.payload(state())["meta"]["sizes"]
    for kind in ("lora", "dora"):
        config = LoRAConfig(rank=8, kind=kind)
        mine = [fixed + 8 * slope for fixed, slope in sizes[kind][1:]]
        assert sum(mine) == config.size(SPEC)


def test_experts_are_sent_with_their_sizes_and_the_noise_of_one_of_them():
    experts = LayerSpec(
        path="model.layers.0.mlp.experts.up_proj", kind="switch", shape=(4, OUT, WIDTH)
    )
    kinds = tuple((name, title, (*adapts, "switch")) for name, title, adapts in KINDS)
    mixture = replace(SPEC, layers=(*SPEC.layers, experts))
    sent = view.payload(state(spec=mixture, kinds=kinds))
    assert sent["state"]["on"] == [False, *[True] * 7]
    assert (
        sent["meta"]["sizes"]["lora"][-1] == [0, 4 * (OUT + WIDTH)]
        and sent["meta"]["sizes"]["dora"][-1][0] == 4 * OUT
    )
    assert f"{OUT} {WIDTH}" in sent["meta"]["noise"] and sent["meta"]["layers"][-1]["shape"] == (
        4,
        OUT,
        WIDTH,
    )


def test_text_has_the_numbers():
    line = text_line(state())
    assert "rank 8, alpha 16" in line and "6 layers" in line and f"{6 * 8 * 96:,} trainable" in line
    text = html(state())
    assert (
        "<table" in text
        and "up_proj" in text
        and "a = qlab.Adapter(q, rank=8)" in text
        and "nan" not in text.lower()
    )
    assert "measured for another storage" in html(state(stale=True))
    assert "nothing measured yet" in html(state(recoveries={}))
    assert "trained: run 1" in text_line(state(origin="run 1"))


def test_names_from_outside_are_escaped():
    evil = state(
        spec=replace(SPEC, name="</script><img src=x>"),
        storage="<img src=x>",
        obstacle="<img src=x>",
    )
    for text in (html(evil), page(evil)):
        assert "<img src=x>" not in text


def test_page_needs_nothing_from_outside():
    assert set(re.findall(r"https?://[^/\"' ]+", page(state()))) <= {"http://www.w3.org"}
    assert ".qlab-cutline" in page(state())


def test_a_panel_sends_curves_seldom_while_a_job_runs_and_all_at_its_end():
    from qlab.core.progress import Progress

    panel = view.AdapterPanel(state(recoveries={}), lambda intent: None)
    empty, busy = panel.widget.curves, state(progress=Progress("x", 1, 2))
    panel.show(busy)
    first = panel.widget.curves
    panel.show(replace(busy, recoveries={}))
    assert first != empty and panel.widget.curves == first
    panel.show(state(recoveries={}))
    assert panel.widget.curves == empty and panel.widget.state["progress"] is None
    panel.close()


def test_pure_functions_of_the_panel(tmp_path):
    node = shutil.which("node")
    if node is None:
        pytest.skip("NODE IS MISSING: THE PANEL'S PURE FUNCTIONS ARE NOT TESTED")
    (tmp_path / "widget.mjs").write_text(view.ESM)
    sent = view.payload(
        state(config=LoRAConfig(rank=8, num_layers=2, kind="dora", init="qera", scale=0.5))
    )
    curves = np.frombuffer(sent["curves"], "<u2").tolist()
    (tmp_path / "sent.json").write_text(
        json.dumps({"meta": sent["meta"], "state": sent["state"], "curves": curves})
    )
    wanted = state(config=LoRAConfig(rank=8, num_layers=2, kind="dora", init="qera", scale=0.5))
    shares = [found("x").share(rank, "qera") for rank in (1, 8, 20, 32, 500)]
    expected = {
        "code": wanted.code,
        "size": wanted.report.size,
        "share": wanted.report.share,
        "shares": shares,
    }
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    shutil.copy(Path(__file__).with_name("widget.test.mjs"), tmp_path)
    done = subprocess.run(
        [node, "--test", "widget.test.mjs"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout
