"""The trainer panel in a real JupyterLab, driven by a run that is only pretended."""

from __future__ import annotations

import statistics
from pathlib import Path

import pytest
from playwright.sync_api import expect

from qlab.views.trainer.static import page as page_of
from tests.ui.conftest import KERNEL, SHOTS, run_cell
from tests.views.runs import GENERATIONS, events, run_state

EXPECT_TIMEOUT_MS = 20_000
PRETEND = f"""
import sys, threading, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from qlab.core.train.events import SampleGeneration
from qlab.views.trainer.widget import TrainerPanel
from tests.views.runs import events, run_state, GENERATIONS

class Pretender:
    def __init__(self, steps=400, delay=0.05):
        self.all, self.iters, self.delay = events(steps), steps, delay
        self.n, self.status, self.ack, self.error, self.rate, self.generations, self.heard = 0, "idle", None, "", 2e-4, GENERATIONS[:1], []
        self.panel = TrainerPanel(self.state(), self.hear)
    def state(self):
        history = self.all[:self.n]
        return run_state(history, self.status, self.iters, error=self.error, learning_rate=self.rate, generations=self.generations, seconds_left=60.0)
    def show(self):
        self.panel.show(self.state(), self.ack)
    def hear(self, intent):
        self.ack, self.error = intent["seq"], ""
        self.heard.append(intent["op"])
        if intent["op"] == "learning_rate":
            if intent["value"] > 1:
                raise ValueError("learning_rate=5 is above 1; write 1 or less.")
            self.rate = intent["value"]
        elif intent["op"] == "generate":
            self.generations += (SampleGeneration(self.n, intent["prompt"], "an answer to " + intent["prompt"]),)
        elif intent["op"] in ("start", "pause", "resume", "stop"):
            self.status = {{"start": "running", "pause": "paused", "resume": "running", "stop": "stopped"}}[intent["op"]]
            if intent["op"] == "start":
                threading.Thread(target=self.train, daemon=True).start()
        self.show()
    def train(self):
        while self.status in ("running", "paused") and self.n < len(self.all):
            time.sleep(self.delay)
            self.n += self.status == "running"
            self.show()
        if self.status == "running":
            self.status = "done"
            self.show()

t = Pretender()
t.panel.widget
"""
POINTS = "document.querySelector('.qlab-dots').getAttribute('d').split('M').length"
WORD = ".qlab-word"


def settle(page) -> None:
    page.evaluate("document.querySelectorAll('.Toastify').forEach(toast => toast.remove())")
    page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_start_steer_pause_reload_stop_and_a_kernel_that_is_gone(notebook):
    page = notebook(
        "train",
        [PRETEND, "import time\nfor _ in range(30): time.sleep(0.1)", "print(t.heard, t.rate)"],
    )
    page.evaluate("window.jupyterapp.commands.execute('application:toggle-left-area')")
    run_cell(page, 0)
    expect(page.locator(WORD)).to_have_text("○ ready", timeout=60_000)
    settle(page)
    page.locator(".qlab").screenshot(path=SHOTS / "trainer_idle.png")
    page.get_by_role("button", name="▶ start").click()
    page.wait_for_function(f"{POINTS} > 20")
    run_cell(page, 1, wait=False)  # the buttons answer while a cell runs

    cells = page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length")
    page.locator(".qlab-rate").fill("1e-4b")
    page.keyboard.press("Enter")
    expect(page.locator(".qlab-pending")).to_contain_text("must be a number above 0")
    page.locator(".qlab-rate").fill("5")
    page.keyboard.press("Enter")
    expect(page.locator(".qlab-status.error")).to_contain_text("above 1")
    page.locator(".qlab-rate").fill("1e-4")
    page.keyboard.press("Enter")
    expect(page.locator(".qlab-pending")).to_have_text("✓ applied")
    page.locator(".qlab-prompt").fill("why?")
    page.keyboard.press("Enter")
    expect(page.locator(".qlab-generations")).to_contain_text("an answer to why?")
    expect(page.get_by_role("button", name="generate")).to_be_enabled()
    assert page.evaluate("window.jupyterapp.shell.currentWidget.content.widgets.length") == cells

    page.wait_for_function(f"{POINTS} > 110", timeout=60_000)
    page.get_by_role("button", name="‖ pause").click()
    expect(page.locator(WORD)).to_have_text("‖ paused")
    settle(page)
    before = page.evaluate(POINTS)
    box = page.locator(".qlab-plot").bounding_box()
    page.mouse.move(box["x"] + 200, box["y"] + 100)
    expect(page.locator(".qlab-say.step")).not_to_contain_text("now")
    page.locator(".qlab").screenshot(path=SHOTS / "trainer_light.png")
    page.locator(".qlab-plot").focus()
    page.keyboard.press("Home")
    expect(page.locator(".qlab-say.step")).to_have_text("step 0")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".qlab-say.step")).to_have_text("step 1")
    page.evaluate(
        "window.jupyterapp.commands.execute('apputils:change-theme', {theme: 'JupyterLab Dark'})"
    )
    page.wait_for_timeout(1000)
    page.locator(".qlab").screenshot(path=SHOTS / "trainer_dark.png")

    page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")
    page.wait_for_timeout(1000)
    page.goto(page.url.split("?")[0] + "?token=tok")
    page.wait_for_selector(".qlab-dots", state="attached", timeout=90_000)
    page.wait_for_function(
        f"{POINTS} >= {before}", timeout=60_000
    )  # the whole history is there again
    page.get_by_role("button", name="▶ resume").click()
    page.wait_for_function(f"{POINTS} > {before} + 10")
    page.get_by_role("button", name="■ stop").click()
    expect(page.locator(WORD)).to_have_text("■ stopped")
    expect(page.locator(".qlab-summary")).to_contain_text("peak memory")
    assert page.locator(".qlab").bounding_box()["height"] <= 640
    settle(page)
    page.locator(".qlab").screenshot(path=SHOTS / "trainer_stopped.png")
    assert not page.locator(".qlab-stale").count()
    assert page.foreign == [] and page.errors == []

    page.evaluate(f"{KERNEL}.restart()")
    page.wait_for_function(f"{KERNEL}.status === 'idle'", timeout=60_000)
    page.get_by_role("button", name="▶ go on").click()
    page.wait_for_selector(".qlab-stale .qlab-stale-note", timeout=15_000)
    assert "Kernel not connected" in page.locator(".qlab-stale-note").inner_text()
    assert [
        error for error in page.errors if "Canceled future" not in error
    ] == []  # what JupyterLab itself had asked


