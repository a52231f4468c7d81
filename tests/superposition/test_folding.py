import pytest
import torch

from megatron_tst.superposition import fold_labels, fold_tokens, slide_labels
from tests.reference import targets_of_text


@pytest.mark.parametrize("bag_size", [1, 2, 3, 6])
def test_folding_equals_a_loop_over_the_text(bag_size):
    text = torch.randint(0, 50, (3, 12 * bag_size + 1))
    bags = fold_tokens(text[:, :-1], bag_size)
    targets = fold_labels(text[:, 1:], bag_size)
    assert bags.shape == targets.shape == (3, 12, bag_size)
    for row, sequence in enumerate(text.tolist()):
        assert bags[row].flatten().tolist() == sequence[:-1]
        assert targets[row].tolist() == targets_of_text(sequence, bag_size)


def test_last_position_keeps_one_target():
    targets = fold_labels(torch.arange(1, 13).unsqueeze(0), 4)
    assert targets[0, -1].tolist() == [12, -100, -100, -100]


def test_unshifted_labels_differ_from_the_targets():
    text = list(range(25))
    unshifted = fold_tokens(torch.tensor([text[1:]]), 4)[0].tolist()
    assert unshifted != targets_of_text(text, 4)


@pytest.mark.parametrize("fold", [fold_tokens, fold_labels])
@pytest.mark.parametrize(("length", "bag_size", "rule"), [(10, 4, "do not fold"), (10, 0, "at least 1")])
def test_length_that_bags_do_not_divide_is_refused(fold, length, bag_size, rule):
    with pytest.raises(ValueError, match=rule):
        fold(torch.zeros(1, length, dtype=torch.long), bag_size)


@pytest.mark.parametrize("bag_size", [1, 3])
def test_slid_targets_are_the_next_tokens_of_each_token(bag_size):
    text = torch.randint(0, 50, (2, 9))
    targets = slide_labels(text[:, 1:], bag_size)
    for row, sequence in enumerate(text.tolist()):
        padded = sequence[1:] + [-100] * (bag_size - 1)
        assert targets[row].tolist() == [padded[j : j + bag_size] for j in range(8)]
