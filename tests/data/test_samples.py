"""The text that phases read, traced document by document through the real dataloader."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from megatron_tst.config import DataSettings, UserError
from megatron_tst.data import samples
from megatron_tst.data.batches import BatchLoader
from megatron_tst.data.build import SamplePlan, build_run_data
from megatron_tst.superposition import Phase, Schedule
from tests.corpora import traceable_documents, write_corpus
from tests.data.test_batches import shape

COUNT, LENGTH, BATCH = 2000, 16, 8
SCHEDULE = Schedule((Phase(4, 20), Phase(1, 40)))


@pytest.fixture
def prefix(tmp_path: Path) -> str:
    return write_corpus(tmp_path / "corpus", traceable_documents(COUNT), COUNT)


def build(prefix, tokenizer, tmp_path, schedule=SCHEDULE, seed=1, eval_iters=0, **settings):
    plan = SamplePlan(tokenizer, LENGTH, BATCH, seed, tmp_path / "cache")
    settings = {"data_path": (prefix,), "split": "1,0,0", **settings}
    return build_run_data(DataSettings(**settings), schedule, eval_iters, plan)


def read(data, rank, schedule=SCHEDULE, first_step=0, num_workers=0, micro_batch_size=2):
    """Return all text that this rank reads in a run, one [samples, T] tensor per step."""
    reader = BatchLoader(
        data.train, schedule, rank, micro_batch_size=micro_batch_size, global_batch_size=BATCH, vocab_size=COUNT,
        num_workers=num_workers, first_step=first_step,
    )  # fmt: skip
    steps = []
    for step in range(first_step, schedule.num_steps):
        bag_size = schedule.phase_at(step).bag_size
        per_step = BATCH // micro_batch_size // rank.dp_size
        batches = [reader.read(shape(bag_size, LENGTH)) for _ in range(per_step)]
        # The inputs are all tokens of each sample but the last.
        steps.append(torch.cat([batch.inputs.flatten(1) for batch in batches]))
    return steps


def read_by(data, rank, dp_size, **kwargs):
    """Return the text of each step in a world of dp_size ranks, whose parts are read separately."""
    parts = [read(data, replace(rank, dp_rank=r, dp_size=dp_size), **kwargs) for r in range(dp_size)]
    return [torch.cat(step) for step in zip(*parts, strict=True)]


def tokens_per_document(steps):
    return Counter(torch.cat([step.flatten() for step in steps]).tolist())


def test_document_is_read_once_per_epoch_and_by_one_phase_only(rank, prefix, tokenizer, tmp_path):
    data = build(prefix, tokenizer, tmp_path)
    assert all(text.num_epochs <= 1 for text in data.train.phases)
    steps = read(data, rank)
    lengths = [len(document) for document in traceable_documents(COUNT)]
    read_in_all = tokens_per_document(steps)
    assert all(count <= lengths[document] for document, count in read_in_all.items())
    superposed, ordinary = tokens_per_document(steps[:20]), tokens_per_document(steps[20:])
    assert superposed.keys().isdisjoint(ordinary.keys())
    assert sum(superposed.values()) == 20 * BATCH * LENGTH * 4
    assert sum(ordinary.values()) == 40 * BATCH * LENGTH


def test_epoch_skips_no_document(rank, prefix, tokenizer, tmp_path):
    """One phase that reads its corpus once reads every document, except for a tail shorter than a batch."""
    total = sum(len(document) for document in traceable_documents(COUNT))
    schedule = Schedule((Phase(1, (total - 1) // LENGTH // BATCH),))
    steps = read(build(prefix, tokenizer, tmp_path, schedule), rank, schedule)
    missing = total - sum(tokens_per_document(steps).values())
    assert 0 <= missing <= (BATCH + 1) * LENGTH
    assert len(tokens_per_document(steps)) >= COUNT - missing // 3 - 1


def test_phases_that_are_built_separately_share_documents(rank, prefix, tokenizer, tmp_path):
    """Negative control: phases that draw from the whole corpus independently read the same documents."""
    one_phase_each = [
        build(prefix, tokenizer, tmp_path / str(i), Schedule((p,))) for i, p in enumerate(SCHEDULE.phases)
    ]
    parts = [read(data, rank, Schedule((p,))) for data, p in zip(one_phase_each, SCHEDULE.phases, strict=True)]
    first, second = map(tokens_per_document, parts)
    assert not first.keys().isdisjoint(second.keys())


@pytest.mark.parametrize("dp_size", [2, 4])
def test_text_is_the_same_for_any_number_of_ranks(rank, prefix, tokenizer, tmp_path, dp_size):
    data = build(prefix, tokenizer, tmp_path)
    for alone, together in zip(read(data, rank), read_by(data, rank, dp_size), strict=True):
        assert sorted(alone.tolist()) == sorted(together.tolist())


def test_worker_processes_do_not_change_the_text(rank, prefix, tokenizer, tmp_path):
    data = build(prefix, tokenizer, tmp_path)
    for here, there in zip(read(data, rank), read(data, rank, num_workers=2), strict=True):
        assert torch.equal(here, there)


@pytest.mark.parametrize("first_step", [7, 20, 33])
def test_reading_from_a_later_step_on_continues_the_run(rank, prefix, tokenizer, tmp_path, first_step):
    data = build(prefix, tokenizer, tmp_path)
    whole, rest = read(data, rank), read(data, rank, first_step=first_step)
    assert len(rest) == SCHEDULE.num_steps - first_step
    assert all(torch.equal(a, b) for a, b in zip(whole[first_step:], rest, strict=True))


def test_order_depends_on_the_seed_and_not_on_the_cache(rank, prefix, tokenizer, tmp_path):
    def text(seed, cache):
        return torch.cat([s.flatten() for s in read(build(prefix, tokenizer, tmp_path / cache, seed=seed), rank)])

    assert torch.equal(text(1, "a"), text(1, "b"))
    assert torch.equal(text(1, "a"), text(1, "a"))
    assert not torch.equal(text(1, "a"), text(2, "a"))


def test_cache_is_not_used_for_another_corpus_of_the_same_name(rank, prefix, tokenizer, tmp_path):
    first = build(prefix, tokenizer, tmp_path)
    write_corpus(Path(prefix), traceable_documents(COUNT, seed=5), COUNT)
    second = build(prefix, tokenizer, tmp_path)
    cuts = [text.parts[0].epochs[0].document_index for data in (first, second) for text in data.train.phases[:1]]
    assert not (len(cuts[0]) == len(cuts[1]) and (cuts[0] == cuts[1]).all())


def test_small_corpus_is_read_in_complete_epochs(rank, tokenizer, tmp_path):
    documents = traceable_documents(40)
    prefix = write_corpus(tmp_path / "small", documents, COUNT)
    data = build(prefix, tokenizer, tmp_path)
    assert all(text.num_epochs > 1 for text in data.train.phases)
    for part in (text.parts[0] for text in data.train.phases):

        def documents(epoch, part=part):
            first = epoch * part.samples_per_epoch
            return {int(token) for k in range(part.samples_per_epoch) for token in part[first + k]}

        # Both epochs read the same documents, except for those in the tails.
        assert len(documents(0) ^ documents(1)) <= 8


@pytest.mark.parametrize(("vocab_size", "stored"), [(COUNT, numpy.uint16), (100_000, numpy.int32)])
def test_samples_equal_megatron_cores(rank, tokenizer, tmp_path, monkeypatch, vocab_size, stored):
    """The documents are short, but for one that is longer than several samples."""
    real, datasets = samples.build_epoch, []

    def remember(*args):
        datasets.append(real(*args))

    monkeypatch.setattr(samples, "build_epoch", remember)
    documents = [*traceable_documents(200), list(range(1000))]
    data = build(write_corpus(tmp_path / "corpus", documents, vocab_size), tokenizer, tmp_path)
    for part in (text.parts[0] for text in data.train.phases):
        epochs = [datasets.pop(0) for _ in part.epochs]
        assert len(epochs) > 1
        theirs = [epoch[k] for epoch in epochs for k in range(part.samples_per_epoch)]
        theirs = [torch.cat((sample["tokens"], sample["labels"][-1:])).numpy() for sample in theirs]
        ours = [part[k] for k in range(len(theirs))]
        assert {sample.dtype for sample in ours} == {numpy.dtype(stored)}
        assert all(numpy.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert not all(numpy.array_equal(a, b) for a, b in zip(ours[1:], theirs, strict=False))


def test_blend_of_16_and_32_bit_corpora_is_read(rank, tokenizer, tmp_path):
    narrow, wide, other = (
        write_corpus(tmp_path / name, traceable_documents(COUNT), size)
        for name, size in (("narrow", COUNT), ("wide", 100_000), ("other", 100_000))
    )
    wide, mixed = (build("", tokenizer, tmp_path, data_path=("1", path, "1", other)) for path in (wide, narrow))
    assert {mixed.train[(0, k)].dtype for k in range(8)} == {numpy.dtype(numpy.uint16), numpy.dtype(numpy.int32)}
    assert all(torch.equal(a, b) for a, b in zip(read(wide, rank), read(mixed, rank), strict=True))


def test_blend_keeps_its_weights_in_every_phase(rank, tokenizer, tmp_path):
    halves = traceable_documents(COUNT)
    low = write_corpus(tmp_path / "low", halves[:1000], COUNT)
    high = write_corpus(tmp_path / "high", halves[1000:], COUNT)
    data = build("", tokenizer, tmp_path, data_path=("0.25", low, "0.75", high))
    for phase, text in zip(SCHEDULE.phases, data.train.phases, strict=True):
        from_high = [bool((text[k] >= 1000).all()) for k in range(len(text))]
        assert sum(from_high) / len(text) == pytest.approx(0.75, abs=0.01), phase
        assert all(sum(from_high[:n]) == pytest.approx(0.75 * n, abs=1) for n in range(1, len(text)))


def test_corpus_that_is_named_twice_is_read_like_one(rank, prefix, tokenizer, tmp_path):
    """Negative control: two copies in a blend are split separately, so that two phases read the same documents."""
    blends = (("1", prefix), ("1", prefix, "0.5", f"{tmp_path}/./corpus"))
    once, twice = (read(build("", tokenizer, tmp_path, data_path=blend), rank) for blend in blends)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    copy = write_corpus(tmp_path / "copy", traceable_documents(COUNT), COUNT)
    steps = read(build("", tokenizer, tmp_path, data_path=("1", prefix, "1", copy)), rank)
    superposed, ordinary = tokens_per_document(steps[:20]), tokens_per_document(steps[20:])
    assert not superposed.keys().isdisjoint(ordinary.keys())


def test_corpus_for_both_training_and_validation_is_refused(rank, prefix, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"--valid-data-path .*: is in --train-data-path too"):
        build("", tokenizer, tmp_path, data_path=(), train_data_path=("1", prefix), valid_data_path=(prefix,))


def test_validation_has_whole_batches_of_held_out_documents(rank, prefix, tokenizer, tmp_path):
    data = build(prefix, tokenizer, tmp_path, split="90,10,0", eval_iters=1000)
    held_out = set(range(1800, 2000))
    valid = data.valid.phases[0]
    assert len(valid) % BATCH == 0
    assert valid.num_epochs <= 1
    assert {int(token) for k in range(len(valid)) for token in valid[k]} <= held_out
    assert held_out.isdisjoint(tokens_per_document(read(data, rank)))


@pytest.mark.parametrize(
    ("settings", "schedule", "eval_iters", "message"),
    [
        ({"split": "0,1,0"}, SCHEDULE, 0, "leaves no document"),
        ({"split": "1999,1,0"}, SCHEDULE, 5, "--eval-iters: validation has"),
        ({}, Schedule((Phase(2000, 1), Phase(1, 1))), 0, "fewer than one sequence of 16"),
    ],
)
def test_too_little_text_is_refused(rank, prefix, tokenizer, tmp_path, settings, schedule, eval_iters, message):
    with pytest.raises(UserError, match=message):
        build(prefix, tokenizer, tmp_path, schedule, eval_iters=eval_iters, **settings)


def test_token_ids_beyond_the_vocabulary_are_refused(rank, prefix, tokenizer, tmp_path):
    data = build(prefix, tokenizer, tmp_path)
    reader = BatchLoader(data.train, SCHEDULE, rank, micro_batch_size=2, global_batch_size=BATCH, vocab_size=30)
    with pytest.raises(UserError, match="made with another tokenizer"):
        reader.read(shape(4, LENGTH))


def test_interrupted_build_of_indices_is_repeated(rank, prefix, tokenizer, tmp_path):
    build(prefix, tokenizer, tmp_path)
    folder = next(tmp_path.glob("cache/train-phase0-*"))
    partial = folder.with_name(folder.name + ".partial-left")
    folder.rename(partial)
    next(partial.glob("*document_index.npy")).write_bytes(b"cut off")
    data = build(prefix, tokenizer, tmp_path)
    assert data.train[(0, 0)].shape == (4 * LENGTH + 1,)


def test_two_runs_may_fill_one_cache_at_the_same_time(rank, prefix, tokenizer, tmp_path, monkeypatch):
    """The other run finishes the same indices while this one is still building them."""
    real, others = samples.build_epoch, []

    def build_beside(*args):
        if not others:
            others.append(None)
            others.append(build(prefix, tokenizer, tmp_path))
        return real(*args)

    monkeypatch.setattr(samples, "build_epoch", build_beside)
    ours = build(prefix, tokenizer, tmp_path)
    assert all((ours.train[(0, k)] == others[1].train[(0, k)]).all() for k in range(8))
    assert not list(tmp_path.glob("cache/*.partial-*"))
