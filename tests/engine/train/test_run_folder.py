"""The folder of a run gives back what was put in, and no two runs share one."""

from __future__ import annotations

import numpy as np
import pytest

from qlab.core.config.quant import QuantConfig
from qlab.core.config.quant import QuantPlan
from qlab.core.config.lora import LoRAConfig
from qlab.core.config.train import TrainConfig
from qlab.engine.train import run_folder
from qlab.engine.data.tokenize import read
from qlab.engine.data.preview import report
import qlab.views  # noqa: F401  registers the view of DataReport
from qlab.engine.data.batches import Feed
from qlab.errors import LoadError
from qlab.errors import SaveError

CONFIG = TrainConfig(max_seq_length=12)
PLAN = QuantPlan(QuantConfig("affine", 4, 64), {"a": None, "b": QuantConfig("mxfp4")})
FACTS = run_folder.RunFacts(
    source="demo",
    plan=PLAN,
    solver="rtn",
    lora=LoRAConfig(keys=("q_proj",)),
    train=CONFIG,
    base="0f",
    prompts=("Why?",),
)
ROWS = [
    {"prompt": "a", "completion": "b"},
    {"prompt": "a very long question that no answer follows " * 3, "completion": "b"},  # is dropped
    {
        "text": "a text that is longer than twelve tokens, so that its end is cut off and shown as such"
    },
    {"text": ""},
]


@pytest.fixture
def rows(demo):
    return read(ROWS, demo.tokenizer, CONFIG)


def test_what_a_run_is_made_of_comes_back_as_it_was(rows, demo, tmp_path):
    run_folder.write(tmp_path, FACTS, rows, rows)
    facts, again, held = run_folder.read(tmp_path)
    assert facts == FACTS and again.fingerprint == rows.fingerprint == held.fingerprint
    assert rows.cut == 1 and len(rows.dropped) == 2 and again.dropped == rows.dropped
    for one, other in zip(rows, again, strict=True):
        assert (one.number, one.cut) == (other.number, other.cut)
        assert (one.beyond is None) == (other.beyond is None)
        assert one.beyond is None or np.array_equal(one.beyond, other.beyond)
    views = [report(Feed(found, CONFIG), demo.tokenizer) for found in (rows, again)]
    assert repr(views[0]) == repr(views[1]) and views[0]._repr_html_() == views[1]._repr_html_()


def test_rows_none_of_which_is_cut_come_back_too(demo, tmp_path):
    run_folder.write(tmp_path, FACTS, read(["a b", "c d"], demo.tokenizer, CONFIG), None)
    _, again, held = run_folder.read(tmp_path)
    assert held is None and [row.beyond for row in again] == [None, None]


def test_a_folder_that_holds_a_run_is_not_taken_again(rows, tmp_path):
    path = tmp_path / "run"
    assert run_folder.unused_path(path) == path
    path.mkdir()
    assert run_folder.unused_path(path) == path
    run_folder.write(path, FACTS, rows, None)
    (tmp_path / "run-2" / "step-000007").mkdir(parents=True)
    assert run_folder.unused_path(path) == tmp_path / "run-3"


BROKEN = {
    "no folder": (lambda path: (path / "run.json").unlink(), "it has no run.json"),
    "no rows": (lambda path: (path / "rows.npz").unlink(), "it has no rows.npz"),
    "cut short": (
        lambda path: (path / "rows.npz").write_bytes((path / "rows.npz").read_bytes()[:200]),
        "cannot be read",
    ),
    "no JSON": (lambda path: (path / "run.json").write_text("{"), "cannot be read"),
    "of a newer qlab": (
        lambda path: (path / "run.json").write_text('{"later": 1}'),
        "cannot be read",
    ),
    "no file": (lambda path: (path / "run.json").write_text("[]"), "cannot be read"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_no_run_is_refused(rows, tmp_path, name):
    spoil, says = BROKEN[name]
    run_folder.write(tmp_path, FACTS, rows, None)
    spoil(tmp_path)
    with pytest.raises(LoadError, match=says):
        run_folder.read(tmp_path)


def test_a_place_that_cannot_be_written_is_told(rows, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match="give the run another path"):
        run_folder.write(tmp_path / "file", FACTS, rows, None)
    assert (tmp_path / "file").read_text() == "mine"
