"""The estimate panel in a real JupyterLab: bars that move without the kernel, verdicts, the trace, the quantizer beside it."""

from __future__ import annotations

from playwright.sync_api import expect

import qlab
from qlab.views.estimate.static import page as page_of
from tests.ui.conftest import KERNEL, SHOTS, run_cell

EXPECT_TIMEOUT_MS = 120_000
CLEAN = "import os, tempfile\nos.environ['XDG_CACHE_HOME'] = tempfile.mkdtemp()\n"  # bands as where nothing was measured yet
OPEN = CLEAN + "import qlab\nmodel = qlab.load('demo')\nq = qlab.Quantizer(model)\nq.close()\n"
OPEN += "est = qlab.estimate(q, train=qlab.TrainConfig(max_seq_length=128))\nest"
LLAMA = f"""{CLEAN}import qlab
config = dict(model_type="llama", hidden_size=8192, num_hidden_layers=80, intermediate_size=28672, num_attention_heads=64,
    num_key_value_heads=8, rms_norm_eps=1e-5, vocab_size=32000, tie_word_embeddings=False, max_position_embeddings=4096,
    torch_dtype="bfloat16", rope_theta=1e4, _name_or_path="Llama-2-70B")
qlab.estimate(config, qlab.QuantConfig("nf4_dq"), machine="64 GB Mac", train=qlab.TrainConfig(batch_size=2, max_seq_length=2048, grad_checkpoint=True))"""
WIDTHS = "[...document.querySelectorAll('.qlab-stack > .qlab-part')].map(e => e.style.width)"


def size(page) -> str:
    return page.locator(".qlab-estimate .qlab-size b").first.inner_text()


def ready(page, name: str, cells: list[str], **options):
    opened = page(name, cells, **options)
    opened.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    run_cell(opened, 0)
    expect(opened.locator(".qlab-stack > .qlab-part")).to_have_count(8)
    opened.evaluate("document.querySelectorAll('.Toastify').forEach(toast => toast.remove())")
    return opened


def settled(page) -> None:
    page.wait_for_function(
        "document.querySelector('.qlab-estimate .qlab-actions progress').hidden", timeout=240_000
    )


def test_trace_follows_sliders_need_no_kernel_and_budgets_judge(notebook):
    page = ready(
        notebook, "estimate", [OPEN, "est.panel.setup.train.batch_size, q.bits", "q.bits = 3"]
    )
    expect(page.locator(".qlab-level")).to_have_text("traced")
    page.locator(".qlab-estimate").screenshot(path=SHOTS / "estimate_light.png")

    # the quantizer follows the panel, and the panel the quantizer
    page.locator(".qlab-estimate .qlab-bits").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".qlab-code pre")).to_contain_text("bits=5")
    page.wait_for_timeout(400)
    run_cell(page, 1)
    page.wait_for_function(
        "[...document.querySelectorAll('.jp-OutputArea-output pre')].some(e => e.innerText.trim() === '(4, 5)')"
    )
    run_cell(page, 2)
    expect(page.locator(".qlab-code pre")).to_contain_text("bits=3")

    assert page.locator(".qlab-fits.yes").count() == 1
    page.locator(".qlab-budget").select_option("")
    page.locator(".qlab-other").fill("60 MB")
    page.keyboard.press("Enter")
    expect(page.locator(".qlab-fits")).to_have_class("qlab-fits no")
    expect(page.locator(".qlab-change").first).to_be_visible()
    page.locator(".qlab-estimate").screenshot(path=SHOTS / "estimate_no_fit.png")
    setting = page.locator(".qlab-change").first.inner_text().split()[0]
    page.locator(".qlab-change").first.click()
    expect(page.locator(".qlab-code pre")).to_contain_text(setting)
    page.locator(".qlab-budget").select_option("")
    page.locator(".qlab-other").fill("a large one")
    page.keyboard.press("Enter")
    expect(page.locator(".qlab-status.error")).to_contain_text("is not legal")
    page.locator(".qlab-estimate").screenshot(path=SHOTS / "estimate_error.png")

    # a real step
    page.locator(".qlab-probe").click()
    expect(page.locator(".qlab-level")).to_have_text("measured")
    page.evaluate(
        "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    page.wait_for_timeout(1500)
    page.locator(".qlab-estimate").screenshot(path=SHOTS / "estimate_dark.png")
    assert not page.locator(".qlab-stale").count()

    # a slider moves the bar even when the kernel is gone, and the panel says that it is
    settled(page)
    page.evaluate(f"{KERNEL}.shutdown()")
    before, widths = size(page), page.evaluate(WIDTHS)
    page.locator(".qlab-rank").focus()
    page.keyboard.press("ArrowRight")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert size(page) != before and page.evaluate(WIDTHS) != widths
    page.wait_for_selector(".qlab-stale .qlab-stale-note", timeout=15_000)
    assert page.foreign == [] and page.errors == []


def test_a_page_without_a_kernel_moves_and_says_what_it_does_not_know(chromium, tmp_path):
    file = tmp_path / "page.html"
    file.write_text(
        page_of(qlab.estimate("demo", qlab.QuantConfig()).panel.state()), encoding="utf-8"
    )
    context = chromium.new_context(viewport={"width": 700, "height": 800}, color_scheme="dark")
    page, errors = context.new_page(), []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri())
    before = size(page)
    page.locator(".qlab-rank").focus()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".qlab-code pre")).to_contain_text("rank=16, scale=1.0")
    assert size(page) != before and page.locator(".qlab-level").inner_text() == "formula"
    page.locator(".qlab-checkpoint").check()
    expect(page.locator(".qlab-status")).to_contain_text("open it in a notebook")
    assert page.evaluate("document.documentElement.scrollWidth") <= 700
    page.screenshot(path=SHOTS / "estimate_page.png")
    assert errors == []
    context.close()


def test_a_large_model_on_a_narrow_page(notebook):
    page = ready(notebook, "large", [LLAMA], width=900)
    expect(page.locator(".qlab-fits")).to_contain_text("64 GB Mac")
    expect(page.locator(".qlab-level")).to_have_text("traced", timeout=120_000)
    page.locator(".qlab-estimate").screenshot(path=SHOTS / "estimate_70b.png")
    page.evaluate("document.querySelector('.qlab-estimate').style.width = '660px'")
    page.wait_for_timeout(300)
    page.locator(".qlab-estimate").screenshot(path=SHOTS / "estimate_narrow.png")
    assert page.evaluate("document.querySelector('.qlab-estimate').scrollWidth") <= 700
    assert page.errors == []
