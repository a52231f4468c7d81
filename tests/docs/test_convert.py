"""The commands at the top of docs/convert.md, run literally on a small run with the quickstart's settings."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tst.telemetry import read_metrics

ROOT = Path(__file__).parents[2]
# The learning rate is so small that the final loss is that of the initial weights.
SHORT = (
    "--train-iters 1 --lr 1e-9 --lr-warmup-iters 0 --lr-wsd-decay-iters 1 --micro-batch-size 2 --split 80,20,0 "
    "--eval-iters 4"
)
TRAINED = SHORT.replace("--train-iters 1 --lr 1e-9", "--train-iters 40 --lr 1e-2")


@pytest.fixture
def place(corpus, tokenizer, tmp_path: Path) -> Path:
    """A folder with the files that the commands name: the programs and the quickstart's text."""
    for name in ("pretrain_tst.py", "tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    data = tmp_path / "data" / "quickstart"
    data.mkdir(parents=True)
    shutil.copy(tokenizer.path, data / "tokenizer.json")
    for ending in (".bin", ".idx"):
        shutil.copy(f"{corpus}{ending}", data / f"packages_text_document{ending}")
    return tmp_path


def run(command: str, place: Path) -> subprocess.CompletedProcess[str]:
    program, *arguments = shlex.split(command)
    assert program == "python"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=place, env=environment, capture_output=True, text=True, timeout=1200
    )


def final_loss(place: Path, folder: str) -> float:
    return read_metrics(place / folder / "metrics.jsonl")[-1]["valid_loss"]


def test_the_commands_of_the_document_run_in_order(place):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    block = re.search(r"```\n(.*?)```", (ROOT / "docs" / "convert.md").read_text(), re.DOTALL)
    export, back, finetune = block[1].strip().splitlines()
    quickstart = "python pretrain_tst.py --config examples/quickstart/config.yaml"
    commands = [f"{quickstart} --tst-run-dir runs/quickstart-seed1/tst {TRAINED}", export, back, f"{finetune} {SHORT}"]
    for command in commands:
        done = run(command, place)
        assert done.returncode == 0, f"{command}\n{done.stderr}"
    source = final_loss(place, "runs/quickstart-seed1/tst")
    assert final_loss(place, "runs/quickstart/tst") == pytest.approx(source, abs=1e-4)
    # Negative control: weights that were not loaded would predict nearly uniformly among 300 tokens, at 5.7 nats.
    assert source < 5.0
    done = run(f"{finetune} {SHORT} --tst-run-dir runs/other --rotary-base 20", place)
    assert done.returncode == 2 and "--rotary-base 20: the checkpoint was made with 10000" in done.stderr
    assert not (place / "runs/other").exists()
    # The import writes the settings of its model.
    imported = "--config weights/quickstart/iter_0000000/config.yaml --load weights/quickstart --finetune"
    text = "--data-path data/quickstart/packages_text_document --seq-length 128 --seed 1 --tst-run-dir runs/imported"
    done = run(f"python pretrain_tst.py {imported} {text} {SHORT} --lr-decay-style WSD", place)
    assert done.returncode == 0, done.stderr
    assert final_loss(place, "runs/imported") == pytest.approx(source, abs=1e-4)
