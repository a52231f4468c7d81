import numpy
import pytest

from megatron_tst.data import document_split
from megatron_tst.data.document_split import split_into_phases, token_budgets


@pytest.fixture
def lengths():
    return numpy.random.default_rng(0).integers(1, 300, 5000).astype(numpy.int32)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(document_split, "BLOCK_DOCUMENTS", 700)


@pytest.mark.parametrize("budgets", [[300_000, 100_000, 200_000], [1_000, 1_000], [10**7, 10**7, 10**6], [5_000]])
def test_every_document_belongs_to_exactly_one_phase(lengths, budgets):
    owned = token_budgets(budgets, int(lengths.sum()), int(lengths.max()))
    parts = split_into_phases(lengths, 0, len(lengths), owned, seed=3)
    assert sorted(numpy.concatenate([part.documents for part in parts])) == list(range(len(lengths)))
    for part, budget in zip(parts, owned, strict=True):
        assert part.num_tokens == lengths[part.documents].sum()
        assert abs(part.num_tokens - budget) <= 2 * lengths.max()


def test_large_corpus_meets_every_budget_and_leaves_the_rest_to_the_last_phase(lengths):
    budgets = [200_000, 100_000, 50_000]
    total = int(lengths.sum())
    parts = split_into_phases(lengths, 0, len(lengths), token_budgets(budgets, total, int(lengths.max())), seed=3)
    assert all(part.num_tokens >= budget for part, budget in zip(parts, budgets, strict=True))
    assert parts[-1].num_tokens > total - sum(budgets[:-1]) - 4 * lengths.max()


def test_earlier_phases_keep_their_documents_in_a_longer_run(lengths):
    def first_documents(last_budget):
        owned = token_budgets([200_000, last_budget], int(lengths.sum()), int(lengths.max()))
        return split_into_phases(lengths, 0, len(lengths), owned, seed=3)[0].documents

    assert numpy.array_equal(first_documents(50_000), first_documents(400_000))


def test_small_corpus_is_divided_in_proportion(lengths):
    total = int(lengths.sum())
    owned = token_budgets([3 * total, total], total, int(lengths.max()))
    assert owned == [total * 3 // 4, total - total * 3 // 4]


def test_split_is_random_and_reproducible(lengths):
    owned = token_budgets([300_000, 100_000], int(lengths.sum()), int(lengths.max()))
    one, again, other = (split_into_phases(lengths, 0, len(lengths), owned, seed)[0].documents for seed in (3, 3, 4))
    assert numpy.array_equal(one, again)
    assert not numpy.array_equal(one, other)
    # A phase has documents from all parts of the corpus, which a split in file order would not give.
    halves = numpy.bincount(one // 2500, minlength=2) / len(one)
    assert halves == pytest.approx([0.5, 0.5], abs=0.02)


def test_only_documents_in_the_range_are_split(lengths):
    part = lengths[1000:1200]
    owned = token_budgets([10_000, 5_000], int(part.sum()), int(part.max()))
    parts = split_into_phases(lengths, 1000, 1200, owned, seed=3)
    assert sorted(numpy.concatenate([part.documents for part in parts])) == list(range(1000, 1200))
