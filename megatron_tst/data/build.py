"""From settings to the samples of every phase and of validation, all made before the first step."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from numpy.typing import NDArray

from megatron_tst.config import DataSettings, UserError
from megatron_tst.data.cache import cached, read_array, save_array
from megatron_tst.data.corpus import Corpus, check_apart, open_blend, split_documents
from megatron_tst.data.cut import cut_documents, quotas
from megatron_tst.data.samples import EpochedText, PhaseText, RunText, TextSpec, blend_order
from megatron_tst.data.tokenizer import Tokenizer
from megatron_tst.superposition import Phase, Schedule

_ENDS = 1 << 16  # documents, or tokens of a document, that are looked at to know a corpus again


@dataclass(frozen=True)
class RunData:
    """All that a run reads.

    Attributes:
        train: the samples of each phase.
        valid: ordinary samples to evaluate on, or None.
        cuts: how each training corpus was dealt to the phases.
    """

    train: RunText
    valid: RunText | None
    cuts: list["SourceCut"]


@dataclass(frozen=True)
class SourceCut:
    """How one corpus of a blend was dealt: all that the samples of every phase follow from, with the seed.

    Attributes:
        prefix: path of its files, without the ending.
        weight: in the blend.
        documents: first document that was dealt, and one past the last.
        fingerprint: of the corpus, wherever it lies.
        quotas: data tokens that each phase owns.
    """

    prefix: str
    weight: float
    documents: tuple[int, int]
    fingerprint: str
    quotas: tuple[int, ...]

    def is_of(self, other: "SourceCut") -> bool:
        """Whether the other was dealt from the same documents, with the same weight."""
        facts = [(cut.weight, tuple(cut.documents), cut.fingerprint) for cut in (self, other)]
        return facts[0] == facts[1]


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


def build_run_data(
    settings: DataSettings,
    schedule: Schedule,
    eval_iters: int,
    plan: SamplePlan,
    continued: list[SourceCut] | None = None,
) -> RunData:
    """Cut the corpora into the phases' shares and build every phase's samples.

    Collective: every rank of the world calls it; the main rank cuts and writes indices, the others read them.

    Args:
        settings: which corpora.
        schedule: the phases.
        eval_iters: global batches of one evaluation; 0 for none.
        plan: how samples are made.
        continued: the cut of the run that this one goes on from; its phases keep their documents.

    Raises:
        UserError: if a corpus cannot be read, is too small, or is not the one that was cut.
    """
    train, valid = _sources(settings)
    validation = None
    if eval_iters and valid:
        batches = min(eval_iters, _whole_batches(valid, plan))
        validation = RunText(_build_phases(valid, (Phase(1, batches),), "valid", plan)[0])
    phases, cuts = _build_phases(train, schedule.phases, "train", plan, continued)
    return RunData(RunText(phases), validation, cuts)


def _sources(settings: DataSettings) -> tuple[list[_Source], list[_Source]]:
    if not settings.data_path:
        blends = (settings.train_data_path, "--train-data-path"), (settings.valid_data_path, "--valid-data-path")
        apart = [open_blend(*blend) for blend in blends]
        check_apart(*apart)
        train, valid = ([_Source(corpus, 0, len(corpus.lengths)) for corpus in blend] for blend in apart)
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


def _build_phases(
    sources: list[_Source],
    phases: tuple[Phase, ...],
    name: str,
    plan: SamplePlan,
    continued: list[SourceCut] | None = None,
) -> tuple[list[PhaseText], list[SourceCut]]:
    weights = [source.corpus.weight for source in sources]
    orders = []
    for phase in phases:
        samples = phase.num_steps * plan.global_batch_size
        digest = _digest(weights, samples)
        orders.append(blend_order(weights, samples, plan.cache / f"blend-{digest}.npy"))
    parts: list[list[EpochedText]] = [[] for _ in phases]
    tokens = [plan.seq_length * phase.tokens_per_position for phase in phases]
    counts_by_source = [[int((order["part"] == number).sum()) for order in orders] for number in range(len(sources))]
    cuts = [
        _plan_cut(source, [count * size + 1 for count, size in zip(counts, tokens, strict=True)])
        for source, counts in zip(sources, counts_by_source, strict=True)
    ]
    if continued is not None:
        cuts = _same_corpora(cuts, continued)
    for number, (source, counts, cut) in enumerate(zip(sources, counts_by_source, cuts, strict=True)):
        shares, digest = _deal(source, cut, number, plan)
        for index, (share, count, size) in enumerate(zip(shares, counts, tokens, strict=True)):
            spec = TextSpec(
                name=f"{name}-phase{index}-corpus{number}-{size}tokens-{digest}",
                num_tokens=size,
                seed=(plan.seed, number, index),
                cache=plan.cache,
            )
            parts[index].append(EpochedText(source.corpus, share, spec, count, plan.tokenizer))
    return [PhaseText(part, order) for part, order in zip(parts, orders, strict=True)], cuts


def _plan_cut(source: _Source, budgets: list[int]) -> SourceCut:
    """Say how one source is to be dealt, given the data tokens that each phase wants to read of it."""
    lengths = source.corpus.lengths[source.start : source.stop]
    num_tokens = int(lengths.sum(dtype=numpy.int64))
    owned = quotas(budgets, num_tokens, int(lengths.max()))
    # Beginning and end stand for the corpus: a path may come to hold another one.
    ends = [lengths[:_ENDS].tobytes(), lengths[-_ENDS:].tobytes()]
    ends += [source.corpus.indexed[document][:_ENDS].tobytes() for document in (source.start, source.stop - 1)]
    return SourceCut(
        prefix=str(Path(source.corpus.prefix).resolve()),
        weight=source.corpus.weight,
        documents=(source.start, source.stop),
        fingerprint=_digest(num_tokens, *ends),
        quotas=tuple(owned),
    )


def _same_corpora(planned: list[SourceCut], continued: list[SourceCut]) -> list[SourceCut]:
    """Return the cut to continue, at the places where its corpora lie now.

    Raises:
        UserError: if they are not the same corpora.
    """
    for number, cut in enumerate(planned):
        if len(planned) != len(continued) or not cut.is_of(continued[number]):
            raise UserError(
                f"--data-path {cut.prefix}: is not the corpus, share of it or weight that the checkpoint was trained "
                "on; to go on with other text, add --override-run-config"
            )
    return [replace(cut, quotas=tuple(old.quotas)) for cut, old in zip(planned, continued, strict=True)]


def _deal(source: _Source, cut: SourceCut, number: int, plan: SamplePlan) -> tuple[list[NDArray[numpy.int32]], str]:
    """Deal one source's documents to the phases.

    The shares lie in the cache, mapped into memory by every rank. Returns them with a digest of all they follow from.
    """
    owned = list(cut.quotas)
    digest = _digest(cut, plan.seed, number)

    paths = [plan.cache / f"cut-{digest}-phase{index}.npy" for index in range(len(owned))]

    def load() -> list[NDArray[numpy.int32]] | None:
        """Map the shares into memory; None where one of them is missing or damaged."""
        whole = [array for array in map(read_array, paths) if array is not None]
        return whole if len(whole) == len(paths) else None

    def write() -> None:
        """Cut the corpus."""
        shares = cut_documents(source.corpus.lengths, source.start, source.stop, owned, plan.seed + number)
        for path, share in zip(paths, shares, strict=True):
            save_array(path, share.documents)

    return cached(load, write, plan.cache), digest


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
