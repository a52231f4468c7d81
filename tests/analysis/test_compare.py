"""Comparisons of runs, checked against arithmetic by hand and against the paper's statements about its runs."""

import dataclasses
import math
from pathlib import Path

import pytest

from megatron_tst.analysis.compare import Estimate, counterpart, difference, find_methods, speed_ups
from megatron_tst.analysis.curves import RunCurve, read_curve, read_curves
from megatron_tst.analysis.verdict import report, sentences
from megatron_tst.config import UserError, dump_config, load_config
from megatron_tst.telemetry import RunDirectory
from tests.telemetry.finished import write_run


def run(method, steps, loss, seed=1, tokens_per_step=1.0, name=None):
    axes = {"steps": [steps], "data_tokens": [steps * tokens_per_step], "flops": [7.0 * steps], "gpu_hours": [steps]}
    return RunCurve(name or f"{method}-{steps}", seed, {}, method, str(steps), [loss], axes, [], [1], None)


def methods(*runs):
    return find_methods(runs)


PAPER_3B = (
    run("base", 20000, 2.808), run("base", 36000, 2.677), run("base", 50000, 2.640),
    run("tst", 20000, 2.676, tokens_per_step=2.5),
)  # fmt: skip


def test_the_papers_3b_runs_give_the_papers_conclusions():
    """Table 1 of the paper compares at equal FLOPs, data and loss with baselines of 20, 50 and 36 thousand steps."""
    baseline, tst = methods(*PAPER_3B)
    assert [group.num_steps for group in baseline.groups] == [20000, 36000, 50000]
    (group,) = tst.groups
    equal_flops, equal_data = counterpart(group, baseline, "flops"), counterpart(group, baseline, "data_tokens")
    assert (equal_flops.num_steps, equal_data.num_steps) == (20000, 50000)
    assert difference(group, equal_flops).value == pytest.approx(2.676 - 2.808)
    assert difference(group, equal_data).value == pytest.approx(2.676 - 2.640)
    (speed_up,) = speed_ups(tst, baseline)
    # By hand, the loss is reached 1/37 of the way from 36 to 50 thousand steps.
    assert speed_up.ratio.value == pytest.approx(1.8 * (50 / 36) ** (1 / 37))
    assert speed_up.ratio.error is None


def test_shorter_runs_of_the_method_give_a_speed_up_too():
    baseline, tst = methods(run("base", 100, 2.5), run("tst", 50, 2.6), run("tst", 80, 2.4))
    (speed_up,) = speed_ups(tst, baseline)
    assert speed_up.anchor.name == "base-100"
    assert speed_up.ratio.value == pytest.approx(100 / math.sqrt(50 * 80))
    assert speed_up.ratio.value != pytest.approx(100 / 65)


SEEDED = [
    (run("base", 100, loss, seed), run("tst", 50, first, seed), run("tst", 80, last, seed))
    for seed, loss, first, last in ((1, 2.5, 2.6, 2.4), (2, 2.5, 2.7, 2.3), (3, 2.55, 2.6, 2.4))
]


def test_the_speed_up_has_the_jackknife_standard_error():
    baseline, tst = methods(*(run for seed in SEEDED for run in seed))
    (speed_up,) = speed_ups(tst, baseline)

    def by_hand(*seeds):
        loss, above, below = (sum(SEEDED[seed][place].final_loss for seed in seeds) / len(seeds) for place in range(3))
        return 100 / (50 * 1.6 ** ((above - loss) / (above - below)))

    assert speed_up.ratio.value == pytest.approx(by_hand(0, 1, 2))
    left_out = [by_hand(1, 2), by_hand(0, 2), by_hand(0, 1)]
    mean = sum(left_out) / 3
    error = math.sqrt(2 / 3 * sum((value - mean) ** 2 for value in left_out))
    assert speed_up.ratio.error == pytest.approx(error)
    assert error > 0.01
    assert difference(tst.groups[1], baseline.groups[0]).value == pytest.approx((-0.1 - 0.2 - 0.15) / 3)


