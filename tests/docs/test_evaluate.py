"""examples/evaluate on a small exported model."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_tst.conversion.saved_checkpoints import find_saved_checkpoint
from megatron_tst.conversion.to_hugging_face import EndOfDocument, Export
from tests.checkpoint.saved import save_here
from tests.training.runs import start

ROOT = Path(__file__).parents[2]
EVALUATE = ROOT / "examples/evaluate"


@pytest.fixture
def hugging_face(rank, tokenizer, tmp_path) -> Path:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    save_here(tmp_path / "checkpoints", "qwen3", str(tokenizer.path), rank)
    export = Export(find_saved_checkpoint(tmp_path / "checkpoints", None))
    export.write(tmp_path / "hf", tokenizer.path, EndOfDocument(tokenizer.eod, "<|endoftext|>"), 10**9)
    return tmp_path / "hf"


def test_a_model_continues_a_text(hugging_face):
    for extra in ((), ("--temperature", "1", "--seed", "3")):
        done = start("examples/evaluate/generate.py", str(hugging_face), "def main(", "--tokens", "5", *extra)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("def main(") and len(done.stdout) > len("def main(\n")


def test_the_harness_loads_the_local_task(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed: it is optional and heavy")
    code = (
        "from lm_eval.tasks import TaskManager\n"
        "task = TaskManager(include_path='examples/evaluate').load('python_endings')['tasks']['python_endings']\n"
        "print(len(list(task.validation_docs())))\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.splitlines()[-1]) == len((EVALUATE / "python_endings.jsonl").read_text().splitlines())
