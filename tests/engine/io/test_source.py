"""One rule says what a source means, whoever asks: load, estimate, adapters."""

from __future__ import annotations

import pytest
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from qlab.engine.io.source import fetch_config, fetch_model, find, read_settings
from qlab.errors import LoadError
from qlab.runtime.paths import ASSETS


def test_the_demo_is_itself_wherever_one_stands(tmp_path, monkeypatch):
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    place = find("demo")
    assert (place.path, place.name, place.reference) == (ASSETS / "demo", "demo", "demo")


def test_a_folder_is_remembered_by_its_absolute_path(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.chdir(tmp_path)
    for given in ("m", "./m", "m/../m"):
        place = find(given)
        assert place.name == "m" and place.reference == str((tmp_path / "m").resolve())


def test_a_folder_in_the_home_is_found_and_named(tmp_path, monkeypatch):
    (tmp_path / "m").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find("~/m").name == "m"


def test_what_is_not_here_may_be_on_the_hub():
    place = find("owner/name")
    assert (place.path, place.name, place.reference) == (None, "owner/name", "owner/name")


@pytest.mark.parametrize("text", ["./a/b", "/a/b", "~/a", "a", "a/b/c", "a/b.gguf", "a/b.json"])
def test_what_looks_like_a_path_is_not_asked_of_the_hub(text, monkeypatch):
    for name in ("snapshot_download", "hf_hub_download"):
        monkeypatch.setattr(f"huggingface_hub.{name}", lambda *_, **__: pytest.fail("asked"))
    with pytest.raises(LoadError, match="There is no model at"):
        fetch_model(text)
    with pytest.raises(LoadError, match="There is no config at"):
        fetch_config(text)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalEntryNotFoundError("offline"), "the hub could not be reached"),
        (EntryNotFoundError("gone"), "on the hub has no config.json"),
        (OSError("no route"), r"could not be reached \(OSError\)"),
    ],
)
def test_every_failure_of_the_hub_is_one_sentence(error, words, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(LoadError, match=words):
        fetch_config("owner/name")


@pytest.mark.parametrize(
    ("text", "words"),
    [(None, "has no a.json, so it is not an adapter"), ("{", "not JSON"), ("[]", "but a list")],
)
def test_settings_that_are_none_are_refused(tmp_path, text, words):
    file = tmp_path / "a.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(LoadError, match=words):
        read_settings(file, "an adapter")
