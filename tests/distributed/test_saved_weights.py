"""A checkpoint holds the trained weights, and a run resumes from it bitwise, also with overlapped gathering.

With overlapped gathering, each rank has only the new weights of its own shard after a step.
"""

import os
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_tst.checkpoint import content
from megatron_tst.conversion.saved_checkpoints import find_saved_checkpoint
from megatron_tst.conversion.to_megatron import Import
from megatron_tst.conversion.torch_dist import StackedWeights
from megatron_tst.training.metrics_logger import MetricsLogger
from megatron_tst.training.run import Run
from megatron_tst.training.step import Stepper
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import Outcome, Piece, pieces, place, train_layout, whole
from tests.distributed.test_layouts import DENSE, MOE, setup  # noqa: F401
from tests.distributed.test_overlap import EP2, OVERLAPS, SINGLE
from tests.training.runs import start

pytestmark = pytest.mark.distributed

# The phase ends at step 4 of 8. A bfloat16 weight that is not the rounding of its float32 main weight is stale.
RUN = f"--bf16 --hidden-dropout 0.1 --attention-dropout 0.1 --save-interval 3 {OVERLAPS['gather']}"
INTERVAL, PHASE, SIGNAL, END = 3, 4, 7, 8
LAYOUTS = {"dp2": (DENSE, 2, ""), "ep2-dp2": (MOE, 4, f"{EP2} {SINGLE}")}
EVALUATIONS = {"never evaluated": "--eval-iters 0", "evaluated each step": "--eval-interval 1"}

# The weights that the next forward pass reads on this rank, by saved step.
Kept = dict[int, list[Piece]]


def train_and_keep(argv: list[str], signalled_after: int | None = None, gathers: bool = True) -> tuple[Outcome, Kept]:
    """Train and record the weights at each save; send a signal to only the last rank within a step."""
    kept: Kept = {}
    read: list[list] = []
    train, save, record = Stepper.train, Run.save, MetricsLogger.record

    def training(stepper, batches):
        read[:] = [batches]
        return train(stepper, batches)

    def saving(run, step, *rest):
        save(run, step, *rest)
        # A forward pass gathers the weights through its own hooks.
        run.stepper.evaluate(read[0])
        kept[step] = [(key, offset, shape, part.detach().clone()) for key, offset, shape, part in pieces(run)]

    def recording(monitor, step, *rest):
        if step == signalled_after and os.environ["RANK"] == str(int(os.environ["WORLD_SIZE"]) - 1):
            os.kill(os.getpid(), signal.SIGUSR1)
        record(monitor, step, *rest)

    Stepper.train, Run.save, MetricsLogger.record = training, saving, recording
    if not gathers:
        content.gather_weights = lambda _: None
    return train_layout(argv), kept


def checkpoints_of(arguments: list[str]) -> Path:
    return Path(arguments[arguments.index("--tst-run-dir") + 1]) / "checkpoints"


def saved_tensors(checkpoints: Path, step: int) -> dict[str, Tensor]:
    stored = StackedWeights(checkpoints / f"iter_{step:07d}")
    return {key: stored.read(key, ()) for key in stored.entries}


def num_stale(saved: dict[str, Tensor]) -> int:
    """Return the number of weights that are not the rounding of their main weights."""
    mains = {key: value for key, value in saved.items() if key.startswith("optimizer.state.param.")}
    assert len(mains) == sum(not key.startswith("optimizer.") for key in saved) > 5
    weights = {key: saved[key.removeprefix("optimizer.state.param.")] for key in mains}
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    return sum(int((weights[key] != main.bfloat16()).sum()) for key, main in mains.items())


def assert_holds_the_model(saved: dict[str, Tensor], parts: list[Piece]) -> None:
    for key, offset, _, part in parts:
        assert torch.equal(place(saved[key], offset, part).view_as(part), part), key


