"""How quickly the panel answers, and how good its sampled numbers are, on SmolLM2-135M and on an 8B shape.

    python -m tests.bench.bench_panel

The 8B model does not exist: its layers' shapes are real, its sampled weights are drawn, so only times are told for it.
"""

from __future__ import annotations

import qlab  # noqa: F401, I001  OpenBLAS before mlx
import statistics
import tempfile
import time
from pathlib import Path

import mlx.core as mx
import numpy as np

from qlab.core.config.quant import QuantConfig
from qlab.runtime.job import Job
from qlab.runtime.job import mlx_call
from qlab.nn.linear import weight_of
from qlab.core.quantize.table import ErrorTable
from qlab.engine.quantize.table_filler import TableFiller
from qlab.engine.quantize.table_filler import all_configs
from qlab.engine.models.skeleton import describe
from qlab.engine.models.skeleton import skeleton
from qlab.engine.models.surgery import module_at
from qlab.lab.model import load
from qlab.views.shared.wire import CSS
from qlab.views.quantizer.widget import ESM
from tests.bench.degrid import degrid
from tests.models import smollm2
from tests.ui.conftest import FLAGS, browser_path

FIRST = QuantConfig("affine", 4, 64)
LLAMA_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
# whole: from the moment the browser got the key to the moment the frame that shows it was handed over, the wait for the
# next frame included; work: the part from the start of that frame (script, style, layout, paint)
WATCH = """() => { window.seen = [];
  document.addEventListener("input", (event) => requestAnimationFrame(() => { const start = performance.now(), c = new MessageChannel();
    c.port1.onmessage = () => { const end = performance.now(); seen.push([end - event.timeStamp, end - start]); };
    c.port2.postMessage(0); }), true);
  document.querySelector(".qlab-bits").focus(); }"""


def timed(events) -> tuple[float, float]:
    """Run a job; return seconds to its first event and to its end."""
    start, first = time.perf_counter(), []
    Job(
        events, on_event=lambda _: first.append(time.perf_counter()) if not first else None
    ).start().wait()
    return first[0] - start, time.perf_counter() - start


def accuracy(filler: TableFiller) -> None:
    """Compare every sampled error of every layer with the exact one."""
    sampled, n = filler.table.snapshot(), len(filler.table.layers)
    start = time.perf_counter()
    Job(lambda: exact_all(filler, n)).start().wait()
    seconds = time.perf_counter() - start
    relative, se = sampled.measure("relative_error"), sampled.measure("relative_error_se")
    exact, legal = filler.table.measure("relative_error"), sampled.legal & (se > 0)
    off = np.abs(relative / exact - 1)[sampled.legal]
    z = np.abs((relative - exact) / np.where(se > 0, se, 1))[legal]
    print(
        f"sampled against exact, {off.size} layer × scheme pairs: off by {np.median(off):.2%} (median), "
        f"{np.quantile(off, 0.95):.2%} (95th percentile), {off.max():.2%} (largest)"
    )
    print(f"  within 2 stated standard errors: {(z < 2).mean():.1%} (95.4 % if Gaussian)")
    print(f"  exact measurement of {len(filler.table.configs)} schemes: {seconds:.0f} s")


def exact_all(filler: TableFiller, n: int):
    for config in filler.table.configs:
        yield from filler.measure_exactly([config] * n)


def exact_speed(filler: TableFiller) -> None:
    """Exact measurement of one scheme against a copy of the same bytes."""
    nbytes = sum(layer.nbytes for layer in filler.table.layers)
    _, seconds = timed(lambda: filler.measure_exactly([FIRST] * len(filler.table.layers)))

    def copy() -> float:
        weights = [filler._weight_of(layer.path) for layer in filler.table.layers]
        start = time.perf_counter()
        mx.eval([w + mx.zeros((), w.dtype) for w in weights])
        return time.perf_counter() - start

    plain = min(mlx_call(copy) for _ in range(3))
    print(
        f"exact measurement, {FIRST.label}: {nbytes / seconds / 1e9:.2f} GB/s, {plain / seconds:.3f}× of a copy ({nbytes / plain / 1e9:.2f} GB/s)"
    )


