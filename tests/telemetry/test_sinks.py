"""Lines reach the real TensorBoard and the real wandb; a service that hangs or fails never blocks a run."""

import json
import struct
import threading
from pathlib import Path

import pytest

from megatron_tst.config import UserError
from megatron_tst.telemetry import ExpertMetrics, read_metrics, versions
from megatron_tst.telemetry.sinks import BackgroundSink, check_sinks, numbers
from tests.telemetry.lines import STEP
from tests.training.runs import arguments, start, train_here

pytest.importorskip("tensorboard", reason="the extra wandb brings tensorboard and wandb")
wandb = pytest.importorskip("wandb")
RUN = "--tst-bag-size 4 --tst-steps 4"


class Recording:
    def __init__(self):
        self.lines, self.is_closed = [], False

    def write(self, values):
        self.lines.append(values)

    def close(self):
        self.is_closed = True


def test_lines_arrive_in_order():
    writer = Recording()
    sink = BackgroundSink("test", lambda: writer)
    for step in range(100):
        sink.offer({"step": step})
    sink.close()
    assert [line["step"] for line in writer.lines] == list(range(100))
    assert writer.is_closed


def test_a_hanging_service_drops_lines_and_warns_once(caplog):
    free = threading.Event()
    sink = BackgroundSink("test", lambda: free.wait() and Recording(), capacity=3)
    for step in range(10):
        sink.offer({"step": step})
    assert caplog.text.count("test is too slow") == 1
    sink.close(timeout_s=0.01)
    assert "test missed 10 lines" in caplog.text
    free.set()


class Dying(Recording):
    def write(self, values):
        raise ConnectionError("the network is gone")


def test_a_failing_service_is_reported_and_dropped(caplog):
    sink = BackgroundSink("test", Dying)
    for step in range(10):
        sink.offer({"step": step})
    sink.close()
    assert "test: the network is gone; the run continues without it" in caplog.text


class FailingAtTheEnd(Recording):
    def close(self):
        raise ConnectionError("the network is gone")


def test_a_service_that_fails_at_the_end_does_not_block_the_close(caplog):
    sink = BackgroundSink("test", FailingAtTheEnd)
    sink.offer({"step": 1})
    sink.close()
    assert "test: the network is gone" in caplog.text
    assert not sink.is_running
    assert "missed" not in caplog.text


def test_lists_and_mappings_become_numbers():
    assert numbers(ExpertMetrics(3, [1.5, 2.0], [0.5, 0.0], [0.0, 0.25])) == {
        "step": 3, "expert_load_max/layer0": 1.5, "expert_load_max/layer1": 2.0,
        "expert_load_min/layer0": 0.5, "expert_load_min/layer1": 0.0, "dropped_share/layer0": 0.0,
        "dropped_share/layer1": 0.25,
    }  # fmt: skip
    assert numbers(STEP)["lr_by_group/no_decay"] == STEP.lr


def test_a_missing_package_is_named(monkeypatch):
    from megatron_tst.config import LoggingSettings

    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    check_sinks(LoggingSettings())
    with pytest.raises(UserError, match="--wandb-project p: needs the package wandb"):
        check_sinks(LoggingSettings(wandb_project="p"))


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}


def test_tensorboard_reads_the_run_over_a_restart(here, corpus, tokenizer, tmp_path: Path):
    extra = f"{RUN} --tensorboard-dir {tmp_path / 'events'}"
    train_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", f"{extra} --exit-interval 5"))
    load = f"--load {tmp_path / 'run' / 'checkpoints'}"
    run = train_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", f"{extra} {load}"))
    shown, lines = scalars(tmp_path / "events"), read_metrics(run.directory.metrics)
    for name in ("loss", "lr", "grad_norm", "bag_size", "switched_to_bag_size"):
        assert shown[name] == {line["step"]: pytest.approx(line[name], rel=1e-6) for line in lines if name in line}
    assert scalars(tmp_path / "events" / "by_data_tokens")["loss"] == {
        line["data_tokens"]: pytest.approx(line["loss"], rel=1e-6) for line in lines if "loss" in line
    }
    by_positions = scalars(tmp_path / "events" / "by_positions")["valid_loss"]
    assert set(by_positions) == {line["positions"] for line in lines if "valid_loss" in line}


def records(file: Path) -> list[bytes]:
    """Return the records of wandb's file, in LevelDB's log format: 32 KiB blocks after a header of seven bytes."""
    data, found, place = file.read_bytes(), [], 7
    while place + 7 <= len(data):
        if (1 << 15) - place % (1 << 15) < 7:
            place += (1 << 15) - place % (1 << 15)
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + 7 : place + 7 + length]
        # The block holds a whole record, or its first, middle or last part.
        found = [*found, part] if kind in (1, 2) else [*found[:-1], found[-1] + part]
        place += 7 + length
    return found


def kept(folder: Path, kind: str) -> list:
    """Return an offline run's records of one kind; each start of the run has its own file."""
    from wandb.proto import wandb_internal_pb2

    found = []
    for file in sorted(folder.glob("wandb/offline-run-*/run-*.wandb")):
        for data in records(file):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.WhichOneof("record_type") == kind:
                found.append(getattr(record, kind))
    return found


def history(folder: Path) -> list[dict]:
    """Return the metric lines among the records."""
    return [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in line.item}
        for line in kept(folder, "history")
    ]


def test_wandb_records_offline_without_a_key(here, corpus, tokenizer, tmp_path: Path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    extra = f"{RUN} --wandb-project tst"
    train_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", f"{extra} --exit-interval 5"))
    identity = (tmp_path / "run" / "wandb_run_id").read_text()
    load = f"--load {tmp_path / 'run' / 'checkpoints'}"
    run = train_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", f"{extra} {load}"))
    assert (tmp_path / "run" / "wandb_run_id").read_text() == identity
    assert len(list((tmp_path / "run" / "wandb").glob(f"offline-run-*-{identity}"))) >= 1
    wandb.teardown()  # makes wandb's helper process write the last lines
    lines = read_metrics(run.directory.metrics)
    shown = history(tmp_path / "run")
    for name in ("loss", "valid_loss", "switched_to_bag_size", "recovery_steps"):
        assert {line["step"]: line[name] for line in shown if name in line} == {
            line["step"]: line[name] for line in lines if name in line
        }
    assert [line["step"] for line in shown if "switched_to_bag_size" in line] == [5]
    # Both token counts are axes, and each start records the settings and the versions.
    axes = {metric.name for metric in kept(tmp_path / "run", "metric")}
    assert {"step", "data_tokens", "positions"} <= axes
    starts = [
        {item.key: json.loads(item.value_json) for item in start.config.update}
        for start in kept(tmp_path / "run", "run")
    ]
    assert [start["superposition"]["tst_bag_size"] for start in starts] == [4, 4]
    assert all(start["versions"]["git"] == versions()["git"] for start in starts)


def test_an_unreachable_wandb_server_does_not_stop_a_run(corpus, tokenizer, tmp_path: Path, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    argv = arguments(corpus, str(tokenizer.path), tmp_path / "run", f"{RUN} --wandb-project tst")
    # Nothing listens on this port.
    done = start("pretrain_tst.py", *argv, WANDB_API_KEY="a" * 40, WANDB_BASE_URL="http://127.0.0.1:9")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "the run continues without it" in line]
    assert "WARNING: Weights & Biases: Failed to authenticate" in line
    lines = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 9))
    assert f"Weights & Biases missed {len(lines)} lines; metrics.jsonl has them" in done.stderr
