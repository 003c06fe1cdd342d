"""A safetensors file is checked against its own header before MLX maps it."""

from __future__ import annotations

import mlx.core as mx
import pytest

from qlab.engine.io.loaded import check_safetensors, tokenizer
from qlab.errors import LoadError
from qlab.runtime.job import mlx_call
from qlab.runtime.paths import ASSETS


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.safetensors"
    mlx_call(lambda: mx.save_safetensors(str(path), {"a": mx.ones((4, 4))}))
    return path


def test_a_whole_file_passes(file):
    check_safetensors(file)


def test_a_file_that_is_cut_short_is_said_with_its_size(file):
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(LoadError, match=f"cut short: {len(whole) - 1} bytes of {len(whole)}"):
        check_safetensors(file)


@pytest.mark.parametrize("data", [b"", b"x" * 100, b"\x02" + bytes(7) + b"[]", bytes(8)])
def test_what_is_no_safetensors_file_is_refused(file, data):
    file.write_bytes(data)
    with pytest.raises(LoadError, match="is not a safetensors file"):
        check_safetensors(file)


def test_a_folder_without_a_tokenizer_is_said(tmp_path):
    with pytest.raises(LoadError, match="has no tokenizer"):
        tokenizer(tmp_path)
    assert tokenizer(ASSETS / "demo").eos_token_id is not None
