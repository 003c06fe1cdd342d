"""A model says how it is stored, and how to get it back."""

from __future__ import annotations

import pytest

import qlab
from qlab.errors import LoadError


def test_storage_is_said_in_words(demo):
    assert demo.storage_label == "16-bit"
    q = qlab.Quantizer(demo, bits=3, group_size=32)
    q.set("model.layers.0.mlp.down_proj", bits=8)
    small = q.quantize()
    q.close()
    assert small.storage_label == "affine 3-bit g32"
    assert "affine 3-bit g32" in repr(small)
    assert small.original is demo and small.source == demo.source
    words, code = small.unsaved
    assert words == "affine 3-bit g32 (1 layer otherwise) of 'demo'" and "quantize()" in code


def test_a_freed_model_keeps_its_name_and_refuses_to_run():
    model = qlab.load("demo")
    spec, name = model.spec, model.name
    model.free()
    assert (model.spec, model.name) == (spec, name) and model.config["model_type"]
    with pytest.raises(LoadError, match="given back by free"):
        _ = model.module


@pytest.mark.parametrize("source", ["", "  ", None, 3])
def test_a_source_that_is_none_is_refused(source):
    with pytest.raises(LoadError, match="is not legal"):
        qlab.load(source)
