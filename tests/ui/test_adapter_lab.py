"""The adapter panel in a real JupyterLab: rank without the kernel, targets by click, a quantizer that leads."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.ui.conftest import SHOTS, run_cell

EXPECT_TIMEOUT_MS = 20_000
OPEN = "import qlab\nmodel = qlab.load('demo')\nq = qlab.Quantizer(model, bits=4, group_size=64)\na = qlab.Adapter(q, rank=8)\na"


def wait_until_measured(page) -> None:
    page.wait_for_selector(".qlab-adapter .qlab-line", timeout=120_000)
    page.wait_for_function(
        "document.querySelector('.qlab-adapter .qlab-actions progress').hidden"
        " && document.querySelector('.qlab-words').innerText.includes('qera')",
        timeout=240_000,
    )


def heights(page) -> float:
    return page.evaluate(
        "[...document.querySelectorAll('.qlab-adapter .qlab-bar')].reduce((s, r) => s + (+r.getAttribute('height')), 0)"
    )


def shot(page, name: str) -> None:
    page.evaluate("document.querySelectorAll('.Toastify').forEach(toast => toast.remove())")
    page.wait_for_timeout(400)
    page.locator(".qlab-adapter").first.screenshot(path=SHOTS / f"{name}.png")


def printed(page, text: str) -> None:
    page.wait_for_function(
        "t => [...document.querySelectorAll('.jp-OutputArea-output pre')].some(e => e.innerText.trim() === t)",
        arg=text,
    )


def test_rank_targets_start_quantizer_and_a_narrow_page(notebook):
    page = notebook(
        "adapter",
        [
            OPEN,
            "print(a.rank, a.keys)",
            "a.rank = 4",
            "q.bits = 2",
            "a.init = 'qera'\nprint(len(a.parameters), a.init)",
            "a.set_parameters(a.parameters, 'test')\na.rank = 32",
        ],
    )
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    run_cell(page, 0)
    wait_until_measured(page)
    shot(page, "adapter_light")
    page.set_viewport_size({"width": 760, "height": 950})
    shot(page, "adapter_narrow")
    assert page.evaluate(
        "(e => e.scrollWidth <= e.clientWidth + 1 && e.clientWidth < 700)(document.querySelector('.qlab-adapter'))"
    )
    page.set_viewport_size({"width": 1100, "height": 950})
    code = page.locator(".qlab-adapter .qlab-code pre").first
    before = heights(page)
    slider = page.locator(".qlab-adapter .qlab-rank").first
    slider.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(code).to_have_text("a = qlab.Adapter(q, rank=32)")
    page.wait_for_timeout(100)
    assert heights(page) > before
    page.locator(".qlab-adapter .qlab-role", has_text="gate_proj").first.click()
    expect(code).to_contain_text(
        'keys=["q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "up_proj"]'
    )
    page.wait_for_timeout(500)
    run_cell(page, 1)
    printed(page, "32 ('q_proj', 'k_proj', 'v_proj', 'o_proj', 'down_proj', 'up_proj')")
    run_cell(page, 2)
    expect(code).to_contain_text("rank=4")
    page.locator(".qlab-adapter .qlab-rank-entry").fill("100000")
    page.keyboard.press("Enter")
    expect(page.locator(".qlab-adapter .qlab-status.error")).to_contain_text("is above the width")
    shot(page, "adapter_error")
    run_cell(page, 2)
    expect(code).to_contain_text("rank=4")
    run_cell(page, 3)
    expect(page.locator(".qlab-adapter .qlab-title")).to_contain_text("2-bit")
    page.wait_for_function(
        "!document.querySelector('.qlab-adapter .qlab-old') && document.querySelector('.qlab-adapter .qlab-actions progress').hidden",
        timeout=240_000,
    )
    page.evaluate(
        "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    page.wait_for_timeout(1500)
    shot(page, "adapter_dark")
    run_cell(page, 4)
    printed(page, "96 qera")
    expect(code).to_contain_text('init="qera"')
    assert not page.locator(".qlab-stale").count()
    assert page.foreign == [] and page.errors == []