def test_unequal_seeds_leave_the_standard_error_unknown():
    """Three runs of one method and a baseline of another seed: the effect of the baseline's seed is unknown."""
    runs = [pair for seed in SEEDED for pair in seed[1:]]
    baseline, tst = methods(run("base", 100, 2.5, seed=7), *runs)
    assert difference(tst.groups[1], baseline.groups[0]).error is None
    (speed_up,) = speed_ups(tst, baseline)
    assert (speed_up.ratio.value > 1, speed_up.ratio.error) == (True, None)
    both = methods(run("base", 100, 2.5, seed=7), run("base", 100, 2.6, seed=8), *runs)
    baseline, tst = both
    # The means are independent, so the squares of their errors add up.
    errors = [tst.groups[1].final_loss.error, 0.05]
    assert difference(tst.groups[1], baseline.groups[0]).error == pytest.approx(math.hypot(*errors))


def test_the_jackknife_of_a_mean_is_its_standard_error():
    """Both agree for a speed-up that is linear in the loss; here its logarithm is, which is linear in a small range."""
    losses = (2.501, 2.499, 2.503)
    runs = [
        run(method, steps, loss, seed)
        for seed, base in enumerate(losses)
        for method, steps, loss in (("base", 100, base), ("tst", 50, 2.6), ("tst", 80, 2.4))
    ]
    baseline, tst = methods(*runs)
    (speed_up,) = speed_ups(tst, baseline)
    slope = speed_up.ratio.value * math.log(80 / 50) / 0.2
    assert speed_up.ratio.error == pytest.approx(slope * baseline.groups[0].final_loss.error, rel=1e-2)


def test_ends_that_cross_several_times_give_no_speed_up():
    noisy = {50: 2.7, 60: 2.6, 70: 2.7, 80: 2.4}
    baseline, tst = methods(run("base", 100, 2.65), *(run("tst", steps, loss) for steps, loss in noisy.items()))
    lower, upper = speed_ups(tst, baseline)
    assert (lower.ratio, upper.ratio) == (pytest.approx(100 / 60), pytest.approx(100 / 70))
    (said,) = (line for line in sentences([baseline, tst]) if line.startswith("Equal loss"))
    assert "is not known: tst-60 ends 0.0500 nats below base-100, so at least 1.67 x, but tst-70 ends 0.0500" in said
    # With a second seed of opposite noise, the means fall with the length and cross once.
    other = {50: 2.7, 60: 2.7, 70: 2.5, 80: 2.5}
    second = [run("base", 100, 2.65, seed=2), *(run("tst", steps, loss, seed=2) for steps, loss in other.items())]
    baseline, tst = methods(*(one for method in (baseline, tst) for g in method.groups for one in g.runs), *second)
    (speed_up,) = speed_ups(tst, baseline)
    assert speed_up.ratio.value == pytest.approx(100 / 60)
    assert speed_up.ratio.error is None
    (said,) = (line for line in sentences([baseline, tst]) if line.startswith("Equal loss"))
    assert "is 1.67 x at the 2.6500 nats of base-100 (the mean of 2 seeds, uncertainty unknown)" in said


def test_a_baseline_with_fewer_seeds_enters_with_its_mean():
    """The comparison uses the table's values: 2.5 for the baseline, the mean of three seeds for the other."""
    baseline, tst = methods(SEEDED[0][0], *(pair[2] for pair in SEEDED))
    gap = difference(tst.groups[0], baseline.groups[0])
    assert (gap.value, gap.error) == (pytest.approx((2.4 + 2.3 + 2.4) / 3 - 2.5), None)


def test_a_missing_jackknife_value_leaves_the_error_unknown():
    (base, *_), (_, short, long) = SEEDED[0], SEEDED[1]
    baseline, tst = methods(base, run("base", 100, 2.9, 2), run("tst", 50, 2.75), run("tst", 80, 2.6), short, long)
    # Seed 2 alone is below 2.9 already in the shorter run; the means 2.725 and 2.45 enclose 2.7.
    (speed_up,) = speed_ups(tst, baseline)
    assert speed_up.ratio.value == pytest.approx(100 / (50 * 1.6 ** (0.025 / 0.275)))
    assert speed_up.ratio.error is None


