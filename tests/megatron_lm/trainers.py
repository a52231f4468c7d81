"""Runs of either trainer, each in ranks of its own."""

import contextlib
import importlib.util
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_tst.config import StoppedInSetUp, UserError
from megatron_tst.telemetry import read_metrics
from tests.distributed.launch import run_distributed

needs_trainer = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None,
    reason="needs Megatron-LM's trainer, which megatron-core contains from 0.19 on",
)

MODEL = {
    "num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 48, "num_attention_heads": 4, "seq_length": 16,
    "swiglu": True, "normalization": "RMSNorm", "position_embedding_type": "rope",
    "untie_embeddings_and_output_weights": True, "disable_bias_linear": True, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "make_vocab_size_divisible_by": 128,
}  # fmt: skip
EXPERTS = {
    "num_experts": 4, "moe_ffn_hidden_size": 24, "moe_router_topk": 2, "moe_aux_loss_coeff": 0.01,
    "moe_token_dispatcher_type": "alltoall",
}  # fmt: skip


def settings(corpus: str, tokenizer: str, **sections: Any) -> dict[str, dict[str, Any]]:
    """Return the sections of a small run's YAML file; each setting in ``sections`` overrides the default."""
    base: dict[str, dict[str, Any]] = {
        "model": MODEL,
        "superposition": {"tst_bag_size": 4, "tst_steps": 4},
        "data": {"data_path": [corpus], "tokenizer_model": tokenizer, "split": "90,10,0", "num_workers": 0},
        "training": {
            "micro_batch_size": 2, "global_batch_size": 4, "train_iters": 8, "eval_interval": 4, "eval_iters": 2,
        },
        "optimizer": {"lr": 1e-2, "lr_warmup_iters": 2, "lr_decay_style": "cosine"},
        "logging": {"log_interval": 1},
    }  # fmt: skip
    if "phases" in sections:
        del base["superposition"]
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values} if isinstance(values, Mapping) else values
    return base


def write(path: Path, sections: Mapping[str, Any]) -> str:
    path.write_text(yaml.safe_dump(dict(sections)), encoding="utf-8")
    return str(path)


def train_own(argv: list[str]) -> None:
    """Train on a rank with the own trainer."""
    from megatron_tst.config import parse_config
    from megatron_tst.distributed import destroy_parallel_state
    from megatron_tst.distributed.signals import StopSignals
    from megatron_tst.training import start_run, train

    signals = StopSignals()
    train(start_run(parse_config(argv), signals), signals)
    destroy_parallel_state()


def train_megatron_lm(argv: list[str]) -> tuple[bool | str, str]:
    """Train on a rank with Megatron-LM's trainer; return whether it reached the end, or its error, and its output."""
    from megatron_tst.megatron_lm import train

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            return train([*argv, "--tst-trainer", "megatron-lm"]), said.getvalue()
        except (UserError, StoppedInSetUp) as error:
            return str(error), said.getvalue()


def run_own(argv: list[str], run_dir: Path, ranks: int = 1) -> list[Mapping[str, Any]]:
    """Train with the own trainer; return the lines of metrics."""
    run_distributed(train_own, ranks, [*argv, "--tst-run-dir", str(run_dir)])
    return read_metrics(run_dir / "metrics.jsonl")


def run_megatron_lm(argv: list[str], run_dir: Path, ranks: int = 1) -> list[Mapping[str, Any]]:
    """Train with Megatron-LM's trainer to the end; return the lines of metrics."""
    (ended, _), *_ = run_distributed(train_megatron_lm, ranks, [*argv, "--tst-run-dir", str(run_dir)])
    assert ended is True, ended
    return read_metrics(run_dir / "metrics.jsonl")


def refused(argv: list[str], run_dir: Path) -> str:
    """Return the error message of a run that is refused."""
    ((reason, _),) = run_distributed(train_megatron_lm, 1, [*argv, "--tst-run-dir", str(run_dir)])
    assert isinstance(reason, str), "the run was not refused"
    return reason


def losses(lines: list[Mapping[str, Any]]) -> list[float]:
    """Return the losses of all steps, then those of all evaluations."""
    return [line[name] for name in ("loss", "valid_loss") for line in lines if name in line]


def distance(ours: list[Mapping[str, Any]], theirs: list[Mapping[str, Any]]) -> float:
    """Return the largest difference between corresponding losses."""
    pairs = zip(losses(ours), losses(theirs), strict=True)
    return max(abs(a - b) for a, b in pairs)
