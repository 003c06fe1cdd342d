"""A panel that two threads show states on never loses one."""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np

import qlab
from qlab.core.progress import Progress
from qlab.views.quantizer.widget import QuantizerPanel


def test_last_state_of_a_job_reaches_the_browser_whole(demo, monkeypatch):
    q = qlab.Quantizer(demo)
    _ = q.report
    state = q.state()
    q.close()
    empty = replace(
        state,
        table=replace(state.table, values=np.full_like(state.table.values, np.nan)),
        progress=Progress("x", 1, 2),
    )
    panel = QuantizerPanel(empty, lambda intent: None)
    sent: dict = {}
    monkeypatch.setattr(
        panel.widget,
        "send_state",
        lambda key=None: sent.update(dict.fromkeys([key] if isinstance(key, str) else key or [])),
    )
    threads = [
        threading.Thread(target=lambda: [panel.show(empty) for _ in range(50)]) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent.clear()
    panel.show(replace(state, progress=None))
    assert {"values", "sizes", "flags", "kurtosis", "state"} <= set(sent)
    assert np.array_equal(
        np.frombuffer(panel.widget.values, "<f4"), state.table.values.ravel(), equal_nan=True
    )
    panel.close()
