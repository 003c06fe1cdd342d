"""The quantizer panel in a real JupyterLab: what a user does first."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.ui.conftest import KERNEL, SHOTS, run_cell

EXPECT_TIMEOUT_MS = 20_000
OPEN = "import qlab\nmodel = qlab.load('demo')\nq = qlab.Quantizer(model, bits=4, group_size=64)\nq"


def heights(page) -> list[float]:
    return page.evaluate(
        "[...document.querySelectorAll('.qlab-bar')].map(r => +r.getAttribute('height'))"
    )


def wait_until_measured(page) -> None:
    page.wait_for_function("document.querySelectorAll('.qlab-bar').length > 50", timeout=60_000)
    page.wait_for_function(
        "!document.querySelector('.qlab-bar.wait') && document.querySelector('.qlab-actions progress').hidden",
        timeout=240_000,
    )


def test_slider_keys_override_and_theme(notebook):
    page = notebook(
        "panel",
        [
            OPEN,
            "q.bits, q.plan.overrides",
            "q.bits = 3",
            "print(q.bits, q.group_size, len(q.plan.overrides))",
        ],
    )
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    run_cell(page, 0)
    wait_until_measured(page)
    page.evaluate("document.querySelectorAll('.Toastify').forEach(toast => toast.remove())")
    page.wait_for_timeout(500)
    page.locator(".qlab").first.screenshot(path=SHOTS / "panel_light.png")
    before = heights(page)
    slider = page.locator(".qlab-bits").first
    box = slider.bounding_box()
    page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.99, box["y"] + box["height"] / 2, steps=8)
    page.mouse.up()
    expect(page.locator(".qlab-code pre").first).to_contain_text("bits=8")
    assert sum(heights(page)) < sum(before)
    slider.focus()
    cells = page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length")
    for key in ("ArrowLeft", "ArrowLeft", "b"):
        page.keyboard.press(key)
    expect(page.locator(".qlab-code pre").first).to_contain_text("bits=5")
    assert page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length") == cells
    page.locator(".qlab-map").first.click(position={"x": 150, "y": 25})
    page.locator(".qlab-choose button", has_text="8").first.click()
    expect(page.locator(".qlab-code pre").first).to_contain_text("q.set(")
    page.wait_for_timeout(500)
    run_cell(page, 3)
    page.wait_for_function(
        "[...document.querySelectorAll('.jp-OutputArea-output pre')].some(e => e.innerText.trim() === '5 64 1')"
    )
    run_cell(page, 2)
    page.wait_for_function("document.querySelector('.qlab-ticks .on').innerText === '3'")
    page.evaluate(
        "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    page.wait_for_timeout(1500)
    page.locator(".qlab").first.screenshot(path=SHOTS / "panel_dark.png")
    assert not page.locator(".qlab-stale").count()
    assert page.foreign == [] and page.errors == []


def test_ten_panels_a_rerun_cell_and_a_restarted_kernel(notebook):
    page = notebook("many", [OPEN, *["q"] * 9])
    for index in [*range(10), 0]:
        run_cell(page, index)
    page.wait_for_function("document.querySelectorAll('.qlab').length === 10", timeout=60_000)
    wait_until_measured(page)
    page.evaluate(f"{KERNEL}.restart()")
    page.wait_for_function(f"{KERNEL}.status === 'idle'", timeout=60_000)
    page.locator(".qlab-bits").first.focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector(".qlab-stale .qlab-stale-note", timeout=15_000)
    assert page.errors == []
