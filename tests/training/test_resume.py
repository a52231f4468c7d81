"""A resumed run equals an uninterrupted run bitwise, wherever it stopped."""

import json
from pathlib import Path

import pytest
import torch

from megatron_tst.config import UserError
from megatron_tst.data.documents import Skipped, read_documents
from megatron_tst.data.preprocess import write_indexed
from megatron_tst.model.attention import ScaledDotProductAttention
from megatron_tst.superposition import Phase
from megatron_tst.telemetry import read_metrics
from megatron_tst.training.step_timer import StepTimer
from tests.training.runs import arguments, build_here, parameters, train_here

# Dropout uses the RNG state, and a step accumulates two micro-batches; the switch is after step 4 of 8.
RUN = "--tst-bag-size 4 --tst-steps 4 --attention-dropout 0.1 --hidden-dropout 0.1"


@pytest.fixture(params=["", "--bf16", "--use-distributed-optimizer", "--async-save --save-interval 1"])
def kind(request):
    return request.param


@pytest.fixture
def argv(corpus, tokenizer, tmp_path: Path):
    def build(name: str, extra: str = "", load: str | None = None) -> list[str]:
        load = f"--load {tmp_path / load / 'checkpoints'}" if load else ""
        return arguments(corpus, str(tokenizer.path), tmp_path / name, f"{RUN} {extra} {load}")

    return build


def curve(run) -> list[dict]:
    """Return everything that was logged except times."""
    lines = read_metrics(run.directory.metrics)
    timed = ("_time_s", "_per_s", "tflops_per_gpu", "memory_gib", "gpu_hours")
    return [{name: value for name, value in line.items() if not name.endswith(timed)} for line in lines]


def assert_same_run(run, other):
    assert curve(run) == curve(other)
    weights = parameters(other)
    for name, value in parameters(run).items():
        assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("stop", [3, 4, 5, 7], ids=["in the phase", "at the switch", "after it", "in recovery"])
def test_a_resumed_run_equals_an_uninterrupted_one(here, argv, kind, stop):
    whole = train_here(argv("whole", kind))
    train_here(argv("stopped", f"{kind} --exit-interval {stop}"))
    resumed = train_here(argv("stopped", kind, load="stopped"))
    assert resumed.first_step == stop
    assert_same_run(resumed, whole)


def test_hours_are_counted_over_all_starts(here, argv, monkeypatch):
    """The run logs every other step and is stopped after the third; the patched timer reports one hour per step."""
    monkeypatch.setattr(StepTimer, "seconds", property(lambda timer: 3600.0 * timer.steps))
    train_here(argv("stopped", "--exit-interval 3 --log-interval 2"))
    run = train_here(argv("stopped", "--log-interval 2", load="stopped"))
    hours = {line["step"]: line["gpu_hours"] for line in read_metrics(run.directory.metrics) if "loss" in line}
    assert hours == {step: pytest.approx(step) for step in (2, 4, 6, 8)}


@pytest.mark.parametrize("forgotten", ["--no-load-optim", "--no-load-rng"])
def test_a_resumption_without_optimizer_or_rng_state_differs(here, argv, forgotten):
    whole = train_here(argv("whole"))
    train_here(argv("stopped", "--exit-interval 3"))
    resumed = train_here(argv("stopped", forgotten, load="stopped"))
    assert curve(resumed)[:3] == curve(whole)[:3]
    assert curve(resumed) != curve(whole)


def test_a_run_killed_after_a_save_repeats_only_later_steps(here, argv, tmp_path: Path):
    """The metrics of repeated steps are dropped; those of saved steps are kept."""
    whole = train_here(argv("whole", "--save-interval 3"))
    folder = tmp_path / "whole" / "checkpoints"
    for step in (4, 6, 8):
        (folder / f"iter_{step:07d}").rename(tmp_path / f"gone{step}")
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    before = curve(whole)
    assert curve(train_here(argv("whole", "--save-interval 3", load="whole"))) == before


def test_a_run_stopped_before_its_first_checkpoint_starts_from_scratch(here, argv, tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 5.0}\n')
    assert curve(train_here(argv("run", load="run"))) == curve(train_here(argv("whole")))


