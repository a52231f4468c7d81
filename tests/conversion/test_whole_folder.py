"""Folders appear whole or not at all."""

import shutil
from pathlib import Path

import pytest

from megatron_tst.config import UserError
from megatron_tst.conversion.whole_folder import MARK, whole_folder
from tests.locks import held_by_another


def files(folder):
    """Return the contents of a folder except markers."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != MARK]
    return {str(path.relative_to(folder)): path.read_text() for path in paths}


def fill(target, text, force=False, fail=None, needed_bytes=0, source=None):
    with whole_folder(target, source or target.parent / "source", needed_bytes, force) as folder:
        (folder / "config.json").write_text(text)
        assert not (target / "config.json").exists() or (target / "config.json").read_text() != text
        if fail:
            raise fail


def test_a_folder_appears_with_its_parents_and_nothing_else(tmp_path):
    fill(tmp_path / "a" / "b", "new")
    assert files(tmp_path) == {"a/b/config.json": "new"}
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "empty", "new")
    assert files(tmp_path / "empty") == {"config.json": "new"}


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), UserError("damaged"), RuntimeError()])
def test_an_interruption_keeps_the_previous_folder(tmp_path, failure):
    with pytest.raises(type(failure)):
        fill(tmp_path / "b", "new", fail=failure)
    assert not any(tmp_path.iterdir())
    fill(tmp_path / "b", "old")
    with pytest.raises(type(failure)):
        fill(tmp_path / "b", "new", force=True, fail=failure)
    assert files(tmp_path) == {"b/config.json": "old"}


def test_leftovers_of_a_killed_conversion_are_removed(tmp_path):
    (tmp_path / ".b.partial" / "deep").mkdir(parents=True)
    (tmp_path / ".b.partial" / "model.safetensors").write_text("half")
    fill(tmp_path / "b", "new")
    assert files(tmp_path) == {"b/config.json": "new"}


def test_two_conversions_to_one_folder_are_refused(tmp_path):
    """The second conversion does not remove the first one's files as leftovers of a killed conversion."""
    half = tmp_path / ".b.partial" / "model.safetensors"
    half.parent.mkdir()
    half.write_text("half")
    with (
        held_by_another(tmp_path / "b.lock"),
        pytest.raises(UserError, match=f"--save {tmp_path / 'b'}: another process is writing it"),
    ):
        fill(tmp_path / "b", "new")
    assert half.read_text() == "half" and not (tmp_path / "b").exists()
    fill(tmp_path / "b", "new")
    assert files(tmp_path) == {"b/config.json": "new"}


def test_force_replaces_only_an_earlier_conversion(tmp_path):
    fill(tmp_path / "b", "old")
    with pytest.raises(UserError, match="is not empty; --force replaces it"):
        fill(tmp_path / "b", "new")
    fill(tmp_path / "b", "new", force=True)
    assert files(tmp_path) == {"b/config.json": "new"}
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(UserError, match=f"holds no {MARK}, so --force does not replace it.*delete this one yourself"):
        fill(tmp_path / "home", "new", force=True)
    with pytest.raises(UserError, match="--save /: this folder cannot be replaced"):
        fill(Path("/"), "new", force=True)
    with pytest.raises(UserError, match="exists and is not a folder"):
        fill(tmp_path / "home" / "thesis.tex", "new", force=True)
    assert files(tmp_path / "home") == {"thesis.tex": "years"}


def test_too_little_space_is_reported_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10**9))
    fill(tmp_path / "b", "new", needed_bytes=10**9)
    with pytest.raises(UserError, match=r"c: needs 1\.50 GB, but 1\.00 GB are free"):
        fill(tmp_path / "c", "new", needed_bytes=1_500_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=12))
    with pytest.raises(UserError, match=r"c: needs 2\.50 KB, but 12 bytes are free"):
        fill(tmp_path / "c", "new", needed_bytes=2_500)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_a_full_disk_is_reported_in_one_line(tmp_path):
    full = OSError(28, "No space left on device")
    with pytest.raises(UserError, match=r"--save: .*c cannot be written: No space left on device"):
        fill(tmp_path / "c", "new", fail=full)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["thesis.tex", "iter_0000100/__0_0.distcp"])
def test_force_refuses_a_folder_with_added_files(tmp_path, name):
    fill(tmp_path / "b", "old")
    added = tmp_path / "b" / name
    added.parent.mkdir(exist_ok=True)
    added.write_text("years")
    with pytest.raises(UserError, match=f"holds {name}, which this tool did not write"):
        fill(tmp_path / "b", "new", force=True)
    assert files(tmp_path) == {"b/config.json": "old", f"b/{name}": "years"}
    added.unlink()
    fill(tmp_path / "b", "new", force=True)
    assert files(tmp_path) == {"b/config.json": "new"}


@pytest.mark.parametrize("mark", ["", "[]", "{}", '{"files": 5}'])
def test_force_refuses_a_damaged_marker(tmp_path, mark):
    fill(tmp_path / "b", "old")
    (tmp_path / "b" / MARK).write_text(mark)
    with pytest.raises(UserError, match=f"{MARK} cannot be read"):
        fill(tmp_path / "b", "new", force=True)
    assert files(tmp_path) == {"b/config.json": "old"}


@pytest.mark.parametrize("below", ["", "iter_0000000"])
def test_force_does_not_replace_the_folder_that_is_read(tmp_path, below):
    fill(tmp_path / "b", "old")
    with pytest.raises(UserError, match="contains the folder that --load reads"):
        fill(tmp_path / "b", "new", force=True, source=tmp_path / "b" / below)
    assert files(tmp_path) == {"b/config.json": "old"}
