"""A real JupyterLab driven by a real Chromium, with the network blocked."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
]
KERNEL = "window.jupyterapp.shell.currentWidget.sessionContext.session.kernel"
SHOTS = Path(__file__).parents[2] / "build" / "screenshots"
MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"


def browser_path() -> str | None:
    """Path of an installed Chromium, or None."""
    named = (shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome"))
    return next((path for path in named if path), MAC if Path(MAC).exists() else None)


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium."""
    path = browser_path()
    if path is None:
        if os.environ.get("CI") == "true":
            pytest.fail("Chromium is missing: the browser tests cannot run")
        pytest.skip("CHROMIUM IS MISSING: BROWSER TESTS SKIPPED")
    from playwright.sync_api import sync_playwright

    SHOTS.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(autouse=True)
def own_timeout(request):
    """Playwright has one timeout for all files; the present file's ``EXPECT_TIMEOUT_MS`` goes in."""
    own = getattr(request.module, "EXPECT_TIMEOUT_MS", None)
    if own is not None:
        from playwright.sync_api import expect

        expect.set_options(timeout=own)


@contextmanager
def served(root: Path) -> Iterator[str]:
    """A JupyterLab server of its own within, over a folder; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    places = {f"JUPYTER_{kind}_DIR": str(root / kind) for kind in ("CONFIG", "DATA", "RUNTIME")}
    env = {
        **os.environ,
        **places,
        "IPYTHONDIR": str(root / "ipython"),
        "JUPYTERLAB_SETTINGS_DIR": str(root / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(root / "workspaces"),
    }
    tracker = root / "settings/@jupyterlab/notebook-extension/tracker.jupyterlab-settings"
    tracker.parent.mkdir(parents=True)
    tracker.write_text('{"windowingMode":"none"}')  # otherwise outputs off the screen are detached
    command = [
        sys.executable,
        "-m",
        "jupyter",
        "lab",
        "--allow-root",
        "--no-browser",
        "--ip=127.0.0.1",
        f"--port={port}",
        f"--ServerApp.root_dir={root}",
        "--IdentityProvider.token=tok",
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.news_url=None",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with (root / "log").open("w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
        try:
            for _ in range(120):
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/api?token=tok")
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(20)


def opened(context, root: Path, url: str, name: str, cells: list[str]):
    """Open a notebook of the given code cells; the page lists foreign requests and page errors."""
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    made.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(made, root / f"{name}.ipynb")
    page = context.new_page()
    page.foreign, page.errors = [], []

    def route(request):
        if request.request.url.startswith((url, "data:", "blob:")):
            request.continue_()
        else:
            page.foreign.append(request.request.url)
            request.abort()

    page.route("**/*", route)
    page.on("pageerror", lambda error: page.errors.append(str(error)))
    page.goto(f"{url}/lab/tree/{name}.ipynb?token=tok&reset")
    ready = f"window.jupyterapp?.shell.currentWidget?.sessionContext?.isReady && {KERNEL}?.status === 'idle'"
    page.wait_for_function(ready, timeout=90_000)
    return page


@pytest.fixture(scope="session")
def lab(tmp_path_factory, chromium):
    """Root folder and address of a JupyterLab server of its own."""
    root = tmp_path_factory.mktemp("lab")
    with served(root) as url:
        yield root, url


@pytest.fixture
def notebook(lab, chromium):
    """Opens a notebook, see ``opened``."""
    contexts = []

    def open_(name: str, cells: list[str], width: int = 1100):
        contexts.append(chromium.new_context(viewport={"width": width, "height": 950}))
        return opened(contexts[-1], *lab, name, cells)

    yield open_
    for context in contexts:
        context.close()


def run_cell(page, index: int, wait: bool = True) -> None:
    """Run a cell, by number."""
    page.evaluate(
        f"(async()=>{{const n=window.jupyterapp.shell.currentWidget.content; n.activeCellIndex={index};"
        f" const p=window.jupyterapp.commands.execute('notebook:run-cell'); {'await p' if wait else ''}}})()"
    )
