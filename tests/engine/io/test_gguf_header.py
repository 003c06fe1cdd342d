"""Damaged GGUF files must not end the process: MLX would trust their headers."""

from __future__ import annotations

import struct

import pytest

import qlab
from qlab.engine.io.gguf_header import read_header
from qlab.errors import LoadError


def test_damaged_files_are_refused(smollm2_path, tmp_path):
    whole = smollm2_path.read_bytes()[:4_000_000]
    for name, data, words in (
        ("magic", b"GGML" + whole[4:], "not a GGUF file"),
        ("version", whole[:4] + struct.pack("<I", 9) + whole[8:], "version 9"),
        ("header", whole[:3000], "cut short or damaged"),
        ("counts", whole[:8] + b"\xff" * 16 + whole[24:], "cut short or damaged"),
        ("data", whole, "cut short"),
        ("empty", b"", "not a GGUF file"),
    ):
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(data)
        with pytest.raises(LoadError, match=words):
            qlab.load(path)


def test_a_whole_header_names_every_tensor(smollm2_path):
    tensors = {info.name: info for info in read_header(smollm2_path)}
    embedding = tensors["token_embd.weight"]
    assert embedding.shape == (576, 49152)  # the dimension that lies together comes first
    assert tensors["output_norm.weight"].type == "F32"