def test_a_larger_train_iters_prolongs_only_the_last_phase(here, argv, tmp_path: Path):
    """With a constant learning rate and --tst-steps, the run equals one that was longer from the start."""
    rate = "--lr-decay-style constant --tst-step-ratio 0 --eval-iters 0"
    longer = train_here(argv("longer", f"{rate} --train-iters 12"))
    train_here(argv("short", rate))
    prolonged = train_here(argv("short", f"{rate} --train-iters 12", load="short"))
    assert prolonged.schedule.phases == (Phase(4, 4), Phase(1, 8))
    assert_same_run(prolonged, longer)
    state = json.loads((tmp_path / "short" / "checkpoints" / "iter_0000012" / "run_state.json").read_text())
    assert [phase["num_steps"] for phase in state["phases"]] == [4, 8]
    assert state["samples_per_phase"] == [16, 32]


def test_a_step_ratio_refers_to_the_originally_planned_steps(here, corpus, tokenizer, tmp_path: Path):
    ratio = "--tst-bag-size 4 --tst-step-ratio 0.5 --eval-iters 0"
    train_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", ratio))
    longer = f"{ratio} --train-iters 12 --load {tmp_path / 'run' / 'checkpoints'}"
    run = train_here(arguments(corpus, str(tokenizer.path), tmp_path / "run", longer))
    assert run.schedule.phases == (Phase(4, 4), Phase(1, 8))


def test_a_finished_run_takes_no_further_step(here, argv):
    whole = train_here(argv("run"))
    before = curve(whole)
    again = train_here(argv("run", load="run"))
    assert (again.first_step, curve(again)) == (8, before)


CHANGED = {
    "--tst-bag-size 2": "--tst-bag-size 2: the checkpoint was made with 4",
    "--tst-steps 3": "--tst-steps 3: the checkpoint was made with 4",
    "--seed 7": "--seed 7: the checkpoint was made with 1234",
    "--seq-length 8": "--seq-length 8: the checkpoint was made with 16",
    "--split 80,20,0": "--split 80,20,0: the checkpoint was made with 90,10,0",
    "--global-batch-size 8": "--global-batch-size 8: the checkpoint was made with 4",
    "--tst-bag-weights power_law": "--tst-bag-weights power_law: the checkpoint was made with uniform",
    "--eod-mask-loss": "--eod-mask-loss True: the checkpoint was made with False",
}
OTHER_MODEL = {
    "--num-layers 3": "--num-layers 3: the checkpoint was made with 2; another model cannot load it",
    "--bf16": "--bf16 True: the checkpoint was made with False; its optimizer state has another shape",
    "--vocab-size 301": "--vocab-size 301: the checkpoint's vocabulary has 300 tokens",
    "--train-iters 4 --tst-steps 4": "--train-iters 4: ends before the checkpoint's last phase begins",
    "--train-iters 5": "--train-iters 5: .* is from step 6",
}


@pytest.fixture(scope="module")
def stopped(corpus, tokenizer, tmp_path_factory):
    """The folder of a run that stopped after step 6, trained once for all refusals."""
    return tmp_path_factory.mktemp("stopped")


@pytest.fixture
def changed(here, corpus, tokenizer, stopped: Path):
    if not (stopped / "run" / "checkpoints").exists():
        train_here(arguments(corpus, str(tokenizer.path), stopped / "run", f"{RUN} --exit-interval 6"))

    def start(extra: str, name: str):
        load = f"--load {stopped / 'run' / 'checkpoints'}"
        return build_here(arguments(corpus, str(tokenizer.path), stopped / name, f"{RUN} {extra} {load}"))

    return start


@pytest.mark.parametrize("extra", CHANGED)
def test_a_changed_schedule_or_dataset_is_refused_by_name(changed, extra):
    with pytest.raises(UserError, match=CHANGED[extra]):
        changed(extra, "refused")
    run = changed(f"{extra} --override-run-config", f"override {extra}")
    assert run.first_step == 6
    run.directory.leave()


