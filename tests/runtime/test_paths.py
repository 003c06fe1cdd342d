"""What is remembered lies in the user's cache, or in a private folder, never in another user's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from qlab.runtime.paths import cache_folder


def test_cache_falls_back_to_a_private_folder(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = cache_folder()
    assert folder.parent == tmp_path and folder.stat().st_mode & 0o077 == 0


def test_a_user_without_a_home_gets_the_private_folder(tmp_path, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert cache_folder().parent == tmp_path and not Path("~").exists()


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    mine = os.getuid()
    (tmp_path / "qlab").mkdir()
    (tmp_path / f"qlab-{mine + 1}").mkdir()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(OSError, match="no folder"):
        cache_folder()
