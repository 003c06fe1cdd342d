"""What the live panel costs: tokens/s of the same run with and without it, in turns, in a real kernel and in JupyterLab.

    python -m tests.bench.bench_live [rounds]

A round is a run without, one with, and one without; its ratio is that of the run with to the mean of the other two, and these
two say how much of it is noise. On a busy machine that is more than the panel costs; the time that a tick takes on the thread
that trains is told besides. Steps of the demo model are far shorter than those of any model worth training, so that the
panel draws as often as it ever does, between steps that it could delay. In JupyterLab the browser, which draws
without a GPU here, works on the same cores as the training.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

from qlab.engine.session import _TICK_S
from tests.ui.conftest import FLAGS, browser_path, opened, run_cell, served

ROUNDS = 8
Rounds = list[list[list[float]]]  # of each round without, with and without: tokens/s, ms a tick
WORD = "tokens per second:"
SETUP = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import json, tempfile, time
import qlab
from IPython.display import display
rows = [{{"text": f"Row {{n}}: the tall house of the kind man was very odd, and nobody knew. " * 3}} for n in range(64)]
q = qlab.Quantizer(qlab.load("demo"), bits=4)
base = q.quantize()
q.close()
config = qlab.TrainConfig(iters=120, batch_size=2, max_seq_length=48, steps_per_eval=40)

def measured(shown):
    times, held = [], []

    def show(work=lambda: t._show()):  # what a tick keeps the MLX thread from, however busy the machine is otherwise
        start = time.thread_time()
        work()
        held.append(time.thread_time() - start)

    note = lambda event: times.append((time.perf_counter(), event.tokens))
    with tempfile.TemporaryDirectory() as folder:
        t = qlab.Trainer(qlab.Adapter(base, rank=8), rows, config, val=4, path=folder, callbacks=[note])
        t._session._on_change = show
        if shown:
            display(t)
        t.run()
        t.close()
    kept = times[20:]  # the first steps compile
    return sum(tokens for _, tokens in kept[1:]) / (kept[-1][0] - kept[0][0]), 1e3 * sum(held) / len(held)

measured(False)
"""
ROUND = f"print({WORD!r}, json.dumps([measured(shown) for shown in (False, True, False)]))"


def in_kernel(rounds: int) -> Rounds:
    """Figures of every round in a kernel whose messages nobody draws."""
    from jupyter_client.manager import start_new_kernel

    found: Rounds = []

    def hear(message: dict) -> None:
        text = message["content"].get("text", "") if message["msg_type"] == "stream" else ""
        if text.startswith(WORD):
            found.append(json.loads(text.removeprefix(WORD)))

    manager, client = start_new_kernel(kernel_name="python3")
    try:
        for code in (SETUP, *[ROUND] * rounds):
            reply = client.execute_interactive(code, timeout=600, output_hook=hear)
            assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return found


def in_lab(rounds: int) -> Rounds:
    """Figures of every round in JupyterLab in a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, served(Path(folder)) as url, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        context = browser.new_context(viewport={"width": 1100, "height": 950})
        page = opened(context, Path(folder), url, "live", [SETUP, *[ROUND] * rounds])
        for index in range(rounds + 1):
            run_cell(page, index)
        texts = page.locator(".jp-OutputArea-output pre").all_inner_texts()
        browser.close()
    return [json.loads(text.removeprefix(WORD)) for text in map(str.strip, texts) if text.startswith(WORD)]


def told(where: str, rounds: Rounds) -> None:
    """Print the ratio and what of it is noise."""
    speeds = [[speed for speed, _ in found] for found in rounds]
    ratios = sorted(shown / statistics.mean((before, after)) for before, shown, after in speeds)
    noise = sorted(after / before for before, _, after in speeds)
    ticks = [statistics.median(found[k][1] for found in rounds) for k in (0, 1)]
    low, mid, high = statistics.quantiles(ratios, n=4)
    print(
        f"{where}: {mid:.3f}× with the panel (quartiles {low:.3f} to {high:.3f}, {len(rounds)} rounds); without, against "
        f"itself: {statistics.median(noise):.3f}× ({noise[0]:.3f} to {noise[-1]:.3f}); "
        f"{statistics.median(x[0] for x in speeds):.0f} tokens/s; a tick {ticks[1]:.2f} ms, {ticks[0]:.2f} ms without a panel, "
        f"so {(ticks[1] - ticks[0]) / 1e3 / _TICK_S:.2%} of the time at the most"
    )


def main() -> None:
    """Print the figures."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else ROUNDS
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    told("kernel", in_kernel(rounds))
    if browser_path() is None:
        print("Chromium is missing: JupyterLab was not measured")
    else:
        told("JupyterLab", in_lab(rounds))


if __name__ == "__main__":
    main()
