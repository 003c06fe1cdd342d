"""What the live panel costs: tokens/s of a run with and without it, in a real kernel and in JupyterLab.

    python -m tests.bench.bench_live [pairs]

Within one run the panel is told for twenty steps and not told for twenty, in turns, so that what else the machine does meets
both; a pair's ratio is that of the steps with it to those before and after. Steps of the demo model are far shorter than those
of any model worth training, so that the panel draws as often as it ever does. In JupyterLab the browser, which draws without a
GPU here, works on the same cores as the training. Told besides: the time of a tick on the thread that trains.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path

from qlab.engine.train.session import _TICK_S
from tests.ui.conftest import FLAGS, browser_path, opened, run_cell, served

PAIRS = 30
WORD = "measured:"
MEASURE = """
import sys
sys.path.insert(0, ROOT)
import json, tempfile, time
import qlab
from IPython.display import display
rows = [{"text": f"Row {n}: the tall house of the kind man was very odd, and nobody knew. " * 3} for n in range(64)]
q = qlab.Quantizer(qlab.load("demo"), bits=4)
q.measure(exact=False)
base = q.quantize()
q.close()
times, held, on = [], [], False

def note(event):
    global on
    times.append((time.perf_counter(), event.tokens))
    on = event.step // BLOCK % 2 == 1

def show():
    if on:
        start = time.thread_time()
        t._show()
        held.append(time.thread_time() - start)

with tempfile.TemporaryDirectory() as folder:
    config = qlab.TrainConfig(iters=BLOCK * (2 * PAIRS + 3), batch_size=2, max_seq_length=48)
    t = qlab.Trainer(qlab.Adapter(base, rank=8), rows, config, val=0, path=folder, callbacks=[note])
    t._training.session._on_change = show
    display(t)
    t.run()
    t.close()
ends = range(BLOCK - 1, len(times), BLOCK)  # the first block compiles
speed = [sum(tokens for _, tokens in times[a + 1 : b + 1]) / (times[b][0] - times[a][0]) for a, b in zip(ends, ends[1:])]
print(WORD, json.dumps([speed, held]))
"""


def in_kernel(code: str) -> list[list[float]]:
    """Speeds of all blocks and times of all ticks, in a kernel whose messages nobody draws."""
    from jupyter_client.manager import start_new_kernel

    found: list[str] = []
    manager, client = start_new_kernel(kernel_name="python3")
    try:
        reply = client.execute_interactive(
            code, timeout=1800, output_hook=lambda m: found.append(m["content"].get("text", ""))
        )
        assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
    return json.loads("".join(found).split(WORD)[1])


def in_lab(code: str) -> list[list[float]]:
    """The same in JupyterLab in a headless Chromium."""
    from playwright.sync_api import sync_playwright

    with (
        tempfile.TemporaryDirectory() as folder,
        served(Path(folder)) as url,
        sync_playwright() as playwright,
    ):
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        context = browser.new_context(viewport={"width": 1100, "height": 950})
        page = opened(context, Path(folder), url, "live", [code])
        run_cell(page, 0)
        texts = page.locator(".jp-OutputArea-output pre").all_inner_texts()
        browser.close()
    return json.loads("".join(texts).split(WORD)[1])


def told(where: str, speed: list[float], held: list[float]) -> None:
    """Print the ratio, how sure it is, and the same for what is no panel."""
    off = speed[1::2]  # the first of all is one with the panel, and has none before it
    with_it = [2 * speed[i] / (speed[i - 1] + speed[i + 1]) for i in range(2, len(speed) - 1, 2)]
    without = [2 * off[i] / (off[i - 1] + off[i + 1]) for i in range(1, len(off) - 1, 2)]
    (ratio, error), (same, doubt) = map(_median, (with_it, without))
    tick = statistics.median(held)
    print(
        f"{where}: {ratio:.3f} ± {error:.3f}× with the panel ({len(with_it)} pairs); without it against itself {same:.3f} ± "
        f"{doubt:.3f}×; {statistics.median(off):.0f} tokens/s; a tick {1e3 * tick:.2f} ms, {tick / _TICK_S:.2%} of the time at most"
    )


def _median(values: list[float]) -> tuple[float, float]:
    """Median and its standard error, from the quartiles."""
    low, mid, high = statistics.quantiles(values, n=4)
    return mid, 1.2533 * (high - low) / 1.349 / math.sqrt(len(values))


def main() -> None:
    """Print the figures."""
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else PAIRS
    print(f"load before: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    settings = {"ROOT": str(Path(__file__).parents[2]), "BLOCK": 20, "PAIRS": pairs, "WORD": WORD}
    code = "\n".join(f"{name} = {value!r}" for name, value in settings.items()) + MEASURE
    told("kernel", *in_kernel(code))
    if browser_path() is None:
        print("Chromium is missing: JupyterLab was not measured")
    else:
        told("JupyterLab", *in_lab(code))


if __name__ == "__main__":
    main()
