"""convert_ckpt.py as a user starts it: one of our runs to Hugging Face, and from there to another run."""

import importlib.util
import io
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from megatron_tst.config import UserError
from megatron_tst.telemetry import read_metrics
from tests.training.runs import ROOT, arguments, start

pytest.importorskip("transformers", reason="the extra hf is not installed")

RUN = "--tst-bag-size 2 --tst-steps 2 --train-iters 4 --eval-interval 2 --use-distributed-optimizer --bf16"


@pytest.fixture(scope="module")
def trained(corpus, tokenizer, tmp_path_factory) -> Path:
    """A run with checkpoints at the switch (step 2) and at the end (step 4)."""
    folder = tmp_path_factory.mktemp("run")
    done = start("pretrain_tst.py", *arguments(corpus, str(tokenizer.path), folder, RUN))
    assert done.returncode == 0, done.stderr
    return folder


def convert(*argv: object):
    return start("tools/convert_ckpt.py", *map(str, argv))


@pytest.fixture
def convert_here(monkeypatch):
    """The program's main function, called in this process to save the time of starting one."""
    spec = importlib.util.spec_from_file_location("convert_ckpt", ROOT / "tools" / "convert_ckpt.py")
    program = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "convert_ckpt", program)  # dataclasses look up their module there
    spec.loader.exec_module(program)

    def run(*argv: object):
        monkeypatch.setattr(sys, "argv", ["convert_ckpt.py", *map(str, argv)])
        program.main(program.parse_arguments())

    run.program = program
    return run


def logit_difference(output: str) -> float:
    found = re.search(r"largest logit difference (\S+) .* same most likely token at (\d+) of (\d+)", output)
    assert found, output
    assert found[2] == found[3] != "0"
    return float(found[1])


def test_a_run_is_exported_and_imported_into_another_run(trained, corpus, tokenizer, tmp_path):
    load = ("--load", trained / "checkpoints", "--iteration", 2)
    done = convert(*load, "--save", tmp_path / "hf", "--verify")
    assert done.returncode == 0, done.stderr
    assert logit_difference(done.stdout) < 1e-5
    assert not done.stderr
    back = ("--direction", "hf-to-megatron", "--load", tmp_path / "hf", "--save", tmp_path / "weights")
    done = convert(*back, "--verify-text", __file__)
    assert done.returncode == 0, done.stderr
    assert logit_difference(done.stdout) < 1e-5
    load = f"--load {tmp_path / 'weights'} --finetune --bf16 --train-iters 1 --lr 1e-9 --lr-warmup-iters 0"
    done = start("pretrain_tst.py", *arguments(corpus, str(tokenizer.path), tmp_path / "next", load))
    assert done.returncode == 0, done.stderr
    # The learning rate is so small that the loss is that of the initial weights.
    started = read_metrics(tmp_path / "next" / "metrics.jsonl")[-1]["valid_loss"]
    at_switch, at_end = (m["valid_loss"] for m in read_metrics(trained / "metrics.jsonl") if "valid_loss" in m)
    assert started == pytest.approx(at_switch, abs=1e-3)
    assert abs(at_end - at_switch) > 1e-2


