"""The BLAS preload: quick, silent, safe to run twice at once, and honest about what it did."""

from __future__ import annotations

import qlab  # noqa

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from qlab.runtime import blas

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="only Linux needs the preload"
)


def fresh(code: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


STATUS = "import qlab; from qlab.runtime.blas import status; print(status())"


def test_it_can_be_turned_off():
    assert "loaded=None" in fresh(STATUS, QLAB_BLAS="0").communicate()[0]


def test_mlx_imported_before_qlab_is_noticed_and_left_alone():
    text = fresh("import mlx.core\n" + STATUS).communicate()[0]
    assert "loaded=None" in text and "import qlab first" in text


def test_missing_package_is_no_error(monkeypatch):
    monkeypatch.setattr(blas, "_SYSTEM", ())
    monkeypatch.setattr(blas, "_status", blas.BlasStatus(None, "not tried"))
    monkeypatch.setattr(blas.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    del sys.modules["mlx.core"]
    found = blas.preload()
    assert found.loaded is None and "pip install" in found.reason


def test_two_processes_at_once_make_one_whole_library(tmp_path):
    pytest.importorskip("scipy_openblas32")
    code = "import qlab.runtime.blas as b; b._SYSTEM = (); path = b._library_with_plain_names(); print(b._load(str(path)), path.name)"
    started = [fresh(code, XDG_CACHE_HOME=str(tmp_path)) for _ in range(2)]
    said = {process.communicate()[0].strip() for process in started}
    made = list((tmp_path / "qlab").iterdir())
    assert len(made) == 1 and said == {f"True {made[0].name}"}


def test_every_matrix_product_that_mlx_imports_is_renamed():
    """Checked against MLX's library itself, so that a newer MLX that asks for more is noticed."""
    folder = Path(next(iter(importlib.util.find_spec("mlx").submodule_search_locations)))
    library = (folder / "lib" / "libmlx.so").read_bytes()
    asked = set(re.findall(rb"\0(cblas_[a-z]+)(?=\0)", library))
    assert asked == {name.encode() for name in blas._WANTED if name.startswith("cblas_")}
    assert all(b"\0" + name.encode() + b"\0" in library for name in blas._WANTED)
