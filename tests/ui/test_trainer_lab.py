"""The trainer in a real JupyterLab: start, watch, pause, change the rate, move other sliders, stop."""

from __future__ import annotations

from playwright.sync_api import expect

from tests.ui.conftest import KERNEL, SHOTS, run_cell

EXPECT_TIMEOUT_MS = 60_000
OPEN = """
import pydoc_data.topics as manual, qlab
q = qlab.Quantizer(qlab.load("demo"), bits=4)
a = qlab.Adapter(q, rank=4)
rows = [{"text": text[:400]} for text in list(manual.topics.values())[:24]]
t = qlab.Trainer(a, rows, qlab.TrainConfig(iters=2000, batch_size=2, max_seq_length=48, learning_rate=1e-3, steps_per_eval=5))
t
"""
SAYS = "text => [...document.querySelectorAll('.jp-OutputArea-output pre')].some(e => e.innerText.includes(text))"


def test_a_run_is_started_watched_steered_and_stopped_while_the_kernel_stays_free(notebook):
    page = notebook(
        "train",
        [OPEN, "q.bits = 3\nprint('moved', q.bits, t.status)", "print('end', t.status, a.trained)"],
    )
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    run_cell(page, 0)
    panel = page.locator(".qlab").first
    page.wait_for_selector(".qlab-word", timeout=90_000)
    panel.locator("button", has_text="start").first.click()
    page.wait_for_function(
        "+(document.querySelector('.qlab')?.innerText.match(/step\\s+(\\d+)/)?.[1] ?? 0) > 6",
        timeout=120_000,
    )
    run_cell(page, 1)  # another cell runs meanwhile, and another panel's sliders move
    page.wait_for_function(SAYS, arg="moved 3 running", timeout=60_000)
    rate = panel.locator("input[type=number], input[inputmode=decimal], input.qlab-rate").first
    rate.fill("0.0005")
    rate.press("Enter")
    panel.screenshot(path=SHOTS / "trainer_real_running.png")
    panel.locator("button", has_text="pause").first.click()
    expect(page.locator(".qlab-word").first).to_contain_text("paused")
    panel.locator("button", has_text="resume").first.click()
    expect(page.locator(".qlab-word").first).to_contain_text("training")
    panel.locator("button", has_text="stop").first.click()
    expect(page.locator(".qlab-word").first).to_contain_text("stopped")
    run_cell(page, 2)
    page.wait_for_function(SAYS, arg="end stopped True", timeout=60_000)
    page.wait_for_timeout(500)
    panel.screenshot(path=SHOTS / "trainer_real_stopped.png")
    assert page.foreign == [] and page.errors == []
    page.evaluate(f"{KERNEL}.shutdown()")