def drawn_8b() -> tuple[TableFiller, object]:
    """A table over 8B's shapes, with weights drawn for a small part of each layer that stands for the whole."""
    spec = mlx_call(lambda: describe(skeleton(LLAMA_8B), "llama-8B"))
    noise = mlx_call(lambda: eval_(mx.random.normal((1 << 22,)).astype(mx.bfloat16) * 0.02))

    def weight(path: str):
        layer = spec[path]
        return mx.broadcast_to(noise[None, : layer.shape[-1]], layer.shape)

    return TableFiller(ErrorTable.empty(spec.layers, all_configs()), weight), spec


def eval_(a):
    mx.eval(a)
    return a


def paint(name: str, spec, filler: TableFiller) -> None:
    """Time from a slider's input event to the painted frame, in Chromium."""
    from playwright.sync_api import sync_playwright

    from qlab.core.machine import Machine
    from qlab.core.panels.quantizer import QuantizerState
    from qlab.core.config.quant import QuantPlan
    from qlab import registry
    from qlab.views.quantizer.static import page

    modes = tuple(
        (s.name, s.title, s.bits, s.group_sizes, s.default_bits, s.default_group_size)
        for s in registry.shelf("schemes").values()
    )
    state = QuantizerState(
        spec,
        filler.table,
        QuantPlan(FIRST),
        "rtn",
        (("rtn", ""),),
        modes,
        Machine("bench", 1 << 35, 1 << 34),
    )
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "panel.html"
        path.write_text(page(state))
        browser = playwright.chromium.launch(executable_path=browser_path(), args=FLAGS)
        tab = browser.new_page(viewport={"width": 1100, "height": 900})
        tab.goto(path.as_uri())
        tab.wait_for_selector(".qlab-bar")
        tab.wait_for_timeout(500)
        tab.evaluate(WATCH)
        for k in range(80):
            tab.keyboard.press("ArrowLeft" if k // 3 % 2 else "ArrowRight")
            tab.wait_for_timeout(25 + 7 * k % 13)
        seen = tab.evaluate("window.seen")
        browser.close()
    for what, times in zip(
        ("key → painted frame", "work within the frame"), zip(*seen, strict=True), strict=True
    ):
        times = sorted(times)
        p50, p95 = statistics.median(times), times[int(0.95 * len(times))]
        print(f"{what}, {name}, {len(spec.layers)} layers: p50 {p50:.1f} ms, p95 {p95:.1f} ms")


def main() -> None:
    """Print the figures."""
    print(
        f"panel: {(len(ESM.encode()) + len(CSS.encode())) / 1024:.1f} kB of script and style, {len(all_configs())} schemes"
    )
    model = load(smollm2())
    mlx_call(degrid, model.module)
    table = ErrorTable.empty(model.spec.layers, all_configs())
    filler = TableFiller(table, lambda path: weight_of(module_at(model.module, path)))
    first, whole = timed(lambda: filler.sample(FIRST))
    print(f"SmolLM2-135M: first bars {first:.2f} s, full grid {whole:.2f} s")
    paint("SmolLM2-135M", model.spec, filler)
    big, spec = drawn_8b()
    start = time.perf_counter()
    events = big.sample(FIRST)
    mlx_call(lambda: next(events))
    print(f"8B shape: first bars {time.perf_counter() - start:.2f} s")
    big.table.values[:] = np.where(
        big.table.legal, np.random.default_rng(0).lognormal(-4, 1, big.table.values.shape), np.nan
    )
    paint("8B", spec, big)
    exact_speed(filler)
    accuracy(filler)


if __name__ == "__main__":
    main()
