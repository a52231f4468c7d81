import json

import pytest

from tests.training.runs import ROOT, start

CONFIGS = sorted(path.name for path in (ROOT / "launch" / "configs").glob("*.yaml"))


def plan(*argv):
    return start("tools/plan.py", *argv, COLUMNS="140")


def planned(tmp_path, *argv):
    done = plan(*argv, "--json", str(tmp_path / "plan.json"))
    assert done.returncode == 0, done.stderr
    return json.loads((tmp_path / "plan.json").read_text()), done.stdout


def hours(tmp_path, name):
    return planned(tmp_path, "--config", f"launch/configs/{name}.yaml")[0]["plan"]["gpu_hours"]


def test_hours_match_the_papers_runs(tmp_path):
    tst, baseline = hours(tmp_path, "moe_10b_tst"), hours(tmp_path, "moe_10b_baseline")
    assert tst == pytest.approx(4768, rel=0.10)
    assert baseline == pytest.approx(12311, rel=0.01)
    assert baseline / tst == pytest.approx(12311 / 4768, rel=0.05)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_shipped_run_fits_its_gpus(tmp_path, config):
    cards = "64" if config.startswith(("dense_3b", "moe")) else "8"
    content, text = planned(tmp_path, "--config", f"launch/configs/{config}", "--num-gpus", cards)
    assert content["layout"]["refusal"] is None
    assert "It fits" in text


def test_the_configured_layouts_step_time_gives_the_hours(tmp_path):
    content, _ = planned(tmp_path, "--config", "launch/configs/moe_10b_tst.yaml")
    step = content["layout"]["step_s"]
    total = step["compute"] + step["bubble"] + step["exposed"]
    assert total * 49983 * 64 / 3600 == pytest.approx(content["plan"]["gpu_hours"], rel=1e-6)


def test_a_run_without_a_layout_is_null(tmp_path):
    small = ("--config", "launch/configs/dense_3b_tst.yaml", "--global-batch-size", "8", "--simulate", "16384")
    content, text = planned(tmp_path, *small)
    assert content["scaled"][0]["days"] is None
    assert "On 16384 GPUs no layout can be used; most often:" in text


def test_flags_change_the_plan(tmp_path):
    config = ("--config", "launch/configs/dense_3b_tst.yaml")
    plain, _ = planned(tmp_path, *config, "--mfu", "0.4")
    staged, text = planned(tmp_path, *config, "--mfu", "0.2", "--pipeline-model-parallel-size", "4")
    assert staged["plan"]["gpu_hours"] == pytest.approx(2 * plain["plan"]["gpu_hours"])
    assert (len(plain["layout"]["memory_bytes"]), len(staged["layout"]["memory_bytes"])) == (1, 4)
    first, *_, last = (stage["activations"] for stage in staged["layout"]["memory_bytes"])
    assert first > 3 * last
    assert "stage 3" in text


def test_the_printed_plan_has_all_parts(tmp_path):
    _, text = planned(
        tmp_path, "--config", "launch/configs/moe_10b_tst.yaml", "--price-per-gpu-hour", "4", "--data-tokens", "2e12",
        "--simulate", "1024", "16384",
    )  # fmt: skip
    for part in (
        "10.5B parameters", "1.99T", "Cost: 19,6", "micro-batch 2  (configured)", "--num-query-groups 4",
        "10B-A1B MoE run", "16384 GPUs", "expert exchange, GB per step", "Assumed:",
    ):  # fmt: skip
        assert part in text, part


def test_recomputation_trades_memory_for_time(tmp_path):
    content, text = planned(tmp_path, "--config", "launch/configs/dense_3b_tst.yaml")
    none, selective, full = content["recomputation"]
    activations = [way["memory_bytes"][0]["activations"] for way in (none, selective, full)]
    assert activations[0] >= activations[1] > 5 * activations[2]
    assert 1.2 < full["step_s"]["compute"] / none["step_s"]["compute"] < 4 / 3
    assert "selective" in text


