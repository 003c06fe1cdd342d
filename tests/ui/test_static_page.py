"""The self-contained page in a real Chromium: sliders work from a file, with no kernel and no network."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import qlab
from qlab.core.config.code import code_line
from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.views.quantizer.static import page as page_of
from tests.views.cards.test_runs import judged, runs

PATH = "model.layers.0.mlp.down_proj"
HEIGHTS = "[...document.querySelectorAll('.qlab-bar')].map(r => +r.getAttribute('height'))"


@pytest.fixture(scope="module")
def state(demo):
    q = qlab.Quantizer(demo)
    q.close()
    q.set(PATH, bits=8)
    made = q.state()
    errors = np.array(
        [[2.0**-config.bits] for config in made.table.configs], np.float32
    )  # no need to measure them here
    return replace(
        made, table=replace(made.table, values=np.broadcast_to(errors, made.table.values.shape))
    )


@pytest.fixture
def opened(chromium, tmp_path, state):
    """Opens the page of a state; lists requests other than the file itself, and page errors."""
    contexts = []

    def open_(shown=state, **options):
        file = tmp_path / "page.html"
        file.write_text(page_of(shown), encoding="utf-8")
        contexts.append(chromium.new_context(**options))
        page = contexts[-1].new_page()
        page.foreign, page.errors = [], []
        page.on("request", lambda r: page.foreign.append(r.url) if r.url != file.as_uri() else None)
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_selector(".qlab-bar", state="attached")
        return page

    yield open_
    for context in contexts:
        context.close()


TABLES = {
    "runs": runs,
    "estimates": lambda: qlab.estimate("demo", [None, QuantConfig()]),
    "preview of a fuse": lambda: qlab.Adapter(qlab.load("demo"), rank=1, num_layers=1).preview(),
    "judgement": judged,
}


@pytest.mark.parametrize("name", TABLES)
def test_a_wide_table_scrolls_within_itself_and_leaves_a_narrow_page_as_it_is(name, chromium):
    shown = TABLES[name]()
    page = chromium.new_page(viewport={"width": 320, "height": 700})
    page.set_content(
        f"<style>body {{ margin: 0 }} td, th {{ padding: 6px }}</style>{shown._repr_html_()}"
    )
    page.evaluate(
        "document.querySelectorAll('img').forEach(e => e.remove())"
    )  # JupyterLab makes them as narrow as the page
    widest = page.evaluate(
        "Math.max(...[...document.querySelectorAll('table')].map(e => e.offsetWidth))"
    )
    assert widest > 320  # else it proves nothing
    assert page.evaluate("document.documentElement.scrollWidth") == 320
    page.close()


def code_of(page) -> str:
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    return page.locator(".qlab-code pre").inner_text()


def test_sliders_move_the_bars_and_the_code_is_python_own(opened, state):
    page = opened()
    assert code_of(page) == state.code
    before = page.evaluate(HEIGHTS)
    page.locator(".qlab-bits").focus()
    page.keyboard.press("ArrowRight")
    own = {PATH: QuantConfig("affine", 8, 64)}
    assert code_of(page) == code_line(QuantPlan(QuantConfig("affine", 5, 64), own))
    assert sum(page.evaluate(HEIGHTS)) < sum(before)
    page.locator(".qlab-mode").select_option("mxfp4")
    assert code_of(page) == code_line(QuantPlan(QuantConfig("mxfp4"), own))
    assert page.foreign == [] and page.errors == []


def test_choosing_bits_for_a_layer_by_keyboard_keeps_the_focus(opened):
    page = opened()
    page.locator(".qlab-map").focus()
    page.keyboard.press("ArrowRight")
    button = page.locator(".qlab-choose button", has_text="3")
    button.focus()
    page.keyboard.press("Enter")
    assert "bits=3" in code_of(page)
    assert page.evaluate("document.activeElement.textContent") == "3"


@pytest.mark.parametrize("width", [480, 700, 1100])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_cut_off_at(width, scheme, opened):
    page = opened(viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.errors == []


def test_an_error_and_a_name_from_outside_are_shown_as_text(opened, state):
    evil = "</script><img src=x onerror=alert(1)>"
    page = opened(replace(state, spec=replace(state.spec, name=evil), error=evil))
    assert page.locator(".qlab-title strong").inner_text() == evil
    assert page.locator(".qlab-status.error").inner_text() == evil
    assert page.locator("img").count() == 0
