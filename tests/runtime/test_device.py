"""The doctor and the machine's memory."""

from __future__ import annotations

import qlab
from qlab.runtime import device
from qlab.runtime.blas import BlasStatus
from qlab.runtime.job import mlx_call


def test_memory_is_positive_and_free_is_part_of_total():
    place = mlx_call(device.machine)
    assert 0 < place.free_nbytes <= place.total_nbytes
    assert "GB" in place.label


def test_doctor_states_versions_back_end_and_speed():
    report = qlab.doctor()
    facts = dict(report.facts)
    assert facts["mlx"] != "missing" and facts["back end"] in ("cpu", "metal", "cuda")
    assert "GFLOP/s" in facts["matmul"] and "GFLOP/s" in repr(report)
    assert "<table>" in report._repr_html_()


def test_doctor_says_why_products_are_slow_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(device, "backend", lambda: "cpu")
    monkeypatch.setattr(device.sys, "platform", "linux")
    monkeypatch.setattr(device, "_gflops", lambda: 1.4)
    monkeypatch.setattr(
        device.blas, "status", lambda: BlasStatus(None, "too late: import qlab first")
    )
    monkeypatch.setattr(
        device, "_version", lambda package: "missing" if package == "anywidget" else "1.0"
    )
    monkeypatch.setattr(device, "ram", lambda: (8 * 10**9, 10**9))
    told = "\n".join(qlab.doctor().findings)
    assert "import qlab first" in told and "pip install anywidget" in told and "1.0 GB" in told