def test_max_shard_size_and_dtype_are_respected(trained, tmp_path, convert_here):
    load = ("--load", trained / "checkpoints", "--save", tmp_path / "hf")
    convert_here(*load, "--max-shard-size", "20KB", "--dtype", "fp16")
    shards = sorted(path.name for path in (tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) > 2 and all((tmp_path / "hf" / shard).stat().st_size < 25_000 for shard in shards)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float16"
    with pytest.raises(UserError, match="is not empty; --force replaces it"):
        convert_here(*load)
    assert sorted(path.name for path in (tmp_path / "hf").glob("model-*.safetensors")) == shards
    convert_here(*load, "--force")
    assert [shard.name for shard in (tmp_path / "hf").glob("*.safetensors")] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--load RUN/checkpoints --iteration 3", r"--iteration 3: \S+ holds \[2, 4\]"),
        (
            "--load RUN/checkpoints --tokenizer RUN/nowhere",
            r"nowhere holds no tokenizer\.json: .* --tokenizer",
        ),
        (
            "--load RUN/checkpoints --tokenizer RUN/large.json",
            r"--tokenizer \S+: has 301 tokens, but the model has 300",
        ),
        ("--load RUN/checkpoints --max-shard-size 5boxes", "--max-shard-size 5boxes: must be a number of bytes"),
        ("--load RUN/checkpoints --max-shard-size 0GB", "--max-shard-size 0GB: must be a number of bytes"),
        ("--load RUN/checkpoints --verify-text RUN/nowhere", r"--verify-text \S+: cannot be read"),
        ("--load RUN/checkpoints --verify-text /dev/null", "--verify-text /dev/null: holds no token"),
        ("--load RUN/checkpoints --verify-tolerance nan", "--verify-tolerance nan: must be above 0"),
        ("--load RUN/checkpoints --direction hf-to-megatron", "is not a Hugging Face folder"),
        ("--load RUN --direction hf-to-megatron --iteration 1", "--iteration 1: a Hugging Face folder has no"),
        ("--load RUN", "is a run directory: name RUN/checkpoints"),
        ("--load RUN/checkpoints/iter_0000002", "is a single checkpoint: .* with --iteration"),
        ("--load RUN/large.json", r"large\.json: is not a directory"),
        ("--load RUN/nowhere", "nowhere: holds no checkpoints"),
    ],
)
def test_mistakes_are_named_and_leave_no_files(trained, tokenizer, tmp_path, convert_here, argv, message):
    larger = json.loads(tokenizer.path.read_text())
    larger["added_tokens"].append({**larger["added_tokens"][0], "id": 3999, "content": "<|far|>"})
    (trained / "large.json").write_text(json.dumps(larger))
    with pytest.raises(UserError, match=message.replace("RUN", str(trained))):
        convert_here(*argv.replace("RUN", str(trained)).split(), "--save", tmp_path / "out")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("tracker", "said"), [("", "is missing or names no step"), ("3", "names step 3")])
def test_a_tracker_without_a_valid_step_requires_iteration(trained, tmp_path, convert_here, tracker, said):
    checkpoints = Path(shutil.copytree(trained / "checkpoints", tmp_path / "checkpoints"))
    (checkpoints / "latest_checkpointed_iteration.txt").write_text(tracker)
    instead = r"and the folder holds checkpoints of the steps \[2, 4\]: choose one with --iteration"
    with pytest.raises(UserError, match=f"latest_checkpointed_iteration.txt {said}, {instead}"):
        convert_here("--load", checkpoints, "--save", tmp_path / "hf")
    convert_here("--load", checkpoints, "--save", tmp_path / "hf", "--iteration", 2)


def test_a_mistake_prints_one_line_and_exits_with_two(trained, tmp_path):
    done = convert("--load", trained, "--save", tmp_path / "out")
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("convert_ckpt.py: error: ") and done.stderr.count("\n") == 1


def test_a_write_error_prints_one_line_and_leaves_no_files(trained, tmp_path):
    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "tools/convert_ckpt.py", "--load", trained / "checkpoints", "--save", tmp_path / "hf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, preexec_fn=small_files)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "cannot be written: File too large" in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.fixture
def damaged(trained, tmp_path) -> Path:
    """The run's checkpoints with one bit flipped in the middle of a shard's weights."""
    checkpoints = Path(shutil.copytree(trained / "checkpoints", tmp_path / "damaged"))
    shard = max((checkpoints / "iter_0000004").glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    return checkpoints


def test_a_damaged_checkpoint_is_refused_without_no_verify_checkpoint(damaged, tmp_path, convert_here):
    argv = ("--load", damaged, "--save", tmp_path / "hf")
    with pytest.raises(UserError, match=r"distcp is damaged: its bytes do not match .*; --no-verify-checkpoint"):
        convert_here(*argv)
    assert not (tmp_path / "hf").exists()
    convert_here(*argv, "--iteration", 2)
    convert_here(*argv, "--force", "--no-verify-checkpoint")


def test_verification_and_conversion_show_their_progress(trained, tmp_path, convert_here, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(convert_here.program, "Console", lambda **_: Console(file=screen, force_terminal=True))
    convert_here("--load", trained / "checkpoints", "--save", tmp_path / "hf")
    for title in ("verifying iter_0000004", "iter_0000004 to Hugging Face"):
        # Both progress bars reached their total, in bytes.
        last = screen.getvalue().rpartition(title)[2].splitlines()[0]
        done, total = re.search(r"([\d.]+)/([\d.]+) [kM]?B", last).groups()
        assert done == total != "0", last


def test_settings_that_are_lost_are_warned_about(trained, tmp_path, convert_here, capsys, monkeypatch):
    from megatron_tst.config import ModelSettings

    monkeypatch.setattr(convert_here.program, "inexpressible", lambda model: [f"lost of {type(model).__name__}"])
    convert_here("--load", trained / "checkpoints", "--save", tmp_path / "hf")
    assert capsys.readouterr().err == f"convert_ckpt.py: warning: lost of {ModelSettings.__name__}\n"
