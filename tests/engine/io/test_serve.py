"""A fused folder is served by stock ``mlx_lm.server``."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import mlx.core as mx

import qlab
from qlab.core.config.lora import LoRAConfig
from qlab.engine.io.save import save
from qlab.engine.adapt.fuse import fuse
from qlab.runtime.job import mlx_call
from qlab.engine.io.load import load
from qlab.engine.models.skeleton import describe
from tests.engine.adapt.test_fuse import done, stirred
from tests.engine.train.test_mlx_recipe import small_base

PROMPT, COUNT = "A list is", 4
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def ask(url: str, body: dict | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    with _DIRECT.open(
        urllib.request.Request(url, data, {"Content-Type": "application/json"}), timeout=30
    ) as answer:
        return json.loads(answer.read())


def wait_until_up(url: str, server: subprocess.Popen, limit_s: float = 60) -> None:
    end = time.monotonic() + limit_s
    while True:
        try:
            ask(f"{url}/health")
            return
        except OSError:
            assert server.poll() is None and time.monotonic() < end, "the server did not start"
            time.sleep(0.2)


def test_mlx_lm_server_answers_from_a_fused_folder_what_the_fused_model_says(tmp_path):
    small_base(tmp_path / "base")
    lora = LoRAConfig(rank=4)

    def make() -> str:
        base = load(tmp_path / "base")
        spec = describe(base.module, "small")
        made = done(fuse(base.module, spec, stirred(base.module, spec, lora), lora))
        save(tmp_path / "fused", made, base.tokenizer, base.config, None)
        tokens = list(base.tokenizer.encode(PROMPT))
        for _ in range(COUNT):
            tokens.append(made(mx.array([tokens]))[0, -1].argmax().item())
        return base.tokenizer.decode(tokens[-COUNT:])

    wanted = mlx_call(make)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "mlx_lm",
        "server",
        "--model",
        str(tmp_path / "fused"),
        "--port",
        str(port),
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with open(tmp_path / "log", "w") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, env=environment)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_up(url, server)
        body = {
            "model": str(tmp_path / "fused"),
            "prompt": PROMPT,
            "max_tokens": COUNT,
            "temperature": 0,
        }
        answer = ask(f"{url}/v1/completions", body)
    finally:
        server.terminate()
        server.wait(10)
    assert (
        answer["choices"][0]["text"].strip() == wanted.strip()
    )  # the server cuts a leading space off
    assert qlab.load(tmp_path / "fused").spec.layers
