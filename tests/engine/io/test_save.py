"""A saved folder says who opens it, and both layouts open as they were saved."""

from __future__ import annotations

import json

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import qlab
from qlab.engine.io.save import _stock_block, _stock_entry
from qlab.runtime.job import mlx_call


@pytest.mark.parametrize(
    ("bits", "mode", "opens_in"),
    [(4, "affine", ("mlx-lm", "qlab")), (4, "nf4", ("qlab",))],
)
def test_a_folder_opens_as_it_was_saved(demo, tmp_path, bits, mode, opens_in):
    small = qlab.Quantizer(demo, bits=bits, group_size=64, mode=mode).quantize()
    saved = small.save(tmp_path / "m")
    assert saved.path == tmp_path / "m" and saved.opens_in == opens_in
    assert str(saved) == saved.note and "qlab.load" in saved
    again = qlab.load(saved.path)

    def same():
        ours = dict(tree_flatten(small.module.parameters()))
        theirs = dict(tree_flatten(again.module.parameters()))
        return ours.keys() == theirs.keys() and all(
            mx.array_equal(ours[name], theirs[name]).item() for name in ours
        )

    assert mlx_call(same)
    assert ("qlab" in json.loads((saved.path / "config.json").read_text())) == (mode == "nf4")


def test_the_commonest_settings_stand_first_and_others_by_layer():
    four, eight = ({"bits": bits, "group_size": 64, "mode": "affine"} for bits in (4, 8))
    block = _stock_block({"a": four, "b": eight, "c": four})
    assert block == {**four, "b": eight}
    assert _stock_entry(block, "b") == eight and _stock_entry(block, "c") == four
