"""A report of an adapter as a notebook shows it."""

from __future__ import annotations

import qlab


def test_a_report_shows_the_adapter_and_its_layers(demo):
    adapter = qlab.Adapter(demo, rank=4, keys=["q_proj"])
    report = adapter.report
    adapter.close()
    text = report._repr_html_()
    assert f"<b>{report.size:,}</b> trainable parameters" in text
    assert "nothing measured yet" in text and "–" in text
    assert report.layers[0].path in text and "trainable parameters" in repr(report)