@pytest.mark.parametrize("extra", OTHER_MODEL)
def test_a_change_that_cannot_be_loaded_is_refused_despite_override(changed, extra):
    with pytest.raises(UserError, match=OTHER_MODEL[extra]):
        changed(extra, "refused")
    if not extra.startswith("--train-iters 4"):
        with pytest.raises(UserError, match=OTHER_MODEL[extra]):
            changed(f"{extra} --override-run-config", "refused")


def test_another_corpus_is_refused(here, changed, corpus, tokenizer, stopped: Path):
    text = stopped / "other.txt"
    text.write_text("Other words.\n" * 4000)
    other = write_indexed(read_documents([text], "text", Skipped()), tokenizer, stopped / "other").prefix
    with pytest.raises(UserError, match=r"other: is not the corpus"):
        changed(f"--data-path {other}", "refused")


def test_a_corpus_may_move_to_another_path(here, changed, corpus, stopped: Path):
    for ending in ("bin", "idx"):
        (stopped / f"moved.{ending}").write_bytes(Path(f"{corpus}.{ending}").read_bytes())
    run = changed(f"--data-path {stopped / 'moved'}", "moved run")
    assert run.first_step == 6
    run.directory.leave()


def test_finetune_starts_at_the_first_step(changed, stopped: Path):
    """The paper's protocol: weights from superposition are trained further with bag size 1."""
    run = changed("--finetune --tst-bag-size 1 --tst-steps 0 --seed 5", "finetuned")
    fresh = changed("--tst-bag-size 1 --tst-steps 0 --seed 5 --override-run-config", "overridden")
    assert (run.first_step, fresh.first_step) == (0, 6)
    assert run.schedule.phases == (Phase(1, 8),)
    for name, value in parameters(run).items():
        assert torch.equal(value, parameters(fresh)[name]), name
    assert not run.stepper.train_state.optimizer.state_dict()["state"]
    run.directory.leave()
    fresh.directory.leave()


def test_a_foreign_checkpoint_needs_finetune(changed, here, argv, tmp_path: Path):
    train_here(argv("foreign"))
    folder = tmp_path / "foreign" / "checkpoints" / "iter_0000008"
    for name in ("run_state.json", "config.yaml", "SHA256SUMS"):
        (folder / name).unlink()
    with pytest.raises(UserError, match=r"has no run_state.json: only its weights can be used; add --finetune"):
        build_here(argv("refused", load="foreign"))
    run = build_here(argv("taken", "--finetune", load="foreign"))
    assert run.first_step == 0
    run.directory.leave()


def test_extra_states_of_other_layer_implementations_may_be_absent(here, argv, monkeypatch):
    """Transformer Engine's attention has a state that a checkpoint of megatron-core's local layers does not hold."""
    train_here(argv("run"))
    given = []
    monkeypatch.setattr(ScaledDotProductAttention, "get_extra_state", lambda _: torch.empty(0), raising=False)
    monkeypatch.setattr(
        ScaledDotProductAttention, "set_extra_state", lambda _, state: given.append(state), raising=False
    )
    run = build_here(argv("again", load="run"))
    assert (run.first_step, given) == (8, [None, None])
    run.directory.leave()


def test_ckpt_step_loads_an_older_checkpoint(here, argv):
    train_here(argv("run", "--save-interval 3"))
    run = build_here(argv("again", "--ckpt-step 3", load="run"))
    assert run.first_step == 3
    run.directory.leave()
    with pytest.raises(UserError, match=r"--ckpt-step 5: .* holds \[3, 4, 6, 8\]"):
        build_here(argv("again", "--ckpt-step 5", load="run"))


def test_exit_on_missing_checkpoint_refuses_an_empty_folder(here, argv):
    with pytest.raises(UserError, match=r"--load .*: holds no checkpoint \(--exit-on-missing-checkpoint\)"):
        build_here(argv("run", "--exit-on-missing-checkpoint", load="nowhere"))


def test_keep_last_keeps_the_newest_and_those_at_phase_ends(here, argv, tmp_path: Path):
    train_here(argv("run", "--save-interval 1 --keep-last 2 --train-iters 10"))
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*"))
    assert kept == [f"iter_{step:07d}" for step in (4, 8, 9, 10)]


def test_finetune_without_load_is_refused(here, argv):
    with pytest.raises(UserError, match="--finetune: needs --load"):
        build_here(argv("run", "--finetune"))
