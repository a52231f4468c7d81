import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from megatron_tst.config import PRESETS, RunConfig, UserError, dump_config, load_config, parse_config
from megatron_tst.superposition import Phase

GOOD = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 128 --micro-batch-size 4 --train-iters 10 "
    "--lr 1e-3 --tokenizer-model tokenizer.json --tst-run-dir run --data-path corpus"
).split()


def parse(extra: str) -> RunConfig:
    return parse_config([*GOOD, *extra.split()])


def test_flags_are_flat_and_typed():
    config = parse("--tst-bag-size 4 --tst-step-ratio 0.3 --bf16 --lr-decay-style cosine --data-path 0.5 a 0.5 b")
    assert config.model.num_layers == 2
    assert config.training.bf16 is True
    assert config.optimizer.lr == 1e-3
    assert config.data.data_path == ("0.5", "a", "0.5", "b")
    assert config.schedule.phases == (Phase(4, 3), Phase(1, 7))


def test_flags_override_yaml_and_yaml_overrides_the_preset(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("model: {tst_preset: 270m, num_layers: 3}\noptimizer: {lr: 3e-4}\ntraining: {train_iters: 7}\n")
    config = parse_config(["--config", str(file), *GOOD[2:12], "--tokenizer-model", "t", "--tst-run-dir", "r",
                           "--data-path", "c", "--num-query-groups", "2"])  # fmt: skip
    assert config.model.num_layers == 3
    assert config.model.ffn_hidden_size == PRESETS["270m"]["ffn_hidden_size"]
    assert config.model.hidden_size == 64
    assert config.optimizer.lr == 3e-4
    assert config.training.train_iters == 10


def test_yaml_accepts_any_number_of_phases(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text("phases: [{bag_size: 8, steps: 2}, {bag_size: 2, steps: 3}, {bag_size: 1, steps: 5}]\n")
    config = parse_config([*GOOD, "--config", str(file)])
    assert config.schedule.phases == (Phase(8, 2), Phase(2, 3), Phase(1, 5))
    with pytest.raises(UserError, match="--train-iters 11: must be the sum of the phases' steps, 10"):
        parse_config([*GOOD, "--config", str(file), "--train-iters", "11"])


def test_dumped_config_reads_back_the_same(tmp_path: Path):
    config = parse("--tst-preset 600m --hidden-size 960 --num-attention-heads 15 --tst-bag-size 6 --tst-steps 3")
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(config))
    again = parse_config(["--config", str(file)])
    assert dump_config(again) == dump_config(config)
    assert again.schedule == config.schedule


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--tst-bag-size 0", "--tst-bag-size 0: must be above 0"),
        ("--tst-bag-size 4", "--tst-bag-size 4: needs --tst-step-ratio"),
        ("--tst-objective mce_alt --tst-superpose input", "--tst-objective mce_alt: uses no bag weights"),
        ("--tst-objective mce_alt --tst-bag-weights power_law", "but they are power_law"),
        ("--tst-superpose all", "invalid choice 'all' for argument '--tst-superpose'"),
        ("--tst-bag-size 4 --tst-step-ratio 1.2", "--tst-step-ratio 1.2: must lie between 0 and 1"),
        ("--tst-bag-size 4 --tst-steps 11", "--tst-steps 11: must lie between 0 and --train-iters 10"),
        ("--tst-bag-size 4 --tst-steps 3 --tst-step-ratio 0.3", "conflicts with --tst-step-ratio"),
        ("--tst-reinitialize-at-switch", "--tst-reinitialize-at-switch: needs a phase with bags, followed by one"),
        (
            "--tst-bag-size 4 --tst-step-ratio 1 --tst-reinitialize-at-switch",
            "--tst-reinitialize-at-switch: needs a phase with bags, followed by one of bag size 1",
        ),
        ("--hidden-size 66", "--hidden-size 66: must be a multiple of --num-attention-heads 4"),
        ("--group-query-attention --num-query-groups 3", "--num-query-groups 3: must divide"),
        ("--max-position-embeddings 64", "--max-position-embeddings 64: must be at least --seq-length 128"),
        ("--tensor-model-parallel-size 3", "--tensor-model-parallel-size 3: must divide --num-attention-heads 4"),
        (
            "--seq-length 127 --tensor-model-parallel-size 2 --sequence-parallel",
            "--seq-length 127: with --sequence-parallel must be a multiple of --tensor-model-parallel-size 2",
        ),
        (
            "--seq-length 4 --tensor-model-parallel-size 4 --sequence-parallel --context-parallel-size 2",
            "must be a multiple of --tensor-model-parallel-size 4 x --context-parallel-size 2",
        ),
        (
            "--context-parallel-size 2 --seq-length 126",
            "--seq-length 126: must be a multiple of 2 x --context-parallel",
        ),
        ("--pipeline-model-parallel-size 4", "--num-layers 2: must be a multiple of --pipeline-model-parallel-size 4"),
        ("--num-layers-per-virtual-pipeline-stage 1", "needs --pipeline-model-parallel-size above 1"),
        ("--expert-model-parallel-size 2", "--expert-model-parallel-size 2: must divide --num-experts 0"),
        ("--num-experts 4 --moe-router-topk 5", "--moe-router-topk 5: must lie between 1 and --num-experts 4"),
        ("--num-experts 4 --tensor-model-parallel-size 2", "needs --sequence-parallel"),
        ("--global-batch-size 6", "--global-batch-size 6: must be a multiple of --micro-batch-size 4"),
        ("--overlap-param-gather --overlap-grad-reduce", "--overlap-param-gather: needs --use-distributed-optimizer"),
        ("--overlap-param-gather --use-distributed-optimizer", "--overlap-param-gather: needs --overlap-grad-reduce"),
        ("--ddp-bucket-size 1000", "--ddp-bucket-size 1000: needs --overlap-grad-reduce"),
        ("--overlap-grad-reduce --ddp-bucket-size 0", "--ddp-bucket-size 0: must be above 0"),
        ("--lr-warmup-iters 10", "--lr-warmup-iters 10: must lie before"),
        ("--lr-decay-style WSD", "--lr-wsd-decay-iters None: with --lr-decay-style WSD"),
        ("--min-lr 1", "--min-lr 1.0: must lie between 0 and --lr"),
        ("--train-iters 0", "--train-iters 0: must be above 0"),
        ("--recompute-granularity full", "needs --recompute-method"),
        ("--valid-data-path x", "--data-path: conflicts with"),
        ("--reset-position-ids", "--reset-position-ids: is not supported: a bag may span two documents"),
        ("--reset-attention-mask", "--reset-attention-mask: is not supported"),
        ("--mtp-num-layers 2", "--mtp-num-layers 2: is not supported: multi-token prediction"),
        ("--train-samples 100", "--train-samples 100: is not supported: a run is counted in steps"),
        ("--superposition-bag-size 4", "use --tst-bag-size"),
        ("--loss-sclae 3", "--loss-sclae 3: unknown"),
        ("--lr ten", "--lr"),
        ("--lr-decay-style sqrt", "invalid choice 'sqrt' for argument '--lr-decay-style'"),
        ("--tst-preset 5b", "--tst-preset 5b: unknown; choose from 270m"),
        ("--config missing.yaml", "--config missing.yaml: cannot be read"),
    ],
)
def test_error_is_one_line_with_flag_value_and_rule(extra, message):
    with pytest.raises(UserError) as caught:
        parse(extra)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("flag", ["--num-layers", "--lr", "--tokenizer-model", "--tst-run-dir", "--data-path"])
