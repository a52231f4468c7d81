"""From settings to the samples of every phase and of validation, all made before the first step."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy
from numpy.typing import NDArray

from megatron_tst.config import DataSettings, UserError
from megatron_tst.data.corpus import Corpus, open_blend, split_documents
from megatron_tst.data.cut import cut_documents, quotas
from megatron_tst.data.samples import EpochedText, PhaseText, RunText, TextSpec, blend_order, save_array
from megatron_tst.data.tokenizer import Tokenizer
from megatron_tst.platform import main_rank_first
from megatron_tst.superposition import Phase, Schedule


@dataclass(frozen=True)
class RunData:
    """All that a run reads.

    Attributes:
        train: the samples of each phase.
        valid: ordinary samples to evaluate on, or None.
    """

    train: RunText
    valid: RunText | None


@dataclass(frozen=True)
class _Source:
    """A corpus and the range of its documents that is dealt."""

    corpus: Corpus
    start: int
    stop: int


@dataclass(frozen=True)
class SamplePlan:
    """How shares and samples are made, the same for training and validation.

    Attributes:
        tokenizer: for the end-of-document token.
        seq_length: positions per sequence, L; a sample holds L x bag size + 1 tokens.
        global_batch_size: sequences per step.
        seed: of the cut and of all orders.
        cache: folder for cuts and indices.
    """

    tokenizer: Tokenizer
    seq_length: int
    global_batch_size: int
    seed: int
    cache: Path


def build_run_data(settings: DataSettings, schedule: Schedule, eval_iters: int, plan: SamplePlan) -> RunData:
    """Cut the corpora into the phases' shares and build every phase's samples.

    Collective: every rank of the world calls it; the main rank cuts and writes indices, the others read them.

    Args:
        settings: which corpora.
        schedule: the phases.
        eval_iters: global batches of one evaluation; 0 for none.
        plan: how samples are made.

    Raises:
        UserError: if a corpus cannot be read or is too small.
    """
    train, valid = _sources(settings)
    validation = None
    if eval_iters and valid:
        batches = min(eval_iters, _whole_batches(valid, plan))
        validation = RunText(_build_phases(valid, (Phase(1, batches),), "valid", plan))
    return RunData(RunText(_build_phases(train, schedule.phases, "train", plan)), validation)


def _sources(settings: DataSettings) -> tuple[list[_Source], list[_Source]]:
    if not settings.data_path:
        blends = (settings.train_data_path, "--train-data-path"), (settings.valid_data_path, "--valid-data-path")
        train, valid = ([_Source(c, 0, len(c.lengths)) for c in open_blend(*blend)] for blend in blends)
        return train, valid
    corpora = open_blend(settings.data_path, "--data-path")
    parts = [split_documents(settings.split, len(corpus.lengths)) for corpus in corpora]
    train, valid = (
        [_Source(corpus, *part[name]) for corpus, part in zip(corpora, parts, strict=True)]
        for name in ("train", "valid")
    )
    for source in train:
        if source.start == source.stop:
            raise UserError(f"--split {settings.split}: leaves no document of {source.corpus.prefix} to train on")
    return train, [source for source in valid if source.start < source.stop]


def _whole_batches(sources: list[_Source], plan: SamplePlan) -> int:
    """Return the global batches that validation holds without reading a document twice."""
    total = sum(source.corpus.weight for source in sources)
    sequences = []
    for source in sources:
        tokens = int(source.corpus.lengths[source.start : source.stop].sum(dtype=numpy.int64))
        sequences.append((tokens - 1) // plan.seq_length * total / source.corpus.weight)
    batches = int(min(sequences)) // plan.global_batch_size
    if not batches:
        raise UserError(
            f"--eval-iters: validation holds {int(min(sequences))} sequences of --seq-length {plan.seq_length}, fewer "
            f"than one global batch of {plan.global_batch_size}: widen --split, or set --eval-iters 0"
        )
    return batches


def _build_phases(sources: list[_Source], phases: tuple[Phase, ...], name: str, plan: SamplePlan) -> list[PhaseText]:
    weights = [source.corpus.weight for source in sources]
    orders = []
    for phase in phases:
        samples = phase.num_steps * plan.global_batch_size
        digest = _digest(weights, samples)
        orders.append(blend_order(weights, samples, plan.cache / f"blend-{digest}.npy"))
    parts: list[list[EpochedText]] = [[] for _ in phases]
    for number, source in enumerate(sources):
        counts = [int((order["part"] == number).sum()) for order in orders]
        tokens = [plan.seq_length * phase.tokens_per_position for phase in phases]
        shares, digest = _cut(
            source, [count * size + 1 for count, size in zip(counts, tokens, strict=True)], number, plan
        )
        for index, (share, count, size) in enumerate(zip(shares, counts, tokens, strict=True)):
            spec = TextSpec(
                name=f"{name}-phase{index}-corpus{number}-{size}tokens-{digest}",
                num_tokens=size,
                seed=(plan.seed, number, index),
                cache=plan.cache,
            )
            parts[index].append(EpochedText(source.corpus, share, spec, count, plan.tokenizer))
    return [PhaseText(part, order) for part, order in zip(parts, orders, strict=True)]


def _cut(source: _Source, budgets: list[int], number: int, plan: SamplePlan) -> tuple[list[NDArray[numpy.int32]], str]:
    """Deal one source's documents to the phases.

    The shares lie in the cache, mapped into memory by every rank. Returns them with a digest of all they follow from.
    """
    lengths = source.corpus.lengths[source.start : source.stop]
    owned = quotas(budgets, int(lengths.sum(dtype=numpy.int64)), int(lengths.max()))
    # Beginning and end of the lengths stand for the corpus: a path may come to hold another one.
    ends = (lengths[: 1 << 16].tobytes(), lengths[-(1 << 16) :].tobytes())
    digest = _digest(Path(source.corpus.prefix).resolve(), source.start, source.stop, owned, plan.seed, number, *ends)

    def load() -> list[NDArray[numpy.int32]]:
        """Map the shares into memory; where one is missing, write them first."""
        paths = [plan.cache / f"cut-{digest}-phase{index}.npy" for index in range(len(owned))]
        if not all(path.exists() for path in paths):
            shares = cut_documents(source.corpus.lengths, source.start, source.stop, owned, plan.seed + number)
            for path, share in zip(paths, shares, strict=True):
                save_array(path, share.documents)
        return [numpy.load(path, mmap_mode="r") for path in paths]

    return main_rank_first(load), digest


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
