"""Outputs that cannot be written are refused before the work starts."""

import os
from pathlib import Path

import pytest

from megatron_tst.config import UserError
from megatron_tst.telemetry.outputs import check_output, check_picture, writing_output


def test_a_plot_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch):
    check_picture(tmp_path / "new" / "c.svg", "--output")
    assert (tmp_path / "new").is_dir()
    with pytest.raises(UserError, match=r"--output .*c\.doc: must end in \.png or \.svg"):
        check_picture(tmp_path / "c.doc", "--output")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output .*c\.svg: cannot create the folder .*file: "):
        check_picture(tmp_path / "file" / "c.svg", "--output")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match="needs the package matplotlib"):
        check_picture(tmp_path / "c.svg", "--output")


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch):
    (tmp_path / "old.md").write_text("")
    for path in (tmp_path / "old.md", tmp_path / "new" / "r.md"):
        check_output(path, "--report")
    with pytest.raises(UserError, match=r"--report .*: is a folder; name a file"):
        check_output(tmp_path, "--report")
    # Root may write everywhere, so os.access is patched.
    monkeypatch.setattr(os, "access", lambda path, _: path != tmp_path / "old.md")
    with pytest.raises(UserError, match=r"--report .*old\.md: cannot be written"):
        check_output(tmp_path / "old.md", "--report")
    check_output(tmp_path / "r.md", "--report")


def test_a_write_error_becomes_one_line():
    full = Path("/dev/full")
    line = "^--report /dev/full: cannot be written: No space left on device$"
    with pytest.raises(UserError, match=line), writing_output(full, "--report"):
        full.write_text("report")
