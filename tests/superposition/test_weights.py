import pytest
import torch

from megatron_tst.superposition import BAG_WEIGHTS, bag_weights
from tests.reference import weight_formula


@pytest.mark.parametrize("name", sorted(BAG_WEIGHTS))
@pytest.mark.parametrize("bag_size", [1, 2, 8, 16])
def test_weights_follow_the_formula(name, bag_size):
    raw = [weight_formula(name, i) for i in range(1, bag_size + 1)]
    weights = bag_weights(name, bag_size)
    assert weights.dtype == torch.float32
    assert weights.tolist() == pytest.approx([value / sum(raw) for value in raw], rel=1e-6)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)


def test_all_five_weightings_differ():
    rows = {tuple(bag_weights(name, 4).tolist()) for name in BAG_WEIGHTS}
    assert len(rows) == len(BAG_WEIGHTS) == 5


@pytest.mark.parametrize(("name", "bag_size"), [("flat", 4), ("uniform", 0)])
def test_unknown_names_and_empty_bags_are_refused(name, bag_size):
    with pytest.raises(ValueError, match=r"flat|at least 1"):
        bag_weights(name, bag_size)
