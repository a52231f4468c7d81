import importlib.metadata
import json
import math
import multiprocessing
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from megatron_tst.analysis.curves import read_curve
from megatron_tst.config import UserError
from megatron_tst.telemetry import (
    ExpertMetrics,
    MetricsFile,
    RunDirectory,
    StepMetrics,
    ValidMetrics,
    read_metrics,
    short,
)
from tests.strict_json import read_strictly
from tests.telemetry.lines import STEP


def test_fields_are_the_documented_ones():
    assert [field.name for field in fields(StepMetrics)] == (
        "step phase bag_size loss_kind loss lr lr_by_group grad_norm data_tokens positions flops gpu_hours step_time_s "
        "data_tokens_per_s positions_per_s tflops_per_gpu mfu data_time_s forward_backward_time_s optimizer_time_s "
        "communication_time_s data_epochs memory_gib"
    ).split()
    assert [field.name for field in fields(ValidMetrics)] == (
        "step valid_loss bits_per_byte data_tokens positions flops gpu_hours"
    ).split()


def test_a_written_line_is_on_disk_and_an_incomplete_line_is_dropped(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(STEP)
    assert json.loads(path.read_text())["data_tokens"] == 800
    file.write(ValidMetrics(2, 3.0, None, 800, 200, 2e9, 0.25))
    file.close()
    with path.open("a") as handle:
        handle.write('{"step": 3, "lo')
    assert [sorted(line)[-1] for line in read_metrics(path)] == ["tflops_per_gpu", "valid_loss"]


def test_a_damaged_line_is_named(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n\x00\xff\x00\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged"):
        read_metrics(path)


NOT_FINITE = {
    "a number": (ValidMetrics(2, math.nan, math.inf, 800, 200, 2e9, 0.25), {
        "valid_loss": "nan", "bits_per_byte": "inf",
    }),
    "a list": (ExpertMetrics(2, [1.5, math.nan], [-math.inf], [0.1]), {
        "expert_load_max": ["1.5", "nan"], "expert_load_min": ["-inf"],
    }),
    "a mapping": (replace(STEP, lr_by_group={"no_decay": math.inf}), {"lr_by_group": {"no_decay": "inf"}}),
}  # fmt: skip


@pytest.mark.parametrize("kind", NOT_FINITE)
def test_nan_and_infinity_are_written_as_null_with_a_string(tmp_path: Path, kind):
    metrics, words = NOT_FINITE[kind]
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write(metrics)
    file.close()
    written = (tmp_path / "metrics.jsonl").read_text()
    line = read_strictly(written)
    assert line["not_finite"] == words
    assert "null" in written and all("nan" not in repr(line[name]) and "inf" not in repr(line[name]) for name in words)
    # Reading restores the numbers, and rewriting the file by cut_metrics does not change it.
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert repr(sorted(read.items())) == repr(sorted({"kind": metrics.kind, **vars(metrics)}.items()))
    RunDirectory(tmp_path).create("", first_step=2)
    assert read_strictly((tmp_path / "metrics.jsonl").read_text()) == line


def test_lines_with_bare_nan_are_read_and_rewritten_as_json(tmp_path: Path):
    """Python's own writer writes NaN, which is not valid JSON."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "valid_loss": NaN}\n')
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["valid_loss"])
    RunDirectory(tmp_path).create("", first_step=1)
    line = read_strictly((tmp_path / "metrics.jsonl").read_text())
    assert line == {"kind": "valid", "step": 1, "valid_loss": None, "not_finite": {"valid_loss": "nan"}}


KINDS = {
    '{"step": 1, "loss": 0.5, "phase": 0}': "step",
    '{"step": 1, "valid_loss": 0.5}': "valid",
    '{"step": 1, "expert_load_max": [1.0]}': "experts",
    '{"step": 1, "switched_to_bag_size": 1}': "switch",
    '{"step": 1, "recovery_steps": null}': "recovery",
    '{"step": 1, "skipped_loss": "nan"}': "skipped",
    '{"kind": "valid", "step": 1}': "valid",
}


@pytest.mark.parametrize("line", KINDS)
def test_every_line_has_a_kind_in_old_and_new_files(tmp_path: Path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["kind"] == KINDS[line]


@pytest.mark.parametrize("line", ["5", "[]", '{"step": 1, "not_finite": 3}', '{"not_finite": {"loss": "many"}}'])
def test_a_line_that_is_not_an_object_is_damaged(tmp_path: Path, line):
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n")
    with pytest.raises(UserError, match="line 1 is damaged"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_a_command_that_is_not_utf8_is_recorded(tmp_path: Path, monkeypatch):
    """Python stores such bytes of arguments as lone surrogates, which neither UTF-8 nor strict JSON can represent."""
    monkeypatch.setattr(sys, "argv", ["pretrain_tst.py", "--save", "caf\udce9"])
    RunDirectory(tmp_path).create("", 0)
    recorded = read_strictly((tmp_path / "versions.json").read_text())
    assert recorded["command"] == r"pretrain_tst.py --save caf\udce9"


def test_a_used_run_directory_is_refused(tmp_path: Path):
    directory = RunDirectory(tmp_path / "run")
    directory.occupy()
    directory.refuse_used()
    directory.create("model: {}\n", 0)
    assert directory.config.read_text() == "model: {}\n"
    recorded = json.loads((tmp_path / "run" / "versions.json").read_text())
    assert recorded["megatron-core"] == importlib.metadata.version("megatron-core")
    directory.metrics.write_text("")
    with pytest.raises(UserError, match="already holds a run"):
        directory.refuse_used()


def test_a_resumed_run_drops_the_metrics_of_repeated_steps(tmp_path: Path):
    directory = RunDirectory(tmp_path)
    lines = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.30000000000000004}, {"step": 3, "loss": 0.2}]
    directory.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo')
    directory.create("", first_step=2)
    # Lines without a kind, from older versions, get one.
    assert directory.metrics.read_text() == "".join(json.dumps({"kind": "step", **line}) + "\n" for line in lines[:2])
    directory.create("", first_step=0)
    assert directory.metrics.read_text() == ""


def occupy_elsewhere(path: Path) -> subprocess.CompletedProcess:
    """Occupy a run directory from another process."""
    program = (
        "import sys; from pathlib import Path; from megatron_tst.telemetry import RunDirectory; "
        "RunDirectory(Path(sys.argv[1])).occupy()"
    )
    return subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True)


def test_two_runs_cannot_share_a_directory(tmp_path: Path):
    directory = RunDirectory(tmp_path)
    directory.occupy()
    (tmp_path / "metrics.jsonl").write_text("")
    assert "another run is using it" in occupy_elsewhere(tmp_path).stderr
    # A forked worker keeps the file open, but does not hold the lock.
    context = multiprocessing.get_context("fork")
    ended = context.Event()
    worker = context.Process(target=ended.wait)
    worker.start()
    directory.leave()
    done = occupy_elsewhere(tmp_path)
    ended.set()
    worker.join()
    assert done.returncode == 0, done.stderr


def test_leaving_removes_an_unused_new_directory(tmp_path: Path):
    directory = RunDirectory(tmp_path / "run")
    directory.occupy()
    directory.leave()
    assert not (tmp_path / "run").exists()


def test_an_unwritable_run_directory_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        RunDirectory(tmp_path / "file" / "run").occupy()


def test_short_formats_counts_with_a_suffix():
    assert [short(n) for n in (950, 12_300, 4_500_000, 2.1e9)] == ["950", "12.3k", "4.5M", "2.1B"]


def test_a_run_without_metrics_is_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no metrics"):
        read_curve(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="holds no config"):
        read_curve(tmp_path)
    (tmp_path / "config.yaml").write_text("model: {}\n")
    with pytest.raises(UserError, match="no logged step"):
        read_curve(tmp_path)