@pytest.mark.parametrize(
    ("losses", "ratio", "is_lower"),
    [({50: 2.4, 100: 2.3}, 2.0, True), ({50: 2.7, 100: 2.6}, 1.0, False), ({200: 2.4}, 0.5, True)],
)
def test_ends_that_do_not_enclose_a_loss_give_bounds(losses, ratio, is_lower):
    baseline, tst = methods(run("base", 100, 2.5), *(run("tst", steps, loss) for steps, loss in losses.items()))
    (bound,) = speed_ups(tst, baseline)
    assert (bound.ratio, bound.is_lower) == (ratio, is_lower)


def test_noisy_ends_give_bounds_on_both_sides():
    """The longer run ends higher because of noise, so both bounds are reported."""
    baseline, tst = methods(run("base", 100, 2.5), run("tst", 50, 2.4), run("tst", 80, 2.6))
    lower, upper = speed_ups(tst, baseline)
    assert (lower.ratio, lower.is_lower, upper.ratio, upper.is_lower) == (2.0, True, 1.25, False)


def test_a_crossing_in_the_middle_of_a_run_is_no_speed_up(tmp_path: Path):
    """The curve is below the baseline's end at half of its steps, but only its end counts."""
    write_run(tmp_path / "base", [4.0, 3.0, 2.8, 2.5])
    write_run(tmp_path / "tst", [4.0, 2.4, 2.4, 2.3], bag_size=4, superposed=1)
    baseline, tst = find_methods([read_curve(tmp_path / name) for name in ("base", "tst")])
    (bound,) = speed_ups(tst, baseline)
    assert (bound.ratio, bound.is_lower) == (1.0, True)


def test_runs_of_one_method_differ_in_seed_and_length(tmp_path: Path):
    write_run(tmp_path / "base-seed1", [3.0, 2.5, 2.4])
    write_run(tmp_path / "base-seed2", [3.0, 2.5, 2.6], seed=2)
    write_run(tmp_path / "s4", [4.0, 3.0, 2.0], bag_size=4, superposed=1)
    write_run(tmp_path / "s4-long", [4.0, 4.0, 3.0, 3.0, 2.0, 2.0], bag_size=4, superposed=2)
    write_run(tmp_path / "s2", [4.0, 3.0, 2.0], bag_size=2, superposed=1)
    found = find_methods([read_curve(path) for path in sorted(tmp_path.iterdir())])
    assert [[group.name for group in method.groups] for method in found] == [["base"], ["s2"], ["s4", "s4-long"]]
    (base,) = found[0].groups
    assert base.final_loss == Estimate(2.5, pytest.approx(0.1))
    assert base.final_loss.write(3) == "2.500 ± 0.100"
    assert [Estimate(value, 0.1).signed(1) for value in (0.2, -0.2)] == ["+0.2 ± 0.1", "-0.2 ± 0.1"]
    assert find_methods([read_curve(tmp_path / "s2")])[0].groups[0].final_loss.error is None


OTHER = {
    "data": {"data_path": ("other",)},
    "optimizer": {"adam_eps": 1e-6},
    "model": {"hidden_dropout": 0.0},
    "training": {"bf16": True},
}


@pytest.mark.parametrize("section", OTHER)
def test_runs_with_different_settings_are_not_seeds_of_one_group(tmp_path: Path, section):
    first, second = write_run(tmp_path / "a", [3.0, 2.5]), write_run(tmp_path / "b", [3.0, 2.7], seed=2)
    config = load_config(second / "config.yaml")
    assert len(find_methods(map(read_curve, (first, second)))) == 1
    changed = dataclasses.replace(getattr(config, section), **OTHER[section])
    (second / "config.yaml").write_text(dump_config(dataclasses.replace(config, **{section: changed})))
    assert len(find_methods(map(read_curve, (first, second)))) == 2


