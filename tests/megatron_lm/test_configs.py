"""One YAML file configures either trainer: Megatron-LM's gets every setting from files, presets and flags."""

import dataclasses
import os
from pathlib import Path

import pytest

from megatron_tst.config import RunConfig, UserError, parse_config, read_files
from tests.distributed.launch import run_distributed
from tests.megatron_lm.trainers import needs_trainer, refused, settings, write
from tests.training.runs import start

ROOT = Path(__file__).parents[2]
CONFIGS = sorted(
    c for folder in ("examples", "launch") for c in (ROOT / folder).rglob("*.yaml") if c.parent.name != "evaluate"
)
WORLD_SIZE = 64
# Settings that Megatron-LM fills in, or that depend on the machine.
FILLED_IN = {
    "model.tst_preset", "model.max_position_embeddings", "model.ffn_hidden_size", "model.kv_channels",
    "model.num_query_groups", "model.vocab_size", "model.moe_grouped_gemm", "model.moe_ffn_hidden_size",
    "training.tst_trainer", "training.cross_entropy_loss_fusion", "training.global_batch_size",
    "checkpoint.save", "checkpoint.save_interval", "checkpoint.async_save",
    "optimizer.lr_decay_iters", "parallel.overlap_param_gather",
}  # fmt: skip


def prepared(argv: list[str]) -> RunConfig:
    """Return the settings that correspond to Megatron-LM's arguments on one of many ranks."""
    os.environ["WORLD_SIZE"] = str(WORLD_SIZE)
    from megatron_tst.distributed import enter_device
    from megatron_tst.megatron_patches.cpu import enter_cpu_card

    device = enter_device()
    enter_cpu_card()
    from megatron_tst.megatron_lm.run import prepare

    return prepare(argv, device).config


def flat(config: RunConfig) -> dict[str, object]:
    return {
        f"{section}.{name}": value
        for section, values in dataclasses.asdict(config).items()
        if isinstance(values, dict) and section != "megatron_lm"
        for name, value in values.items()
    }


@needs_trainer
@pytest.mark.distributed
@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_setting_of_a_shipped_file_reaches_megatron_lm(config: Path, corpus, tokenizer, tmp_path):
    argv = ["--config", str(config), "--data-path", corpus, "--tokenizer-model", str(tokenizer.path)]
    argv += ["--tst-run-dir", str(tmp_path / "run"), "--global-batch-size", "4096"]
    own = parse_config(argv)
    (theirs,) = run_distributed(prepared, 1, argv)
    assert own.schedule == theirs.schedule
    ours, arrived = flat(own), flat(theirs)
    assert {name: (ours[name], arrived[name]) for name in ours if ours[name] != arrived[name]}.keys() <= FILLED_IN
    assert len(ours.keys() - FILLED_IN) > 90
    assert ours["optimizer.lr"] != RunConfig().optimizer.lr


def test_an_empty_section_of_a_later_file_overrides_nothing(tmp_path):
    first = write(tmp_path / "first.yaml", {"model": {"num_layers": 2}, "phases": [{"bag_size": 2, "steps": 3}]})
    (tmp_path / "second.yaml").write_text("model:\nphases:\ntraining: {seed: 5}\n")
    merged = read_files([first, str(tmp_path / "second.yaml")])
    assert merged == {"model": {"num_layers": 2}, "phases": [{"bag_size": 2, "steps": 3}], "training": {"seed": 5}}


def test_each_setting_of_a_later_file_overrides_that_of_an_earlier_one(tmp_path):
    first = write(tmp_path / "first.yaml", {"model": {"num_layers": 2, "hidden_size": 8}, "optimizer": {"lr": 1.0}})
    second = write(tmp_path / "second.yaml", {"model": {"num_layers": 3}, "phases": [{"bag_size": 1, "steps": 2}]})
    assert read_files([first, second]) == {
        "model": {"num_layers": 3, "hidden_size": 8}, "optimizer": {"lr": 1.0}, "phases": [{"bag_size": 1, "steps": 2}],
    }  # fmt: skip
    assert read_files([second, first])["model"]["num_layers"] == 2
    with pytest.raises(UserError, match=rf"{second}: 'models' is not a section"):
        write(tmp_path / "second.yaml", {"models": {}})
        read_files([first, second])


@needs_trainer
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("extra", "rule"),
    [
        ({"nonsense": 1}, "megatron_lm.nonsense: is not a flag of the installed Megatron-LM"),
        ({"num_layers": 1}, "megatron_lm.num_layers: belongs in the section model"),
        ({"log_throughput": 1}, "megatron_lm.log_throughput 1: must be true or false"),
        ({"timing_log_level": True}, "megatron_lm.timing_log_level True: needs a value"),
    ],
)
def test_a_wrong_setting_in_the_section_megatron_lm_is_named(corpus, tokenizer, tmp_path, extra, rule):
    config = write(tmp_path / "run.yaml", settings(corpus, str(tokenizer.path), megatron_lm=extra))
    assert refused(["--config", config], tmp_path / "run") == f"{config}: {rule}"


@needs_trainer
@pytest.mark.distributed
def test_a_mistake_gives_one_line_that_names_the_flag(corpus, tokenizer, tmp_path):
    config = write(tmp_path / "run.yaml", settings(corpus, str(tokenizer.path), training={"max_nan_steps": 2}))
    assert refused(["--config", config], tmp_path / "run").startswith("training.max_nan_steps 2: cannot be used")
    config = write(tmp_path / "run.yaml", settings(corpus, str(tokenizer.path)))
    for flags, rule in {
        "--nonsense 3": "unrecognized arguments: --nonsense 3",
        "--tst-bag-size two": "argument --tst-bag-size/--tst_bag_size: invalid int value: 'two'",
        "--tst-bag-size 0": "--tst-bag-size 0: must be above 0",
        "--overlap-param-gather": "Megatron-LM refuses the settings: --overlap-param-gather only supported",
        "--vocab-size 10": "--vocab-size 10: must be at least the tokenizer's 300",
        "--tokenizer-model nowhere": "--tokenizer-type HuggingFaceTokenizer: cannot be built",
    }.items():
        said = refused(["--config", config, *flags.split()], tmp_path / "run")
        assert said.startswith(rule), said
        assert "\n" not in said


@needs_trainer
def test_help_lists_the_flags_of_megatron_lm_and_of_this_project():
    done = start("pretrain_tst.py", "--tst-trainer", "megatron-lm", "--help")
    assert done.returncode == 0, done.stderr[-2000:]
    assert all(flag in done.stdout for flag in ("--tst-bag-size", "--fp8-format", "--keep-last"))