@pytest.fixture(scope="module")
def stopped(setup):  # noqa: F811
    """Return a function that trains a run of each layout once, until it receives a signal after step 7."""
    argv, _ = setup
    known: dict[tuple[str, str], tuple[list[str], list[Kept], Path]] = {}

    def train(layout: str, evaluation: str):
        if (layout, evaluation) not in known:
            model, world_size, flags = LAYOUTS[layout]
            arguments = argv(f"stopped {layout} {evaluation}", model, f"{flags} {RUN} {EVALUATIONS[evaluation]}")
            ranks = run_distributed(train_and_keep, world_size, arguments, SIGNAL)
            assert sum(map(bool, ranks[0][0].padding)) > 1
            known[layout, evaluation] = arguments, [kept for _, kept in ranks], checkpoints_of(arguments)
        return known[layout, evaluation]

    return train


CASES = [
    ("dp2", "never evaluated"),
    ("dp2", "evaluated each step"),
    ("ep2-dp2", "never evaluated"),
    pytest.param("ep2-dp2", "evaluated each step", marks=pytest.mark.long),
]


@pytest.mark.parametrize(("layout", "evaluation"), CASES)
def test_checkpoint_holds_the_trained_weights_and_resumes_bitwise(setup, stopped, layout, evaluation):  # noqa: F811
    argv, _ = setup
    arguments, ranks, checkpoints = stopped(layout, evaluation)
    model, world_size, flags = LAYOUTS[layout]
    resumed = run_distributed(train_and_keep, world_size, [*arguments, "--load", str(checkpoints)])
    for step in (INTERVAL, PHASE, SIGNAL, END):
        saved = saved_tensors(checkpoints, step)
        assert num_stale(saved) == 0, step
        for kept in ranks if step != END else [kept for _, kept in resumed]:
            assert_holds_the_model(saved, kept[step])

    undisturbed = argv(f"undisturbed {layout} {evaluation}", model, f"{flags} {RUN} {EVALUATIONS[evaluation]}")
    calm = run_distributed(train_layout, world_size, undisturbed)[0]
    outcome, _ = resumed[0]
    assert len(calm.losses) == END
    assert (outcome.losses, outcome.grad_norms, outcome.valid) == (calm.losses, calm.grad_norms, calm.valid)
    wanted, found = saved_tensors(checkpoints_of(undisturbed), END), saved_tensors(checkpoints, END)
    assert wanted.keys() == found.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def assert_export_is_the_model(checkpoints: Path, step: int, ranks: list[Kept], folder: Path) -> None:
    """Export a checkpoint with the command-line tool and compare its weights with those that the ranks read next."""
    exported = folder / "hf"
    done = start("tools/convert_ckpt.py", "--load", str(checkpoints), "--iteration", str(step), "--save", str(exported))
    assert done.returncode == 0, done.stderr
    Import(exported).write(folder / "back", exported / "tokenizer.json")
    found = find_saved_checkpoint(folder / "back", None)
    back = StackedWeights(found.folder)
    model = whole([piece for kept in ranks for piece in kept[step]])
    assert model.keys() <= back.entries.keys()
    for key, value in model.items():
        weight = back.read(key, ())
        # The export omits the rows that pad the vocabulary; no other tensor has as many rows.
        rows = slice(found.vocab_size)
        assert weight.dtype == torch.bfloat16 and torch.equal(weight[rows].float(), value[rows]), key


@pytest.mark.parametrize("layout", LAYOUTS)
def test_export_of_a_stopped_run_equals_its_model(stopped, tmp_path, layout):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    _, ranks, checkpoints = stopped(layout, "never evaluated")
    assert_export_is_the_model(checkpoints, SIGNAL, ranks, tmp_path)


def test_save_without_gathering_has_stale_weights(setup, tmp_path):  # noqa: F811
    """Negative control of the checks of checkpoint and export."""
    argv, _ = setup
    model, world_size, flags = LAYOUTS["ep2-dp2"]
    arguments = argv("ungathered save", model, f"{flags} {RUN} {EVALUATIONS['never evaluated']} --train-iters 5")
    ranks = [kept for _, kept in run_distributed(train_and_keep, world_size, arguments, None, False)]
    checkpoints = checkpoints_of(arguments)
    saved = saved_tensors(checkpoints, INTERVAL)
    assert num_stale(saved) > 1000
    with pytest.raises(AssertionError, match="weight"):
        assert_holds_the_model(saved, ranks[0][INTERVAL])
    with pytest.raises(AssertionError, match=r"torch\.equal"):
        assert_export_is_the_model(checkpoints, INTERVAL, ranks, tmp_path)