def with_text(run: Path, data_path: str, tokenizer: str, corpora: str | None) -> Path:
    """Let a run have read a corpus and a tokenizer, and have recorded what identifies them."""
    config = load_config(run / "config.yaml")
    data = dataclasses.replace(config.data, data_path=(data_path,), tokenizer_model=tokenizer)
    (run / "config.yaml").write_text(dump_config(dataclasses.replace(config, data=data)))
    if corpora is not None:
        RunDirectory(run).record_text(tokenizer="the same", corpora=corpora)
    return run


@pytest.mark.parametrize(
    ("second", "groups"),
    [
        (("/b/corpus", "/b/tokenizer.json", "1234"), 1),
        # Another corpus of the same name, and two names of which it is not known what they hold.
        (("/a/corpus", "/a/tokenizer.json", "5678"), 2),
        (("/b/corpus", "/b/tokenizer.json", None), 2),
    ],
)
def test_seeds_are_grouped_by_the_content_of_their_text(tmp_path: Path, second, groups):
    one, other = write_run(tmp_path / "a", [3.0, 2.5]), write_run(tmp_path / "b", [3.0, 2.7], seed=2)
    with_text(one, "/a/corpus", "/a/tokenizer.json", None if second[2] is None else "1234")
    with_text(other, *second)
    assert len(find_methods(map(read_curve, (one, other)))) == groups


def test_another_warm_up_makes_another_group_of_the_same_method(tmp_path: Path):
    first, second = write_run(tmp_path / "a", [3.0, 2.5]), write_run(tmp_path / "b", [3.0, 2.7], seed=2)
    config = load_config(second / "config.yaml")
    warm = dataclasses.replace(config.optimizer, lr_warmup_iters=3)
    (second / "config.yaml").write_text(dump_config(dataclasses.replace(config, optimizer=warm)))
    (method,) = find_methods(map(read_curve, (first, second)))
    assert [len(group.runs) for group in method.groups] == [1, 1]


def test_runs_with_equal_names_get_their_folders_name(tmp_path: Path):
    for method, bag_size in (("base", 1), ("tst", 4)):
        for seed in (1, 2):
            superposed = int(bag_size > 1)
            write_run(tmp_path / method / f"seed{seed}", [3.0, 2.5], bag_size, superposed, seed)
    paths = sorted(tmp_path.glob("*/*"))
    assert [method.name for method in find_methods(read_curves(paths))] == ["base", "tst"]
    # Seeds of one method keep their names.
    assert [curve.name for curve in read_curves(paths[:2])] == ["seed1", "seed2"]


def test_different_settings_and_text_are_reported(tmp_path: Path):
    first, second = write_run(tmp_path / "a", [3.0, 2.5]), write_run(tmp_path / "b", [3.0, 2.7])
    config = load_config(second / "config.yaml")
    optimizer = dataclasses.replace(config.optimizer, lr=0.5)
    (second / "config.yaml").write_text(dump_config(dataclasses.replace(config, optimizer=optimizer)))
    text = "\n".join(sentences(find_methods(read_curves([first, second]))))
    assert f"Settings: b differs from a in --lr 0.5 (instead of {config.optimizer.lr})." in text
    assert "Losses per token are comparable" not in text
    data = dataclasses.replace(config.data, tokenizer_model="other.json")
    (second / "config.yaml").write_text(dump_config(dataclasses.replace(config, data=data)))
    text = "\n".join(sentences(find_methods(read_curves([first, second]))))
    assert "--tokenizer-model other.json (instead of None)" in text
    assert "Losses per token are comparable only if text and tokenizer are the same" in text
    assert "Settings" not in "\n".join(sentences(methods(*PAPER_3B)))


def test_the_same_run_twice_is_refused():
    with pytest.raises(UserError, match="a and b: have the same settings and seed 1"):
        methods(run("base", 100, 2.5, name="a"), run("base", 100, 2.6, name="b"))


@pytest.mark.parametrize(
    ("names", "common"),
    [
        (("tst-seed10", "tst-seed11"), "tst"),
        (("tst-500", "tst-5000"), "tst"),
        (("tst50-seed1", "tst50-seed2"), "tst50"),
        (("tst50", "tst100"), "tst"),
        (("run", "run"), "run"),
        (("a", "b"), "a"),
    ],
)
def test_common_names_consist_of_whole_words(names, common):
    (method,) = methods(*(run("m", 100, 2.5, seed=seed, name=name) for seed, name in enumerate(names)))
    assert method.groups[0].name == common