# --- the self-contained page: every state, narrow and wide ----------------------------------------------------------

STATES = {
    "idle": run_state(status="idle"),
    "running": run_state(events(120), generations=GENERATIONS),
    "no_validation": run_state(events(60, every=None), limit_nbytes=0),
    "long": run_state(events(10_000, every=100), iters=10_000),
    "failed": run_state(
        events(77, skipped=(40, 41)),
        "failed",
        error="The gradient of model.layers.3.self_attn.q_proj was no number at step 78.",
    ),
    "done": run_state(events(400), "done", generations=GENERATIONS),
}


@pytest.fixture
def opened(chromium, tmp_path):
    contexts = []

    def open_(state, width=700, scheme="light"):
        file = tmp_path / "page.html"
        file.write_text(page_of(state), encoding="utf-8")
        contexts.append(
            chromium.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
        )
        page = contexts[-1].new_page()
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(file.as_uri())
        page.wait_for_selector(".qlab-word")
        settle(page)
        return page

    yield open_
    for context in contexts:
        context.close()


@pytest.mark.parametrize("name", STATES)
def test_every_state_fits_on_a_laptop_at_700_pixels(name, opened):
    for scheme in ("light", "dark"):
        page = opened(STATES[name], scheme=scheme)
        page.screenshot(path=SHOTS / f"trainer_{name}_{scheme}_700.png")
        assert page.evaluate("document.documentElement.scrollWidth") <= 700
        assert page.evaluate("document.querySelector('.qlab').offsetHeight") <= 640
        cut = "[...document.querySelectorAll('.qlab-plot text')].filter(t => t.getBoundingClientRect().right > innerWidth || t.getBoundingClientRect().left < 0).map(t => t.textContent)"
        assert page.evaluate(cut) == [] and page.errors == []


def test_pointing_at_a_step_tells_its_numbers_and_marks(opened):
    page = opened(STATES["done"])
    box = page.locator(".qlab-plot").bounding_box()
    left, right = box["x"] + 92, box["x"] + box["width"] - 126
    page.mouse.move(left + (right - left) * 100 / 400, box["y"] + 250)
    expect(page.locator(".qlab-say.step")).to_have_text("step 100")
    event = events(400)[100]
    expect(page.locator(".qlab-say.loss")).to_have_text(f"● {event.loss:.2f} this step")
    expect(page.locator(".qlab-say.val")).to_have_text(f"◆ {event.val_loss:.2f} val")
    expect(page.locator(".qlab-readout")).to_contain_text("saved step 100")


def test_ten_thousand_steps_are_repainted_within_a_few_frames(chromium, tmp_path):
    text = page_of(STATES["long"])
    hooked = text.replace("const get = (k) => ", "const get = (k) => window.sent?.[k] ?? ").replace(
        "on() {}", "on(name, f) { (window.told ??= {})[name] = f; }"
    )
    assert "window.sent" in hooked and "window.told" in hooked
    (tmp_path / "page.html").write_text(hooked, encoding="utf-8")
    context = chromium.new_context(viewport={"width": 1000, "height": 800})
    page = context.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector(".qlab-word")
    settle(page)
    # every message changes every loss, so that every path is drawn anew; until the frame that shows it is handed over
    times = page.evaluate("""async () => {
      const times = [], sent = JSON.parse(document.getElementById("traits").textContent), text = atob(sent.curve.base64) + atob(sent.newest.base64);
      const rows = new Float32Array(Uint8Array.from(text, (c) => c.charCodeAt(0)).buffer);
      for (let n = 0; n < 20; n++) {
        for (let i = 0; i < rows.length; i++) if (i % 10) rows[i] *= 1 + 0.002 * Math.sin(n + i);
        window.sent = { curve: new DataView(rows.slice().buffer), newest: new DataView(new ArrayBuffer(0)) };
        const before = document.querySelector(".qlab-dots").getAttribute("d"), start = performance.now();
        told["change:curve"]();
        await new Promise((done) => requestAnimationFrame((frame) => { const c = new MessageChannel(); c.port1.onmessage = () => { times.push(performance.now() - frame); done(); }; c.port2.postMessage(0); }));
        if (document.querySelector(".qlab-dots").getAttribute("d") === before) throw Error("nothing was drawn");
      }
      return times; }""")
    context.close()
    print(
        f"repaint of 10 000 steps: {statistics.median(times):.1f} ms (median), {max(times):.1f} ms (largest)"
    )
    assert statistics.median(times) < 250  # 12 to 50 ms on two shared cores that draw without a GPU
