"""Several processes on this machine, joined by MLX's ring, and what became of each."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
QUIET = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}


def launch(
    arguments: list[list], folder: Path, timeout_s: float = 240
) -> list[tuple[int, str, str]]:
    """Run Python in several processes, with arguments for each; return exit code, output and errors of each."""
    free = [socket.create_server(("127.0.0.1", 0)) for _ in arguments]
    hosts = [[f"127.0.0.1:{server.getsockname()[1]}"] for server in free]
    (folder / "hosts.json").write_text(json.dumps(hosts))
    for server in free:
        server.close()
    started = [
        subprocess.Popen(
            [sys.executable, *map(str, own)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                **QUIET,
                "MLX_RANK": str(rank),
                "MLX_HOSTFILE": str(folder / "hosts.json"),
            },
        )
        for rank, own in enumerate(arguments)
    ]
    try:
        said = [process.communicate(timeout=timeout_s) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]
