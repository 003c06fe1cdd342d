"""Says what is installed, what is fast and what is missing."""

from __future__ import annotations

import html
import sys
import time
from dataclasses import dataclass
from importlib import metadata

from qlab.runtime import blas
from qlab.runtime.device import backend, machine
from qlab.runtime.job import mlx_call

_PACKAGES = (
    "mlx",
    "mlx-lm",
    "anywidget",
    "ipywidgets",
    "plotly",
    "transformers",
    "datasets",
    "jupyterlab",
    "ipykernel",
)
_SLOW_GFLOPS = 15.0
_LITTLE_NBYTES = 4e9


@dataclass(frozen=True)
class DoctorReport:
    """What ``qlab.doctor()`` found.

    Attributes:
        facts: ``(name, value)`` pairs.
        findings: what is wrong, in words, with what to do; empty if nothing is.
    """

    facts: tuple[tuple[str, str], ...]
    findings: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [f"{name:<14}{value}" for name, value in self.facts]
        return "\n".join([*lines, "", *(self.findings or ("Nothing is wrong.",))])

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><th>{html.escape(n)}</th><td>{html.escape(v)}</td></tr>" for n, v in self.facts
        )
        notes = "".join(
            f"<li>{html.escape(x)}</li>" for x in self.findings or ("Nothing is wrong.",)
        )
        return f"<table>{rows}</table><ul>{notes}</ul>"


def doctor() -> DoctorReport:
    """Look at this machine: versions, back end, BLAS and its speed, memory, and what is wrong."""
    name = mlx_call(backend)
    gflops = mlx_call(_gflops)
    place = mlx_call(machine)
    versions = [(package, _version(package)) for package in ("qlab-mlx", *_PACKAGES)]
    given = blas.status()
    facts = [
        ("python", sys.version.split()[0]),
        *versions,
        ("back end", name),
        ("BLAS", f"{given.loaded or 'built in'} ({given.reason})"),
        ("matmul", f"{gflops:.0f} GFLOP/s, float32"),
        ("memory", f"{place.free_nbytes / 1e9:.1f} of {place.total_nbytes / 1e9:.1f} GB free"),
    ]
    findings = []
    if name == "cpu" and sys.platform.startswith("linux") and gflops < _SLOW_GFLOPS:
        findings.append(
            f"Matrix products are slow ({given.reason}). Everything takes up to 40 times longer."
        )
    if place.free_nbytes < _LITTLE_NBYTES:
        findings.append(
            f"Only {place.free_nbytes / 1e9:.1f} GB of memory are free: close other programs."
        )
    for package, version in versions:
        if version == "missing" and package in ("anywidget", "ipywidgets"):
            findings.append(
                f"{package} is missing here, so panels show as tables: pip install {package}."
            )
    return DoctorReport(tuple(facts), tuple(findings))


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _gflops(n: int = 768, repeats: int = 4) -> float:
    import mlx.core as mx

    a = mx.random.normal((n, n))
    mx.eval(a @ a)
    start = time.perf_counter()
    for _ in range(repeats):
        mx.eval(a @ a)
    return repeats * 2 * n**3 / (time.perf_counter() - start) / 1e9