def test_measured_takes_the_speed_of_a_run(tmp_path):
    lines = [{"step": 1, "loss": 9.0, "tflops_per_gpu": 3.0}, {"step": 1, "valid_loss": 9.0}]
    lines += [{"step": step, "loss": 8.0, "tflops_per_gpu": 900.0 + step} for step in (2, 3, 4, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    content, text = planned(tmp_path, "--config", "launch/configs/dense_270m_tst.yaml", "--measured", str(tmp_path))
    assert content["plan"]["speed"]["mfu"] == pytest.approx(903 / 2250)
    assert "measured in" in text


@pytest.mark.parametrize("tflops", [0.0, 900.0])
def test_a_measured_speed_above_the_gpus_peak_is_refused(tmp_path, tflops):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 9.0, "tflops_per_gpu": tflops}) + "\n")
    config = ("--config", "launch/configs/dense_270m_tst.yaml", "--gpu", "a100")
    done = plan(*config, "--measured", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        f"plan.py: error: --measured {tmp_path}: ran at {tflops:.3g} TFLOP/s; must lie between 0 and the 312 of a100\n"
    )


def test_an_mfu_that_communication_prevents_is_reported(tmp_path):
    config = ("--config", "launch/configs/moe_10b_tst.yaml", "--tensor-model-parallel-size", "4", "--sequence-parallel")
    content, text = planned(tmp_path, *config, "--mfu", "0.9")
    hours = sum(content["layout"]["step_s"][part] for part in ("compute", "bubble", "exposed")) * 49983 * 64 / 3600
    times = hours / content["plan"]["gpu_hours"]
    assert times > 1.5
    assert f"even so, the configured layout takes {times:.2f} times the hours above" in text
    assert "so that the configured layout takes the hours above" in planned(tmp_path, *config, "--mfu", "0.1")[1]


def test_a_configured_layout_that_does_not_fit_is_marked(tmp_path):
    config = ("--config", "launch/configs/dense_3b_tst.yaml")
    assert "(configured, does not fit)" in planned(tmp_path, *config, "--gpu", "h100")[1]
    assert "(configured, does not fit)" not in planned(tmp_path, *config)[1]


def test_too_few_available_data_tokens_are_reported(tmp_path):
    config = ("--config", "launch/configs/moe_10b_tst.yaml")
    text = planned(tmp_path, *config, "--data-tokens", "1e12")[1]
    assert "The configured run reads 1.99T data tokens, but 1T are available." in text
    assert "are available" not in planned(tmp_path, *config, "--data-tokens", "2e12")[1]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        ("--tst-preset 3b --gpu b300", "--gpu b300: unknown; choose from b200, h200, h100, a100"),
        ("--tst-preset 3b --mfu 2", "--mfu 2.0: must lie between 0 and 1"),
        ("--tst-preset 3b --num-gpus 0", "--num-gpus 0: must be at least 1"),
        ("--tst-preset 3b --train-iters 9", "--micro-batch-size None: a plan needs a number above 0"),
        ("--tst-preset 3b --measured nowhere", "--measured nowhere: holds no run with a logged step"),
        ("--tst-preset 3b --fp8", "--fp8"),
        ("--tst-preset 3b --num-gpus 4 --pipeline-model-parallel-size 6", "--num-gpus 4: is fewer than tp x pp x cp"),
        ("--tst-preset 3b --tensor-model-parallel-size 0", "--tensor-model-parallel-size 0: must be above 0"),
        ("--tst-preset 3b --global-batch-size -8", "--global-batch-size -8: must be above 0"),
        ("--tst-preset 3b --tst-bag-size 4", "--tst-bag-size 4: needs --tst-step-ratio"),
        ("--tst-preset 3b --usable-memory 90", "--usable-memory 90: must lie between 0 and 1"),
        ("--tst-preset 3b --json tests", "--json tests: is a folder; name a file"),
        ("--tst-preset 3b --json README.md/plan.json", "--json README.md/plan.json: cannot create the folder"),
        ("--tst-preset 3b --price-per-gpu-hour nan", "--price-per-gpu-hour nan: must be above 0"),
        ("--tst-preset 3b --data-tokens -5", "--data-tokens -5: must be above 0"),
        ("--tst-preset 3b --layouts 0", "--layouts 0: must be at least 1"),
    ],
)
def test_mistakes_are_named(argv, line):
    extra = "" if "train-iters" in argv else "--train-iters 10 --micro-batch-size 1"
    done = plan(*argv.split(), *extra.split())
    assert done.returncode == 2
    assert done.stderr.startswith("plan.py: error: ")
    assert line in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_impossible_layout_is_named_and_others_are_listed(tmp_path):
    content, text = planned(
        tmp_path, "--config", "launch/configs/dense_3b_tst.yaml", "--tensor-model-parallel-size", "8"
    )
    assert "cannot be used: --tensor-model-parallel-size 8: must divide --num-query-groups 4" in text
    assert content["fitting"]
