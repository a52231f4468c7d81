"""A directory with the name of a step is always complete, and the tracker names one of them."""

from pathlib import Path

import pytest

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.config import UserError


@pytest.fixture
def folders(tmp_path: Path) -> CheckpointFolders:
    return CheckpointFolders(tmp_path / "checkpoints")


def save(folders: CheckpointFolders, step: int, content: str = "") -> None:
    folders.begin(step)
    (folders.partial(step) / "shard").write_text(content)
    folders.publish(step)


def test_new_directory_has_no_checkpoints(folders):
    assert folders.steps() == []
    assert folders.latest() is None


def test_partially_written_directory_is_not_a_checkpoint(folders):
    save(folders, 5)
    folders.begin(10)
    (folders.partial(10) / "shard").write_text("half")
    assert folders.steps() == [5]
    assert folders.latest() == 5
    folders.publish(10)
    assert folders.steps() == [5, 10]
    assert folders.tracker.read_text() == "10"  # as Megatron-LM reads it
    assert (folders.path / "iter_0000010" / "shard").read_text() == "half"


def test_tracker_is_updated_last(folders, monkeypatch):
    """If the process is killed before the tracker is updated, the latest checkpoint is the previous one."""
    save(folders, 5)
    monkeypatch.setattr(folders, "point_to", lambda _: None)
    save(folders, 10)
    assert folders.latest() == 5


def test_remains_of_a_killed_save_are_deleted(folders):
    folders.begin(5)
    (folders.partial(5) / "stale").write_text("")
    save(folders, 5)
    assert [path.name for path in folders.of(5).iterdir()] == ["shard"]


def test_checkpoint_that_is_saved_again_is_moved_aside(folders):
    save(folders, 5, "damaged")
    save(folders, 5, "whole")
    assert (folders.of(5) / "shard").read_text() == "whole"
    assert (folders.path / "iter_0000005.replaced" / "shard").read_text() == "damaged"
    assert folders.steps() == [5]


def test_later_checkpoints_of_another_course_are_moved_aside(folders):
    for step in (5, 10, 15):
        save(folders, step)
    folders.begin(7)
    assert folders.publish(7) == [10, 15]
    assert (folders.steps(), folders.latest()) == ([5, 7], 7)
    assert sorted(path.name for path in folders.path.glob("*.replaced")) == [
        "iter_0000010.replaced", "iter_0000015.replaced",
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["", " \n", "release", "-5", "1.5", "1_0", "\u0661"])
def test_tracker_may_name_no_step(folders, text):
    save(folders, 5)
    folders.tracker.write_text(text, encoding="utf-8")
    assert folders.latest() is None
    folders.tracker.write_text(" 12\n")
    assert folders.latest() == 12


def test_error_names_a_tracker_that_cannot_be_read(folders):
    folders.tracker.mkdir(parents=True)
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration.txt: cannot be read: Is a directory"):
        folders.latest()


def test_abandoned_or_removed_checkpoint_leaves_no_files(folders):
    save(folders, 5)
    folders.begin(10)
    folders.abandon(10)
    folders.remove(5)
    assert [path.name for path in folders.path.iterdir()] == [folders.tracker.name]


def test_error_names_a_tracker_that_cannot_be_written(folders):
    save(folders, 5)
    folders.tracker.unlink()
    folders.tracker.mkdir()
    with pytest.raises(UserError, match=r"latest_checkpointed_iteration.txt cannot be written: Is a directory"):
        save(folders, 10)
    assert folders.steps() == [5, 10]
