"""A small run whose losses and checkpoints were recorded with each supported version of megatron-core.

``tests/checkpoint/recorded/VERSION/`` was made with VERSION installed by

    python -m tests.checkpoint.recorded_run

and holds ``metrics.json`` and the checkpoint after step 4, saved by two tensor-parallel times two data-parallel ranks
with the distributed optimizer.
"""

import importlib.metadata
import json
import shutil
import tempfile
from pathlib import Path

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.data.tokenizer import train_bpe
from tests.corpora import write_corpus
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout

RECORDED = Path(__file__).parent / "recorded"
SAVED_STEP = 4
ONE_RANK = "--use-distributed-optimizer"
TWO_RANKS = f"{ONE_RANK} --tensor-model-parallel-size 2"
RUN = (
    "--num-layers 1 --hidden-size 8 --ffn-hidden-size 16 --num-attention-heads 2 --seq-length 16 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --disable-bias-linear --attention-dropout 0 "
    "--hidden-dropout 0 --make-vocab-size-divisible-by 2 --use-cpu-initialization --micro-batch-size 2 "
    "--global-batch-size 4 --train-iters 8 --lr 1e-2 --lr-warmup-iters 2 --lr-decay-style cosine --eval-interval 8 "
    "--eval-iters 1 --log-interval 1 --num-workers 0 --split 90,10,0 --tst-bag-size 4 --tst-steps 6"
)


def arguments(folder: Path, name: str, flags: str) -> list[str]:
    """Return the command line of the run, with a corpus and a tokenizer that are the same everywhere."""
    words = [f"{first}{second}" for first in "abcdefghij" for second in "klmnopqrst"]
    tokenizer = folder / "tokenizer.json"
    if not tokenizer.exists():
        train_bpe([" ".join(words)], 280, tokenizer)
        documents = [[(7 * place * place + 31 * number) % 280 for place in range(40)] for number in range(60)]
        write_corpus(folder / "corpus", documents, 280)
    files = ["--data-path", str(folder / "corpus"), "--tokenizer-model", str(tokenizer)]
    return [*RUN.split(), *flags.split(), *files, "--tst-run-dir", str(folder / name)]


def record(version: str) -> None:
    """Train and record the checkpoint and the metrics."""
    with tempfile.TemporaryDirectory() as temporary:
        argv = arguments(Path(temporary), "run", f"{TWO_RANKS} --save-interval {SAVED_STEP}")
        outcome = run_distributed(train_layout, 4, argv)[0]
        saved, kept = (
            CheckpointFolders(folder) for folder in (Path(temporary) / "run/checkpoints", RECORDED / version)
        )
        shutil.rmtree(kept.path, ignore_errors=True)
        shutil.copytree(saved.of(SAVED_STEP), kept.of(SAVED_STEP))
        kept.point_to(SAVED_STEP)
    metrics = {"loss": outcome.losses, "grad_norm": outcome.grad_norms, "valid": outcome.valid}
    (kept.path / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")


if __name__ == "__main__":
    record(importlib.metadata.version("megatron-core"))
