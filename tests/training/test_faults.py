"""Reactions of a run to faults: damaged checkpoints, full disks, values that are not finite, mistakes of operators."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_tst.config import DivergedError, UserError
from megatron_tst.telemetry import read_metrics
from megatron_tst.training.step import Stepper
from tests.training.kill_soak import KINDS, soak
from tests.training.runs import ROOT, arguments, build_here, parameters, train_here

RUN = "--tst-bag-size 4 --tst-steps 4"


@pytest.fixture
def argv(corpus, tokenizer, tmp_path: Path):
    def build(name: str, extra: str = "", load: str | None = None) -> list[str]:
        load = f"--load {tmp_path / load / 'checkpoints'}" if load else ""
        return arguments(corpus, str(tokenizer.path), tmp_path / name, f"{RUN} {extra} {load}")

    return build


def losses(run) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run.directory.metrics) if "loss" in line}


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit in a shard": ("__0_0.distcp", flip_a_bit),
    "a truncated shard": ("__0_1.distcp", lambda path: os.truncate(path, path.stat().st_size - 1)),
    "a missing shard": ("__0_0.distcp", Path.unlink),
    "a missing table of contents": (".metadata", Path.unlink),
    "a flipped bit in the common file": ("common.pt", flip_a_bit),
    "no checksums": ("SHA256SUMS", Path.unlink),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_and_kept(here, argv, tmp_path: Path, caplog, name):
    whole = train_here(argv("run", "--save-interval 3"))
    file, damage = DAMAGES[name]
    folder = tmp_path / "run" / "checkpoints" / "iter_0000008"
    damage(folder / file)
    before = {path.name: path.stat().st_size for path in folder.iterdir()}
    resumed = train_here(argv("run", "--save-interval 3", load="run"))
    assert resumed.first_step == 6
    (warning,) = [record.message for record in caplog.records if "WARNING" in record.message]
    assert str(folder) in warning and file in warning and "the previous checkpoint is tried" in warning
    assert {path.name: path.stat().st_size for path in folder.with_name(f"{folder.name}.replaced").iterdir()} == before
    assert losses(resumed) == losses(whole)


def test_a_flipped_bit_is_loaded_without_verification(here, argv, tmp_path: Path):
    """The negative control: the bit belongs to a weight, and only the checksums notice that it is flipped."""
    train_here(argv("run"))
    folder = tmp_path / "run" / "checkpoints" / "iter_0000008"
    shard = max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)
    flip_a_bit(shard)
    with pytest.raises(UserError, match="none of its 2 checkpoints is intact"):
        flip_a_bit(folder.with_name("iter_0000004") / "common.pt")
        build_here(argv("again", load="run"))
    run = build_here(argv("again", "--no-verify-checkpoint", load="run"))
    assert run.first_step == 8
    run.directory.leave()


def test_a_tracker_without_a_step_is_reported_and_the_newest_checkpoint_loaded(here, argv, tmp_path: Path, caplog):
    train_here(argv("run", "--save-interval 3"))
    (tmp_path / "run" / "checkpoints" / "latest_checkpointed_iteration.txt").write_text("")
    run = build_here(argv("again", load="run"))
    assert run.first_step == 8
    assert "latest_checkpointed_iteration.txt is missing or names no step" in caplog.text
    run.directory.leave()


def test_a_full_disk_ends_the_run_and_keeps_the_last_checkpoint(here, argv, small_disk: Path, caplog):
    """One checkpoint fits; the files of the second are removed."""
    with pytest.raises(UserError, match=r"--save: .* cannot be written: .*No space left on device: .*\.distcp"):
        train_here(argv("run", f"--save {small_disk} --save-interval 3"))
    assert not list(small_disk.glob(".partial-*"))
    run = build_here(argv("again", f"--load {small_disk}"))
    assert run.first_step == 3
    run.directory.leave()


def test_a_read_only_folder_is_reported_before_the_first_step(here, argv, small_disk: Path):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(UserError, match=r"--save: .* cannot be written: Read-only file system"):
        build_here(argv("run", f"--save {small_disk / 'checkpoints'}"))


def test_a_folder_that_refuses_new_files_is_named(here, argv, tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--save: .*file/checkpoints cannot be written: Not a directory"):
        build_here(argv("run", f"--save {tmp_path / 'file' / 'checkpoints'}"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_file_that_cannot_grow_is_named(argv, tmp_path: Path):
    """The kernel refuses the shard's last bytes, as it does when a quota is reached."""
    program = (
        "import resource, runpy\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "runpy.run_path('pretrain_tst.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *argv("run")], cwd=ROOT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 2
    last = done.stderr.strip().splitlines()[-1]
    assert re.search(r"--save: .* cannot be written: .*File too large: .*\.distcp", last), last
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


class Poison:
    """Makes the loss or the gradient of the given steps infinite or NaN."""

    def __init__(self, monkeypatch, steps, what):
        self.step, self.weights = 0, {}
        train, loss = Stepper.train, Stepper.micro_batch_loss

        def poisoned_train(stepper, batches):
            self.step += 1
            report = train(stepper, batches)
            self.weights[self.step] = [p.detach().clone() for c in stepper.train_state.chunks for p in c.parameters()]
            return report

        def poisoned_loss(stepper, rows, global_weight):
            differentiated, reported = loss(stepper, rows, global_weight)
            if self.step not in steps:
                return differentiated, reported
            if what == "loss":
                return differentiated * torch.nan, reported * torch.nan
            return differentiated * torch.inf, reported

        monkeypatch.setattr(Stepper, "train", poisoned_train)
        monkeypatch.setattr(Stepper, "micro_batch_loss", poisoned_loss)


@pytest.mark.parametrize("flags", ["", "--use-distributed-optimizer", "--bf16"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_skipped_and_logged(here, argv, monkeypatch, what, flags):
    poison = Poison(monkeypatch, {6}, what)
    run = train_here(argv("run", flags))
    lines = read_metrics(run.directory.metrics)
    (skipped,) = [line for line in lines if "skipped_loss" in line]
    # These are the samples of the second step of the recovery phase, with a global batch size of four.
    assert (skipped["step"], skipped["phase"], skipped["bag_size"]) == (6, 1, 1)
    assert (skipped["first_sample"], skipped["last_sample"]) == (4, 7)
    assert "nan" in (skipped["skipped_loss"], skipped["skipped_grad_norm"])
    assert all(torch.equal(a, b) for a, b in zip(poison.weights[5], poison.weights[6], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(poison.weights[6], poison.weights[7], strict=True))
    assert sorted(losses(run)) == [1, 2, 3, 4, 5, 7, 8]
    assert all(bool(torch.isfinite(value).all()) for value in parameters(run).values())


def test_weights_are_lost_without_the_guard(here, argv, monkeypatch):
    monkeypatch.setattr("megatron_tst.training.optimizer.math", SimpleNamespace(isfinite=lambda _: True))
    Poison(monkeypatch, {6}, "gradient")
    with pytest.raises(DivergedError):
        train_here(argv("run", "--max-nan-steps 1"))


@pytest.mark.parametrize("saving", ["", "--async-save"])
def test_a_run_that_diverges_stops_and_keeps_its_last_checkpoint(here, argv, monkeypatch, saving):
    Poison(monkeypatch, {5, 6, 7, 8}, "loss")
    with pytest.raises(DivergedError, match=r"--max-nan-steps 3: .* in the last 3 steps, up to step 7"):
        train_here(argv("run", f"--max-nan-steps 3 --save-interval 2 {saving}"))
    run = build_here(argv("run", load="run"))
    assert run.first_step == 6  # it holds the weights of step 4, because steps 5 and 6 were not applied
    assert all(bool(torch.isfinite(value).all()) for value in parameters(run).values())
    run.directory.leave()
    assert DivergedError.exit_code == 3


def test_a_second_run_in_the_same_directory_is_refused(here, argv, tmp_path: Path):
    run = build_here(argv("run"))
    done = subprocess.run(
        [sys.executable, "pretrain_tst.py", *argv("run", load="run")], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "another run is using it" in done.stderr
    run.directory.leave()


def test_a_second_run_that_saves_in_the_same_folder_is_refused(here, argv, tmp_path: Path):
    """The folder is refused even while it is empty, because the first run may save at any moment."""
    elsewhere = tmp_path / "elsewhere"
    run = build_here(argv("run", f"--save {elsewhere}"))
    for folder in (elsewhere, tmp_path / "run" / "checkpoints"):
        done = subprocess.run(
            [sys.executable, "pretrain_tst.py", *argv("second", f"--save {folder}")],
            cwd=ROOT, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert f"--save {folder}: another run saves there (run.lock)" in done.stderr
        assert not (tmp_path / "second").exists()
    run.directory.leave()
    assert not any(elsewhere.iterdir())
    build_here(argv("second", f"--save {elsewhere}")).directory.leave()


def test_a_run_may_save_in_its_run_directory(here, argv, tmp_path: Path):
    """The directory's lock is kept until the run leaves."""
    run = build_here(argv("run", f"--save {tmp_path / 'run'}"))
    done = subprocess.run(
        [sys.executable, "pretrain_tst.py", *argv("run", load="run")], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "another run is using it" in done.stderr
    run.directory.leave()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_killed_repeatedly_equals_an_undisturbed_run(corpus, tokenizer, tmp_path: Path, kind):
    """The short form of ``python -m tests.training.kill_soak``."""
    moments = soak(corpus, str(tokenizer.path), tmp_path, 2, kind)
    assert moments["save"] and moments["step"]