def test_required_flag_must_be_given(flag):
    place = GOOD.index(flag)
    with pytest.raises(UserError, match=flag):
        parse_config(GOOD[:place] + GOOD[place + 2 :])


@pytest.mark.parametrize(
    ("yaml", "message"),
    [
        ("modell: {}", "'modell' is not a section"),
        ("model: {layers: 2}", "model.layers: is not a setting"),
        ("model: {num_layers: two}", "model.num_layers 'two'"),
        ("training: {train_samples: 2}", "training.train_samples: is not supported: a run is counted in steps"),
        ("phases: [{bag: 2}]", "phases[0].bag: is not a setting of a phase"),
        ("phases: [{bag_size: 0, steps: 2}]", "phases[0]: bag_size is 0; it must be at least 1"),
        ("phases: {bag_size: 2, steps: 9}", "must be a list of {bag_size, steps}"),
        ("phases: [3]", "phases[0] 3: must be {bag_size, steps}"),
        ("phases: [{bag_size: 2, steps: 9}, {steps: 9}]", "phases[1]: must have bag_size"),
        ("phases: [{bag_size: 2, steps: 9, lr: 1e-5}]", "phases[0].lr: is not a setting of a phase"),
        ("phases: [{bag_size: 2, steps: 9, reads_bags: 'false'}]", "reads_bags 'false': must be true or false"),
        ("phases: [{bag_size: 2, steps: 1e1}]", "phases[0].steps 10.0: must be a whole number"),
        ("phases: [{bag_size: 2, steps: 6.0}]", "phases[0].steps 6.0: must be a whole number"),
        ("phases: [{bag_size: true, steps: 6}]", "phases[0].bag_size True: must be a whole number"),
        ("model: {num_layers: 2}\nmodel: {}", "'model' appears twice, on lines 1 and 2"),
        ("optimizer: {lr: 1,\n lr: 2}", "'lr' appears twice, on lines 1 and 2"),
        ("phases: [{bag_size: 2, bag_size: 3, steps: 1}]", "'bag_size' appears twice"),
        ("optimizer: {lr: true}", "optimizer.lr True: must be a number or null"),
        ("optimizer: {lr: '1e-3'}", "optimizer.lr '1e-3': must be a number or null"),
        ("training: {seed: 010}", "training.seed '010': must be a whole number"),
        ("training: {seed: 0x10}", "training.seed '0x10': must be a whole number"),
        ("training: {seed: 1_000}", "training.seed '1_000': must be a whole number"),
        ("training: {seed: 1:30}", "training.seed '1:30': must be a whole number"),
        ("training: {seed: 3.0}", "training.seed 3.0: must be a whole number"),
        ("training: {seed: true}", "training.seed True: must be a whole number"),
        ("training: {seed: null}", "training.seed None: must be a whole number"),
        ("training: {seed: 2026-11-25}", "training.seed '2026-11-25': must be a whole number"),
        ("training: {seed: " + "9" * 5000 + "}", "is not YAML"),
        ("training: {bf16: 'true'}", "training.bf16 'true': must be true or false"),
        ("training: {bf16: yes}", "training.bf16 'yes': must be true or false"),
        ("training: {bf16: 1}", "training.bf16 1: must be true or false"),
        ("training: {recompute_method: 1}", "recompute_method 1: must be one of uniform, block or null"),
        ("data: {split: 1}", "data.split 1: must be text; put it in quotes"),
        ("logging: {wandb_project: 2026}", "logging.wandb_project 2026: must be text or null; put it in quotes"),
        ("data: {data_path: corpus}", "data.data_path 'corpus': must be a list of text"),
        ("data: {data_path: [a, 1]}", "data.data_path ['a', 1]: must be a list of text; put it in quotes"),
        ("data: {data_path: [0.5, a]}", "must be a list of text; put it in quotes"),
        ("model: {1: 2}", "model.1: is not a setting"),
        ("model: {? [a] : 2}", "a key must be a word"),
        ("logging: [5]", "logging [5]: must be a mapping of settings"),
        ("logging: hello", "logging 'hello': must be a mapping of settings"),
        ("model: false", "model False: must be a mapping of settings"),
        ("model: []", "model []: must be a mapping of settings"),
        ("model: {tst_preset: 5}", "model.tst_preset 5: must be text or null; put it in quotes"),
        ("optimizer: {lr: &a 1}\ntraining: {<<: {seed: 1}}", "training.<<: is not a setting"),
        ("a: 1\n--- \nb: 2", "is not YAML"),
        ("model: " + "[" * 5000, "is not YAML"),
        ("[1, 2]", "must hold sections"),
        ("model: [", "is not YAML"),
        ("model: !!python/object/apply:os.system ['true']", "could not determine a constructor for the tag"),
    ],
)
def test_error_in_yaml_names_the_file_and_the_setting(tmp_path: Path, yaml, message):
    file = tmp_path / "bad.yaml"
    file.write_text(yaml)
    with pytest.raises(UserError) as caught:
        parse_config([*GOOD, "--config", str(file)])
    assert message in str(caught.value) and "bad.yaml" in str(caught.value)


