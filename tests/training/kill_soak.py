"""Kill a run again and again, in the middle of saves too, and see that its curve is the undisturbed one.

python -m tests.training.kill_soak [--kills 20]
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from megatron_tst.data.documents import Skipped, list_inputs, read_documents
from megatron_tst.data.preprocess import write_indexed
from megatron_tst.data.tokenizer import train_bpe
from megatron_tst.telemetry import read_metrics
from tests.corpora import FILES
from tests.training.runs import ROOT, arguments, real_text

# A save after every second step, written while training goes on.
RUN = (
    "--tst-bag-size 4 --tst-step-ratio 0.4 --attention-dropout 0.1 --hidden-dropout 0.1 --save-interval 2 --async-save "
    "--keep-last 3 --eval-interval 1000 --num-workers 1"
)


def soak(corpus: str, tokenizer: str, folder: Path, kills: int, seed: int = 1) -> Counter:
    """Train once undisturbed and once killed ``kills`` times.

    Returns:
        How often the run was killed within a save, and within a step.

    Raises:
        AssertionError: if a start does not resume, or the curves differ.
    """
    # Long enough that the run is still going when it is killed for the last time.
    length = f"--train-iters {40 * (kills + 1)}"
    calm = arguments(corpus, tokenizer, folder / "calm", f"{RUN} {length}")
    harried = arguments(corpus, tokenizer, folder / "run", f"{RUN} {length} --load {folder / 'run' / 'checkpoints'}")
    assert _start(calm).wait() == 0
    generator, moments = random.Random(seed), Counter()
    for number in range(kills):
        moments[_kill_once(harried, folder / "run", generator, in_save=number % 2 == 0)] += 1
    assert _start(harried).wait() == 0
    assert _curve(folder / "run") == _curve(folder / "calm")
    return moments


def _start(argv: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "pretrain_tst.py", *argv], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL
    )


def _kill_once(argv: list[str], run: Path, generator: random.Random, in_save: bool) -> str:
    """Start the run and kill it in the first save that is seen, or after a random number of new lines."""
    first, steps = _last_step(run), generator.randint(1, 30)
    process = _start(argv)
    while True:
        partial = list((run / "checkpoints").glob(".partial-*")) if (run / "checkpoints").exists() else []
        # What an earlier kill left half-written lies there until the same step is saved again: wait for new lines.
        if _last_step(run) >= first + steps or (in_save and partial and _last_step(run) > first):
            process.kill()
            process.wait()
            return "save" if in_save and partial else "step"
        try:
            code = process.wait(timeout=0.001)
        except subprocess.TimeoutExpired:
            continue
        raise AssertionError(f"the run ended by itself, with code {code}")


def _last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    return lines[-1]["step"] if lines else 0


def _curve(run: Path) -> list[tuple]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    return [(line["step"], line["bag_size"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def main() -> None:
    """Make a corpus, soak, and say what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    kills = parser.parse_args().kills
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = (Path(file).read_text(encoding="utf-8") for file in FILES)
        tokenizer = train_bpe(texts, 300, folder / "tokenizer.json")
        documents = read_documents(list_inputs(real_text(folder / "text")), "text", Skipped())
        corpus = str(write_indexed(documents, tokenizer, folder / "corpus").prefix)
        moments = soak(corpus, str(tokenizer.path), folder, kills)
    print(f"killed {moments['save']} times within a save, {moments['step']} times within a step: the curve is the same")


if __name__ == "__main__":
    main()
