"""Overlapped gradient reduction and parameter gathering, in small and padded buckets, train as one rank does."""

import os

import pytest
import torch
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup

from megatron_tst.training.step import Stepper
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout
from tests.distributed.test_layouts import DENSE, MOE, TIED, assert_same_training, setup  # noqa: F401

pytestmark = pytest.mark.distributed

SHARDED = "--use-distributed-optimizer"
# Buckets end between nearly all parameters, also after norms, which do not fill a bucket of the distributed optimizer.
REDUCE = "--overlap-grad-reduce --ddp-bucket-size 200"
OVERLAPS = {"": "", "reduce": REDUCE, "reduce, sharded": f"{SHARDED} {REDUCE}"}
OVERLAPS["gather"] = f"{OVERLAPS['reduce, sharded']} --overlap-param-gather"
PP2 = "--pipeline-model-parallel-size 2"
EP2 = "--expert-model-parallel-size 2"
# Four data-parallel ranks share four sequences.
SINGLE = "--micro-batch-size 1"

# name: (model, ranks, flags of the layout, flags that the run on one rank has too)
LAYOUTS = {
    "dp2": (DENSE, 2, "", ""),
    "dp4": (DENSE, 4, "", SINGLE),
    "dp2-tied": (TIED, 2, "", ""),
    "tp2-dp2": (DENSE, 4, "--tensor-model-parallel-size 2", ""),
    "cp2-dp2": (DENSE, 4, "--context-parallel-size 2", ""),
    "pp2-dp2": (DENSE, 4, PP2, ""),
    "pp2-dp2-tied": (TIED, 4, PP2, ""),
    "pp2-dp2-interleaved": (DENSE, 4, f"{PP2} --num-layers-per-virtual-pipeline-stage 1", SINGLE),
    "dp2-experts": (MOE, 2, "", ""),
    "ep2": (MOE, 2, EP2, ""),
    "ep2-dp2": (MOE, 4, EP2, SINGLE),
    "pp2-cp2-ep2": (MOE, 4, f"{PP2} --context-parallel-size 2 {EP2}", ""),
    "tp2-sp-pp2-ep2": (MOE, 8, f"--tensor-model-parallel-size 2 --sequence-parallel {PP2} {EP2}", ""),
}
# One case of each kind; the others take minutes.
ORDINARY = [
    ("dp2", "reduce"),
    ("tp2-dp2", "gather"),
    ("cp2-dp2", "gather"),
    ("pp2-dp2-tied", "gather"),
    ("pp2-dp2-interleaved", "gather"),
    ("ep2-dp2", "gather"),
]
LONG = [(name, overlap) for name in LAYOUTS for overlap in OVERLAPS if (name, overlap) not in ORDINARY]


@pytest.mark.parametrize(("name", "overlap"), [*ORDINARY, *(pytest.param(*c, marks=pytest.mark.long) for c in LONG)])
def test_overlapped_layout_trains_as_one_rank_does(setup, name, overlap):  # noqa: F811
    argv, one_rank = setup
    model, world_size, flags, shared = LAYOUTS[name]
    initial, alone = one_rank(model, shared)
    arguments = argv(f"{name} {overlap}", model, f"{shared} {flags} {OVERLAPS[overlap]}")
    ranks = run_distributed(train_layout, world_size, arguments, initial)
    assert_same_training(alone, ranks)
    # Only the first stage has several buckets, because megatron-core does not split the buffers of other stages.
    assert len(ranks[0].padding) > 4 or not overlap
    assert sum(map(bool, ranks[0].padding)) > 1 or overlap in ("", "reduce")


def train_with_a_step_not_applied(argv, initial):
    """Train with a NaN loss on the last rank in the third step, which no rank applies."""
    train, loss, steps = Stepper.train, Stepper.micro_batch_loss, []

    def counted(stepper, batches):
        steps.append(None)
        return train(stepper, batches)

    def poisoned(stepper, rows, global_weight):
        is_here = len(steps) == 3 and os.environ["RANK"] == "1"
        return tuple(value * (torch.nan if is_here else 1) for value in loss(stepper, rows, global_weight))

    Stepper.train, Stepper.micro_batch_loss = counted, poisoned
    return train_layout(argv, initial)


def test_skipped_step_leaves_gathered_parameters_unchanged(setup):  # noqa: F811
    argv, one_rank = setup
    initial, _ = one_rank(DENSE)
    plain, overlapped = (
        run_distributed(train_with_a_step_not_applied, 2, argv(f"not applied {name}", DENSE, OVERLAPS[name]), initial)
        for name in ("", "gather")
    )
    assert len(plain[0].losses) == 7
    assert overlapped[0].losses == pytest.approx(plain[0].losses, rel=1e-5)
    assert overlapped[0].valid == pytest.approx(plain[0].valid, rel=1e-5)


def train_ungathered(argv, initial):
    """Train without waiting for the parameters that other ranks have updated."""
    _ParamAndGradBucketGroup.finish_param_sync = lambda *_, **__: None
    return train_layout(argv, initial)


def test_comparison_fails_if_parameters_are_not_gathered(setup):  # noqa: F811
    argv, one_rank = setup
    initial, alone = one_rank(DENSE)
    ranks = run_distributed(train_ungathered, 2, argv("ungathered", DENSE, OVERLAPS["gather"]), initial)
    with pytest.raises(AssertionError):
        assert_same_training(alone, ranks)
