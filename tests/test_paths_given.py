"""A path or a text that the system cannot look for ends in one clear error, wherever it is given."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

import qlab
from qlab import run
from qlab.engine.data.sources import path_of
from qlab.errors import DataError, QlabError, SaveError
from qlab.runtime.paths import users_path

ONE_LINE = "The cat sat on the mat and looked at the moon. " * 12  # 564 characters
IMPOSSIBLE = {
    "too long": "runs/" + "x" * 400,
    "too long a text": ONE_LINE,
    "no such user": "~there-is-no-such-user/run",
    "a null byte": "run\0",
}
each_path = pytest.mark.parametrize("path", IMPOSSIBLE.values(), ids=IMPOSSIBLE)


@each_path
@pytest.mark.parametrize(
    "read",
    [
        qlab.load,
        qlab.estimate,
        qlab.Trainer.load,
        lambda path: qlab.Adapter.load(path, qlab.load("demo")),
        lambda path: qlab.Trainer(qlab.Adapter(qlab.load("demo")), Path(path)),
    ],
    ids=["model", "estimate", "run", "adapter", "data"],
)
def test_an_impossible_path_is_refused_by_all_that_read(read, path):
    with pytest.raises(QlabError) as refused:
        read(path)
    assert len(str(refused.value)) < 1000


@each_path
def test_an_impossible_path_is_refused_by_all_that_write(demo, path, tmp_path):
    quantizer = qlab.Quantizer(demo)
    adapter = qlab.Adapter(quantizer)
    for write in (
        demo.save,
        adapter.save,
        quantizer.to_html,
        lambda path: qlab.Trainer(adapter, ["A row of text."] * 4, path=path),
    ):
        with pytest.raises(SaveError):
            write(path)


@each_path
def test_an_impossible_path_ends_a_run_without_a_notebook_with_a_message(path):
    said = io.StringIO()
    assert run.main([path], said, said) == 1
    assert said.getvalue().startswith("qlab.run: ")


@pytest.mark.parametrize("length", [200, 256, 564, 1024])
def test_one_long_line_is_a_text(length):
    assert path_of((ONE_LINE * 2)[:length].strip()) is None


def test_a_path_that_does_not_exist_yet_is_one(tmp_path):
    assert users_path(tmp_path / "new") == tmp_path / "new"
    assert users_path("~") == Path.home()
    (tmp_path / "file").write_text("")
    assert users_path(tmp_path / "file" / "within") == tmp_path / "file" / "within"
    with pytest.raises(DataError, match="cannot be a path here: File name too long"):
        users_path("x" * 400, DataError)
