"""Differences between the versions of megatron-core, and the absence of their warnings on the screen."""

import importlib.metadata
import inspect
import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
from megatron.core.dist_checkpointing import serialization
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.transformer import TransformerConfig
from packaging.version import Version

import megatron_tst
from megatron_tst.config import UserError
from megatron_tst.megatron_patches.versions import (
    DIFFERENCES,
    accepted_transformer_engine,
    check_transformer_engine,
    common_state_reader,
    common_state_writers,
    results_queue_name,
    save_settings,
    without_cuda_graphs,
)
from tests.training.runs import ROOT, arguments, start

INSTALLED = Version(importlib.metadata.version("megatron-core"))


@pytest.mark.parametrize("name", DIFFERENCES)
def test_difference_is_present_from_its_release_on(name: str):
    """A version that reverts a change, or changes it again, fails here."""
    difference = DIFFERENCES[name]
    assert difference.is_here() == (Version(difference.since) <= INSTALLED), difference


def test_installed_version_is_a_tested_one():
    assert str(INSTALLED) in ("0.16.1", "0.19.2")


BELONGING = {
    "0.16.1": ("2.9.0+70f53666", "2.10.0", "2.11.0"),
    "0.19.2": ("2.16.0+4220403e", "2.17.1+4329ff84", "2.19.0.dev0+4d4088b3", "2.20.2"),
}
NEVER = ("2.8.0", "2.12.0+5671fd36", "2.14.0", "2.21.0", "3.0")


def test_transformer_engine_of_another_megatron_core_is_not_accepted():
    tried = [*NEVER, *(version for versions in BELONGING.values() for version in versions)]
    assert set(accepted_transformer_engine().filter(tried)) == set(BELONGING[str(INSTALLED)])


def test_names_that_differ_between_versions_exist():
    assert callable(getattr(filesystem_async, results_queue_name()))
    for place in (common_state_reader(), *common_state_writers()):
        assert callable(getattr(*place))
    assert save_settings().keys() <= inspect.signature(serialization.save).parameters.keys()
    (scopes,) = without_cuda_graphs()
    config = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=1, **without_cuda_graphs())
    assert getattr(config, scopes) == []


def test_no_other_module_checks_the_version_of_megatron_core():
    asks = re.compile(r"megatron.core.*__version__|is_mcore|version\(.megatron")
    found = [
        str(module.relative_to(ROOT))
        for module in (ROOT / "megatron_tst").rglob("*.py")
        if asks.search(module.read_text(encoding="utf-8"))
    ]
    assert found == ["megatron_tst/megatron_patches/versions.py"]
    assert asks.search("if megatron.core.__version__ >= '0.19'")


def test_unsupported_transformer_engine_is_refused():
    (oldest,) = (part.version for part in accepted_transformer_engine() if part.operator == ">=")
    check_transformer_engine(None)
    check_transformer_engine(f"{oldest}.0+4220403e")
    for other in ("2.8.0", "2.21.0"):
        with pytest.raises(UserError, match=f"Transformer Engine {other} does not match megatron-core 0"):
            check_transformer_engine(other)


def test_run_and_its_resumption_print_only_their_own_lines(corpus, tokenizer, tmp_path: Path):
    for more in ("--train-iters 4 --exit-interval 2", "--train-iters 4"):
        flags = f"--tst-bag-size 4 --tst-steps 2 --use-distributed-optimizer {more} --load {tmp_path}/run/checkpoints"
        argv = arguments(corpus, str(tokenizer.path), tmp_path / "run", flags)
        done = start("pretrain_tst.py", *argv, CUDA_HOME="/usr/local")
        assert done.returncode in (0, 75), done.stderr
        lines = (done.stdout + done.stderr).splitlines()
        assert [line for line in lines if not re.match(r"20\d\d-\d\d-\d\d ", line)] == []
        assert any("saved" in line for line in lines)


RANKS = {
    # The buckets are so small that one begins between two projections of attention.
    "dp2": "--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 1000",
    "ep2": "--num-experts 4 --moe-aux-loss-coeff 0.01 --expert-model-parallel-size 2 --bf16",
}


@pytest.mark.distributed
@pytest.mark.parametrize("layout", RANKS)
def test_several_ranks_print_only_their_own_lines(corpus, tokenizer, tmp_path: Path, layout: str):
    argv = arguments(corpus, str(tokenizer.path), tmp_path / "run", f"--train-iters 4 {RANKS[layout]}")
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = start(*launch, "pretrain_tst.py", *argv, CUDA_HOME="/usr/local")
    assert done.returncode == 0, done.stderr
    lines = (done.stdout + done.stderr).splitlines()
    assert [line for line in lines if not re.match(r"20\d\d-\d\d-\d\d ", line)] == []


@pytest.mark.parametrize("name", megatron_tst._UNWANTED_LINES)
def test_log_filter_drops_only_its_line(name: str, caplog):
    logger = logging.getLogger(name)
    with caplog.at_level(logging.WARNING, logger=name):
        logger.warning("%s and so on", megatron_tst._UNWANTED_LINES[name])
        logger.warning("another line")
    assert [record.getMessage() for record in caplog.records if record.name == name] == ["another line"]


def test_the_import_prints_nothing_without_optional_packages():
    """The test environment has absl from TensorBoard, a user's may not."""
    code = "import sys; sys.modules['absl'] = None; import megatron_tst.training"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
