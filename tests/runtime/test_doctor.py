"""The doctor says what is there, and what is wrong with what to do about it."""

from __future__ import annotations

import pytest

import qlab
from qlab.core.machine import Machine
from qlab.runtime import doctor as doctors
from qlab.runtime.blas import BlasStatus


def test_doctor_states_versions_back_end_and_speed():
    report = qlab.doctor()
    facts = dict(report.facts)
    assert facts["mlx"] != "missing" and facts["back end"] in ("cpu", "metal", "cuda")
    assert "GFLOP/s" in facts["matmul"] and "GFLOP/s" in repr(report)
    assert "<table>" in report._repr_html_()


def test_doctor_says_why_products_are_slow_and_what_is_missing(monkeypatch):
    monkeypatch.setattr(doctors, "backend", lambda: "cpu")
    monkeypatch.setattr(doctors.sys, "platform", "linux")
    monkeypatch.setattr(doctors, "_gflops", lambda: 1.4)
    monkeypatch.setattr(
        doctors.blas, "status", lambda: BlasStatus(None, "too late: import qlab first")
    )
    monkeypatch.setattr(
        doctors, "_version", lambda package: "missing" if package == "anywidget" else "1.0"
    )
    monkeypatch.setattr(doctors, "machine", lambda: Machine("here", 8 * 10**9, 10**9))
    findings = "\n".join(qlab.doctor().findings)
    assert "import qlab first" in findings and "pip install anywidget" in findings
    assert "1.0 GB" in findings


@pytest.mark.parametrize(
    ("installed", "is_newer"),
    [("0.32.4", False), ("0.31.9", False), ("0.32.4.dev1", False), ("0.33.0", True), ("1.0", True)],
)
def test_doctor_says_with_which_versions_qlab_was_tested(installed, is_newer, monkeypatch):
    monkeypatch.setattr(doctors, "TESTED", {"mlx": "0.32.4"})
    versions = dict.fromkeys(doctors._PACKAGES, "1.0") | {"mlx": installed}
    findings = doctors._findings_of_versions(versions)
    assert bool(findings) == is_newer
    if is_newer:
        assert f"mlx {installed} is newer than 0.32.4" in findings[0]
        assert "pip install 'mlx==0.32.4'" in findings[0]
