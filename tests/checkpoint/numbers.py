"""Print the exact numbers that a small run computes under several layouts, to compare two environments:

    python3.11 -m venv OLD && OLD/bin/pip install torch==2.14.1 megatron-core==0.16.1 --editable '.[dev]'
    diff <(OLD/bin/python -m tests.checkpoint.numbers) <(.venv-3.12/bin/python -m tests.checkpoint.numbers)

``numbers.json`` is a recorded output.
"""

import json
import sys
import tempfile
from pathlib import Path

from tests.checkpoint.recorded_run import ONE_RANK, TWO_RANKS, arguments
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout

NUMBERS = Path(__file__).with_suffix(".json")
EXPERTS = (
    "--num-experts 4 --moe-router-topk 2 --moe-ffn-hidden-size 8 --moe-aux-loss-coeff 0.01 --moe-z-loss-coeff 0.001 "
    "--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
)
# Ranks and flags.
LAYOUTS: dict[str, tuple[int, str]] = {
    "one rank": (1, ""),
    "one rank, dropout": (1, "--hidden-dropout 0.1 --attention-dropout 0.1"),
    "one rank, distributed optimizer, bf16": (1, f"{ONE_RANK} --bf16"),
    "dp 2, distributed optimizer, overlap": (2, f"{ONE_RANK} --overlap-grad-reduce --overlap-param-gather"),
    "tp 2, distributed optimizer": (2, TWO_RANKS),
    "tp 2, sequence parallel, bf16": (2, f"{TWO_RANKS} --sequence-parallel --bf16"),
    "pp 2": (2, "--pipeline-model-parallel-size 2 --num-layers 2"),
    "ep 2": (2, EXPERTS),
}


def compute(layout: str) -> dict[str, list[str]]:
    """Return losses, gradient norms and validation losses of a layout's run as hexadecimal floats."""
    ranks, flags = LAYOUTS[layout]
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_distributed(train_layout, ranks, arguments(Path(folder), "run", flags), timeout_s=600)[0]
    values = {"loss": outcome.losses, "grad_norm": outcome.grad_norms, "valid": outcome.valid}
    return {name: [float(value).hex() for value in numbers] for name, numbers in values.items()}


if __name__ == "__main__":
    json.dump({layout: compute(layout) for layout in LAYOUTS}, sys.stdout, indent=1)
    print()
