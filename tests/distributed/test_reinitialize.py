"""The vocabulary weights that are reinitialized at the switch are the same under every layout and in every copy."""

import pytest
import torch

from megatron_tst.training import loop
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import train_layout, whole
from tests.distributed.test_layouts import DENSE, TIED, assert_same_training, setup  # noqa: F401
from tests.distributed.test_overlap import OVERLAPS

pytestmark = pytest.mark.distributed

CONTROL = "--tst-reinitialize-at-switch"
LAYOUTS = {
    "tp2 of a padded vocabulary": (DENSE, 2, "--tensor-model-parallel-size 2 --make-vocab-size-divisible-by 128"),
    "dp2, gathering overlapped": (DENSE, 2, OVERLAPS["gather"]),
    "pp2, tied": (TIED, 2, "--pipeline-model-parallel-size 2"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_reinitializing_layout_trains_as_one_rank_does(setup, name):  # noqa: F811
    argv, one_rank = setup
    model, world_size, flags = LAYOUTS[name]
    initial, alone = one_rank(model, CONTROL)
    ranks = run_distributed(train_layout, world_size, argv(f"control {name}", model, f"{CONTROL} {flags}"), initial)
    assert_same_training(alone, ranks)


def test_sharded_main_weights_are_reinitialized(setup):  # noqa: F811
    argv, one_rank = setup
    bf16 = f"{CONTROL} --bf16 --accumulate-allreduce-grads-in-fp32"
    initial, alone = one_rank(DENSE, bf16)
    ranks = run_distributed(train_layout, 2, argv("bf16", DENSE, f"{bf16} {OVERLAPS['gather']}"), initial)
    assert ranks[0].losses == pytest.approx(alone.losses, abs=2e-2)
    plain = run_distributed(train_without_drawing, 1, argv("bf16 plain", DENSE, bf16), initial)[0]
    assert plain.losses[4:] != pytest.approx(alone.losses[4:], abs=4e-2)


def train_without_drawing(argv, initial):
    loop.reinitialize = lambda *_: None
    return train_layout(argv, initial)


def test_run_without_reinitialization_differs(setup):  # noqa: F811
    """Negative control of the comparison and of the values."""
    argv, one_rank = setup
    initial, alone = one_rank(DENSE, CONTROL)
    plain = run_distributed(train_without_drawing, 1, argv("plain", DENSE, CONTROL), initial)
    with pytest.raises(AssertionError):
        assert_same_training(alone, plain)
    name = "embedding.word_embeddings.weight"
    pair = torch.stack([whole(outcome.pieces)[name].flatten() for outcome in (alone, plain[0])])
    assert torch.corrcoef(pair)[0, 1] < 0.5