def test_yaml_values_are_read_by_the_rules_of_yaml_1_2(tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "optimizer: {lr: &rate 3e-4, min_lr: 0, adam_eps: *rate, clip_grad: .5}\n"
        "training: {seed: 0, bf16: True}\nlogging: {wandb_project: yes}\ncheckpoint:\nphases:\n"
    )
    config = parse_config([*GOOD, "--config", str(file), "--lr", "1"])
    assert (config.optimizer.adam_eps, config.optimizer.clip_grad, config.training.seed) == (3e-4, 0.5, 0)
    assert type(config.optimizer.min_lr) is float
    assert config.training.bf16 is True
    assert config.logging.wandb_project == "yes"


@pytest.mark.parametrize("text", ["yes", "010", "1e3", "0x10", "null", "true", "12", "1.5", ".inf", "~", "é", "a: b"])
def test_dump_quotes_text_that_looks_like_another_type(tmp_path: Path, text):
    file = tmp_path / "config.yaml"
    file.write_text(dump_config(parse_config([*GOOD, f"--wandb-project={text}"])), encoding="utf-8")
    assert load_config(file).logging.wandb_project == text


def test_every_field_refuses_values_of_other_types(tmp_path: Path):
    """Every setting refuses one value of each type that is not its own."""
    values = {bool: True, int: 7, float: 0.5, str: "word"}
    file, refused = tmp_path / "run.yaml", 0
    for section in dataclasses.fields(RunConfig):
        settings = section.type if isinstance(section.type, type) else None
        for setting in dataclasses.fields(settings) if dataclasses.is_dataclass(settings) else ():
            hint = get_type_hints(settings)[setting.name]
            options = set(get_args(hint) or (hint,)) - {type(None)}
            for kind, value in values.items():
                if kind in options or (kind is int and float in options):
                    continue
                file.write_text(yaml.safe_dump({section.name: {setting.name: value}}))
                with pytest.raises(UserError, match=rf"{section.name}\.{setting.name} .*: must be"):
                    load_config(file)
                refused += 1
    assert refused > 200


def test_nothing_in_yaml_is_executed(tmp_path: Path):
    file, canary = tmp_path / "bomb.yaml", tmp_path / "canary"
    file.write_text(f"model: !!python/object/apply:os.mkdir [{canary}]")
    with pytest.raises(UserError, match="could not determine a constructor"):
        load_config(file)
    assert not canary.exists()
    yaml.unsafe_load(file.read_text())
    assert canary.exists()


def test_help_lists_flags(capsys):
    with pytest.raises(SystemExit) as stopped:
        parse_config(["--help"])
    assert stopped.value.code == 0
    assert "--tst-bag-size" in capsys.readouterr().out


def test_boolean_flag_repeats_or_negates_the_value_of_the_file(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("training: {bf16: true}\n")
    file = ["--config", str(tmp_path / "run.yaml")]
    assert parse_config([*GOOD, *file]).training.bf16
    assert parse_config([*GOOD, *file, "--bf16"]).training.bf16
    assert not parse_config([*GOOD, *file, "--no-bf16"]).training.bf16
