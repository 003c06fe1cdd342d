"""Files and folders are written whole or not at all, and another's files are never replaced."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from qlab.errors import SaveError
from qlab.runtime.atomic import write_file, write_folder, write_page


def full(*_):
    raise OSError(28, "No space left on device")


def half_file(new):
    new.write_text("half")
    full()


def half_folder(new):
    (new / "a.json").write_text("half")
    full()


def one_file(new):
    (new / "a.json").write_text("new")


def test_a_file_is_written_with_its_folders_and_its_path_comes_back(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    assert write_file(path, lambda new: new.write_text("one")) == path
    assert path.read_text() == "one"
    write_file(path, lambda new: new.write_text("two"))
    assert path.read_text() == "two"
    assert os.listdir(path.parent) == ["a.txt"]


def test_a_file_keeps_its_name_while_it_is_written(tmp_path):
    names = []

    def fill(new):
        names.append(new.name)
        new.write_text("")

    write_file(tmp_path / "rows.npz", fill)  # numpy adds .npz to other names
    assert names == ["rows.npz"]


def test_a_file_has_the_usual_permissions(tmp_path):
    write_file(tmp_path / "ours", lambda new: new.write_text(""))
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_half_a_file_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(SaveError, match=r"a.txt was not written .*No space left.*GB are free"):
        write_file(path, half_file)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_half_a_folder_leaves_what_was_there(tmp_path):
    path = tmp_path / "m"
    write_folder(path, one_file, ["*.json"])
    with pytest.raises(SaveError, match=r"m was not written .*No space left.*GB are free"):
        write_folder(path, half_folder, ["*.json"])
    assert (path / "a.json").read_text() == "new" and os.listdir(tmp_path) == ["m"]


def test_a_write_within_a_write_says_the_place_once(tmp_path):
    def fill(new):
        write_folder(new / "inner", half_folder, [])

    with pytest.raises(SaveError) as caught:
        write_folder(tmp_path / "outer", fill, [])
    assert str(caught.value).count("was not written") == 1
    assert str(caught.value).startswith(f"{tmp_path / 'outer'} was not written")


def test_a_folder_of_the_same_kind_is_replaced_and_another_is_not(tmp_path):
    path = tmp_path / "m"
    path.mkdir()
    (path / "b.json").write_text("old")
    (path / ".DS_Store").write_text("")
    write_folder(path, one_file, ["*.json"])
    assert os.listdir(path) == ["a.json"]
    (path / "thesis.tex").write_text("mine")
    with pytest.raises(SaveError, match=r"other files too \(thesis.tex\)"):
        write_folder(path, one_file, ["*.json"])
    with pytest.raises(SaveError, match="is a file; give the name of a folder"):
        write_folder(path / "thesis.tex", one_file, ["*.json"])
    assert (path / "thesis.tex").read_text() == "mine"


def test_bytes_are_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (calls.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (calls.append("rename"), replace(*paths)))
    write_file(tmp_path / "a", lambda new: new.write_text(""))
    assert calls == ["fsync", "rename", "fsync"]


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = f"""
        import os, signal
        from qlab.runtime.atomic import write_file

        def fill(new):
            new.write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

        write_file({str(path)!r}, fill)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)])
    assert done.returncode == -signal.SIGKILL and path.read_text() == "old"


def test_a_page_is_written_and_a_missing_folder_is_said(tmp_path):
    assert write_page(tmp_path / "p.html", "größer") == str(tmp_path / "p.html")
    assert (tmp_path / "p.html").read_text(encoding="utf-8") == "größer"
    with pytest.raises(SaveError, match="cannot be written: No such file or directory"):
        write_page(tmp_path / "none" / "p.html", "")