def test_metrics_of_another_version_are_named(tmp_path: Path):
    folder = write_run(tmp_path / "run", [3.0, 2.5])
    text = (folder / "metrics.jsonl").read_text().replace('"flops"', '"work"')
    (folder / "metrics.jsonl").write_text(text)
    with pytest.raises(UserError, match="has no flops in its metrics"):
        read_curve(folder)


def test_a_curve_is_read_from_a_run_directory(tmp_path: Path):
    curve = read_curve(write_run(tmp_path / "tst", [5.0, 4.5, 2.9, 2.5], bag_size=4, superposed=2))
    assert (curve.switches, curve.bag_sizes, curve.num_steps, curve.final_loss) == ([20], [4, 1], 40, 2.5)
    assert curve.total("data_tokens") == 64 * (20 * 4 + 20)
    assert (curve.recovery["spike"], curve.recovery["recovery_steps"]) == (0.25, 7)


def test_an_unfinished_run_is_refused(tmp_path: Path):
    folder = write_run(tmp_path / "run", [3.0, 2.5])
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    with pytest.raises(UserError, match="last evaluated after step 10 of 20"):
        read_curve(folder)


@pytest.mark.parametrize(
    ("decay_iters", "style", "is_refused"),
    [(21, "linear", True), (20, "linear", False), (10, "cosine", False), (21, "constant", False)],
)
def test_a_run_without_a_decayed_learning_rate_is_refused(tmp_path: Path, decay_iters, style, is_refused):
    folder = write_run(tmp_path / "run", [3.0, 2.5])
    config = load_config(folder / "config.yaml")
    optimizer = dataclasses.replace(config.optimizer, lr_decay_iters=decay_iters, lr_decay_style=style)
    (folder / "config.yaml").write_text(dump_config(dataclasses.replace(config, optimizer=optimizer)))
    if is_refused:
        with pytest.raises(UserError, match="--lr-decay-iters 21 is more than its 20 steps"):
            read_curve(folder)
    else:
        assert read_curve(folder).final_loss == 2.5


def test_a_final_loss_of_nan_is_refused(tmp_path: Path):
    folder = write_run(tmp_path / "run", [3.0, math.nan])
    with pytest.raises(UserError, match="ended with a validation loss of nan"):
        read_curve(folder)
    assert read_curve(write_run(tmp_path / "before", [math.nan, 2.5])).final_loss == 2.5


def test_a_report_is_titled_by_its_methods():
    assert report(methods(PAPER_3B[0]), "p.png").startswith("# base-20000\n")
    assert report(methods(*PAPER_3B), "p.png").startswith("# tst-20000 against base\n")


def test_a_comparison_yields_the_expected_sentences():
    text = "\n".join(sentences(methods(*PAPER_3B)))
    assert "Equal FLOPs: tst-20000 ends 0.1320 nats below base-20000, having read 2.5 x its data tokens." in text
    assert "Equal data: tst-20000 ends 0.0360 nats above base-50000, with 0.4 x its FLOPs." in text
    assert "the speed-up of tst-20000 over base is 1.82 x at the 2.6760 nats of tst-20000 (one seed" in text
    text = "\n".join(sentences(methods(PAPER_3B[0], PAPER_3B[3])))
    assert "tst-20000 read as many data tokens as base-20000 would in 50000 steps" in text
    ends = "tst-20000 ends 0.1320 nats below base-20000"
    open_question = "Shorter runs of tst-20000 or longer runs of base-20000 are needed"
    assert f"is not known from runs of one length: {ends}. {open_question}" in text
    text = "\n".join(sentences(methods(PAPER_3B[3], PAPER_3B[0])))
    ends = "base-20000 ends 0.1320 nats above tst-20000"
    assert f"is not known from runs of one length: {ends}. {open_question}" in text
