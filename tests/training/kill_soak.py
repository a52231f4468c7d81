"""Kills a run repeatedly, also in the middle of saves, and checks that its curve equals an undisturbed run's.

python -m tests.training.kill_soak [--kills 20] [--kind overlapped]
"""

import argparse
import contextlib
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

import pretrain_tst
from megatron_tst.config import parse_config
from megatron_tst.conversion.torch_dist import StackedWeights
from megatron_tst.data.documents import Skipped, list_inputs, read_documents
from megatron_tst.data.preprocess import write_indexed
from megatron_tst.data.tokenizer import train_bpe
from megatron_tst.telemetry import read_metrics
from tests.corpora import FILES
from tests.distributed.launch import forking_context, open_store
from tests.training.runs import arguments, real_text

# Every second step saves a checkpoint, which is written while training continues.
RUN = (
    "--tst-bag-size 4 --tst-step-ratio 0.4 --attention-dropout 0.1 --hidden-dropout 0.1 --save-interval 2 --async-save "
    "--keep-last 3 --eval-interval 1000 --num-workers 1"
)
# Upper bound, counted from the last line of the previous start.
STEPS_PER_KILL = 20
# kind: (ranks, flags)
KINDS = {
    "single": (1, RUN),
    # Such small buckets end after nearly every parameter and are padded after each norm.
    "overlapped": (
        2,
        f"{RUN} --bf16 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 200",
    ),
}


def soak(corpus: str, tokenizer: str, folder: Path, kills: int, kind: str = "single", seed: int = 1) -> Counter:
    """Train once undisturbed and once with all ranks killed ``kills`` times.

    Returns:
        The number of kills during a save and during a step.

    Raises:
        AssertionError: if a start does not resume, or the curves or the last checkpoints differ.
    """
    world_size, flags = KINDS[kind]
    # The run is so long that it is still training when it is killed for the last time.
    length = f"--train-iters {STEPS_PER_KILL * (kills + 1)}"
    calm = arguments(corpus, tokenizer, folder / "calm", f"{flags} {length}")
    harried = arguments(corpus, tokenizer, folder / "run", f"{flags} {length} --load {folder / 'run' / 'checkpoints'}")
    _finish(calm, world_size)
    generator, moments = random.Random(seed), Counter()
    for number in range(kills):
        moments[_kill_once(harried, world_size, folder / "run", generator, in_save=number % 2 == 0)] += 1
    _finish(harried, world_size)
    assert _curve(folder / "run") == _curve(folder / "calm")
    found, wanted = _last_tensors(folder / "run"), _last_tensors(folder / "calm")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    return moments


def _rank(argv: list[str], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())
    sys.exit(pretrain_tst.main(parse_config(argv)))


@contextlib.contextmanager
def _started(argv: list[str], world_size: int) -> Iterator[list[BaseProcess]]:
    """Start all ranks; kill those that still run at the end."""
    store, context = open_store(), forking_context()
    environment = {
        "OMP_NUM_THREADS": "1", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
    }  # fmt: skip
    ranks = [
        context.Process(target=_rank, args=(argv, {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}))
        for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()
        for rank in ranks:
            rank.join()


def _finish(argv: list[str], world_size: int) -> None:
    with _started(argv, world_size) as ranks:
        for rank in ranks:
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0] * world_size


def _kill_once(argv: list[str], world_size: int, run: Path, generator: random.Random, in_save: bool) -> str:
    """Start the run and kill it in the first save that is observed, or after a random number of new lines."""
    first = _last_step(run)
    steps = STEPS_PER_KILL - 2 if in_save else generator.randint(1, STEPS_PER_KILL // 2)
    with _started(argv, world_size) as ranks:
        while True:
            partial = list((run / "checkpoints").glob(".partial-*")) if (run / "checkpoints").exists() else []
            # Files that an earlier kill left half-written stay until the same step is saved again, so wait for lines.
            if _last_step(run) >= first + steps or (in_save and partial and _last_step(run) > first):
                return "save" if in_save and partial else "step"
            ranks[0].join(timeout=0.001)
            if ranks[0].exitcode is not None:
                raise AssertionError(f"the run ended by itself, with code {ranks[0].exitcode}")


def _last_step(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = read_metrics(metrics) if metrics.exists() else []
    return lines[-1]["step"] if lines else 0


def _curve(run: Path) -> list[tuple]:
    lines = [line for line in read_metrics(run / "metrics.jsonl") if "loss" in line]
    return [(line["step"], line["bag_size"], line["loss"], line["grad_norm"], line["lr"]) for line in lines]


def _last_tensors(run: Path) -> dict[str, torch.Tensor]:
    stored = StackedWeights(max((run / "checkpoints").glob("iter_*")))
    return {key: stored.read(key, ()) for key in stored.entries}


def main() -> None:
    """Make a corpus, run the soak test and print its outcome."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kind", choices=KINDS, default="single")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = (Path(file).read_text(encoding="utf-8") for file in FILES)
        tokenizer = train_bpe(texts, 300, folder / "tokenizer.json")
        documents = read_documents(list_inputs(real_text(folder / "text")), "text", Skipped())
        corpus = str(write_indexed(documents, tokenizer, folder / "corpus").prefix)
        moments = soak(corpus, str(tokenizer.path), folder, options.kills, options.kind)
    print(
        f"killed {moments['save']} times within a save, {moments['step']} times within a step: the curve and the last "
        "checkpoint are the same"
    )


if __name__ == "__main__":
    main()
