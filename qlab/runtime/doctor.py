"""Says what is installed, what is fast and what is missing: ``qlab.doctor()``."""

from __future__ import annotations

import html
import re
import sys
import time
from dataclasses import dataclass
from importlib import metadata

from qlab.core.machine import Machine
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
_WIDGETS = ("anywidget", "ipywidgets")
# The newest versions with which the whole suite ran. qlab follows internals of both: exported
# graphs, evaluation order and allocation of MLX; model classes, checkpointing and tokenizers of
# mlx-lm.
TESTED = {"mlx": "0.32.4", "mlx-lm": "0.32.2"}
_MISSING = "missing"
_SLOW_GFLOPS = 15.0
_LITTLE_NBYTES = 4e9
_WELL = "Nothing is wrong."


@dataclass(frozen=True)
class DoctorReport:
    """What ``qlab.doctor()`` sees.

    Attributes:
        facts: ``(name, value)`` pairs.
        findings: what is wrong, in words, with what to do; empty if nothing is.

    Example:
        >>> dict(qlab.doctor().facts)["mlx"]
        '0.32.4'
    """

    facts: tuple[tuple[str, str], ...]
    findings: tuple[str, ...]

    def __repr__(self) -> str:
        lines = [f"{name:<14}{value}" for name, value in self.facts]
        return "\n".join([*lines, "", *(self.findings or (_WELL,))])

    def _repr_html_(self) -> str:
        rows = [
            f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
            for name, value in self.facts
        ]
        notes = [f"<li>{html.escape(text)}</li>" for text in self.findings or (_WELL,)]
        return f"<table>{''.join(rows)}</table><ul>{''.join(notes)}</ul>"


def doctor() -> DoctorReport:
    """Look at this machine: versions, back end, BLAS and its speed, memory, and what is wrong.

    Example:
        >>> qlab.doctor()  # in a cell: a table, and a list of what is wrong
    """
    name = mlx_call(backend)
    gflops = mlx_call(_gflops)
    here = mlx_call(machine)
    versions = {package: _version(package) for package in ("qlab-mlx", *_PACKAGES)}
    library = blas.status()
    free = here.free_nbytes / 1e9
    facts = {
        "python": sys.version.split()[0],
        **versions,
        "back end": name,
        "BLAS": f"{library.loaded or 'built in'} ({library.reason})",
        "matmul": f"{gflops:.0f} GFLOP/s, float32",
        "memory": f"{free:.1f} of {here.total_nbytes / 1e9:.1f} GB free",
    }
    findings = [
        *_findings_of_speed(name, gflops, library.reason),
        *_findings_of_memory(here),
        *_findings_of_versions(versions),
    ]
    return DoctorReport(tuple(facts.items()), tuple(findings))


def _findings_of_speed(name: str, gflops: float, reason: str) -> list[str]:
    needs_blas = name == "cpu" and sys.platform.startswith("linux")
    if not needs_blas or gflops >= _SLOW_GFLOPS:
        return []
    return [f"Matrix products are slow ({reason}). Everything takes up to 40 times longer."]


def _findings_of_memory(here: Machine) -> list[str]:
    if here.free_nbytes >= _LITTLE_NBYTES:
        return []
    free = f"{here.free_nbytes / 1e9:.1f} GB of memory are free"
    return [f"Only {free}: close other programs."]


def _findings_of_versions(versions: dict[str, str]) -> list[str]:
    findings = [
        f"{package} is missing here, so panels show as tables: pip install {package}."
        for package in _WIDGETS
        if versions[package] == _MISSING
    ]
    for package, tested in TESTED.items():
        installed = versions[package]
        if installed != _MISSING and _numbers(installed) > _numbers(tested):
            findings.append(
                f"{package} {installed} is newer than {tested}, the newest with which qlab was "
                f"tested, and qlab follows some of its internals. If something fails: "
                f"pip install '{package}=={tested}'."
            )
    return findings


def _numbers(version: str) -> tuple[int, ...]:
    """Leading numbers of a version: ``0.32.4.dev1`` → (0, 32, 4)."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _MISSING


def _gflops(n: int = 768, repeats: int = 4) -> float:
    """Speed of a float32 product of two n × n matrices, in 1e9 operations a second."""
    import mlx.core as mx

    a = mx.random.normal((n, n))
    mx.eval(a @ a)  # the first call pays for starting threads or compiling kernels
    start = time.perf_counter()
    for _ in range(repeats):
        mx.eval(a @ a)
    seconds = time.perf_counter() - start
    return repeats * 2 * n**3 / seconds / 1e9
