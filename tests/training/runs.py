"""Starts whole runs, in this process or as a user does."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from megatron_tst.config import RunConfig, parse_config
from megatron_tst.distributed import get_parallel_state
from megatron_tst.training import build_run, train
from tests.corpora import FILES

ROOT = Path(__file__).parents[2]
MODEL = (
    "--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --seq-length 16 --swiglu "
    "--normalization RMSNorm --position-embedding-type rope --untie-embeddings-and-output-weights "
    "--disable-bias-linear --attention-dropout 0 --hidden-dropout 0 --make-vocab-size-divisible-by 1"
).split()
TRAINING = (
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 8 --lr 1e-2 --lr-warmup-iters 2 --lr-decay-style cosine "
    "--eval-interval 4 --eval-iters 2 --log-interval 1 --num-workers 0 --split 90,10,0"
).split()


def arguments(corpus: str, tokenizer: str, run_dir: Path, extra: str = "") -> list[str]:
    """The command line of a small run."""
    files = ["--data-path", corpus, "--tokenizer-model", tokenizer, "--tst-run-dir", str(run_dir)]
    return [*MODEL, *TRAINING, *files, *extra.split()]


def start(*argv: str, timeout_s: int = 900, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program of the project as a user does."""
    command = [sys.executable, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout_s)


def real_text(folder: Path, copies: int = 10) -> list[str]:
    """Return files of real text with several documents."""
    folder.mkdir(exist_ok=True)
    for number in range(copies):
        for file in FILES:
            text = Path(file).read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / f"{number}-{Path(file).parent.name}-{Path(file).name}").write_text("".join(text[number::copies]))
    return [str(folder)]


def config_of(argv: list[str]) -> RunConfig:
    return parse_config(argv)


def build_here(argv: list[str]):
    """Build a run in this process, which has already joined the process groups."""
    return build_run(parse_config(argv), get_parallel_state())


def train_here(argv: list[str]):
    """Train in this process, which has already joined the process groups; return the run."""
    run = build_here(argv)
    train(run)
    return run


def parameters(run) -> dict[str, torch.Tensor]:
    return {
        name: p.detach().clone() for chunk in run.stepper.train_state.chunks for name, p in chunk.named_parameters()
    }
