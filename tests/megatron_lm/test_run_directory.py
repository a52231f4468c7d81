"""The tools read a run directory of Megatron-LM's trainer like one of the own trainer."""

import json
from pathlib import Path

import pytest

from megatron_tst.config import UserError, dump_config, load_config, parse_config
from megatron_tst.superposition import Phase
from tests.megatron_lm.trainers import needs_trainer, run_megatron_lm, settings, write
from tests.training.runs import start

pytestmark = [needs_trainer, pytest.mark.distributed]


@pytest.fixture(scope="module")
def runs(corpus, tokenizer, tmp_path_factory) -> Path:
    """Return a folder with a baseline and a run with superposition, which is started from the command line."""
    folder = tmp_path_factory.mktemp("runs")
    config = write(folder / "run.yaml", settings(corpus, str(tokenizer.path)))
    run_megatron_lm(["--config", config, "--tst-bag-size", "1", "--tst-steps", "0"], folder / "baseline")
    done = start("pretrain_tst.py", "--config", config, "--tst-run-dir", str(folder / "tst"),
                 "--tst-trainer", "megatron-lm", "--weight-decay", "0.1", "--log-throughput")  # fmt: skip
    assert done.returncode == 0, done.stderr[-5000:]
    return folder


def test_the_settings_are_recorded(runs):
    config = load_config(runs / "tst" / "config.yaml")
    assert config.schedule.phases == (Phase(4, 4), Phase(1, 4))
    assert (config.training.tst_trainer, config.training.global_batch_size) == ("megatron-lm", 4)
    assert (config.model.hidden_size, config.model.disable_bias_linear, config.model.vocab_size) == (32, True, 300)
    assert (config.optimizer.weight_decay, config.optimizer.lr_decay_style) == (0.1, "cosine")
    assert config.megatron_lm["log_throughput"] is True
    assert "weight_decay" not in config.megatron_lm
    assert json.loads((runs / "tst" / "versions.json").read_text())["megatron-core"] == "0.19.2"
    assert "validation loss" in (runs / "tst" / "log.txt").read_text()


def test_parameter_groups_have_the_own_trainers_names(runs):
    line = json.loads((runs / "tst" / "metrics.jsonl").read_text().splitlines()[0])
    assert line["kind"] == "step" and line["lr_by_group"].keys() == {"decay", "no_decay"}


def test_the_recorded_settings_start_the_same_run(runs, tmp_path):
    recorded = ["--config", str(runs / "tst" / "config.yaml")]
    run_megatron_lm([*recorded, "--save", str(tmp_path / "save")], tmp_path / "run")
    first, again = (
        [json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (runs / "tst", tmp_path / "run")
    )
    assert [line["loss"] for line in first if "loss" in line] == [line["loss"] for line in again if "loss" in line]
    assert "training:" in dump_config(load_config(Path(recorded[1])))


def test_the_own_trainer_refuses_settings_that_only_megatron_lm_has(runs, tmp_path):
    config = write(tmp_path / "run.yaml", {"megatron_lm": {"log_throughput": True}})
    with pytest.raises(UserError, match=r"megatron_lm: log_throughput: only .* use --tst-trainer megatron-lm"):
        parse_config(["--config", config])


def test_run_status_reads_the_run(runs):
    done = start("tools/run_status.py", str(runs / "tst"))
    assert done.returncode == 0, done.stderr
    assert "8" in done.stdout


def test_compare_runs_reads_the_runs(runs):
    done = start("tools/compare_runs.py", str(runs / "baseline"), str(runs / "tst"), COLUMNS="160")
    assert done.returncode == 0, done.stderr
    assert "4 then 1" in done.stdout
    assert (
        "differs from baseline in --weight-decay 0.1 (instead of 0.01), --log-throughput True (instead of None)"
        in done.stdout
    )


def test_a_checkpoint_is_converted_to_hugging_face(runs, tokenizer, tmp_path):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    argv = (
        "--load",
        runs / "tst" / "checkpoints",
        "--save",
        tmp_path / "hf",
        "--tokenizer",
        tokenizer.path.parent,
        "--verify",
    )
    done = start("tools/convert_ckpt.py", *map(str, argv))
    assert done.returncode == 0, done.stderr
    assert "largest logit difference" in done.stdout
