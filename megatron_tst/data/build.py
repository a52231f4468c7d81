"""Build the datasets of every phase and of validation from settings, all before the first step."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy
from numpy.typing import NDArray

from megatron_tst.config import DataSettings, UserError
from megatron_tst.data.cache import cached, read_array, save_array
from megatron_tst.data.corpus import Corpus, check_apart, open_blend, split_documents
from megatron_tst.data.document_split import DocumentSplit, split_into_phases, token_budgets
from megatron_tst.data.samples import CorpusDataset, DatasetSpec, PhaseDataset, RunDataset, blend_order
from megatron_tst.data.tokenizer import Tokenizer
from megatron_tst.superposition import Phase, Schedule

_ENDS = 1 << 16  # documents, or tokens of a document, that go into a corpus's fingerprint


@dataclass(frozen=True)
class RunData:
    """All data that a run reads.

    Attributes:
        train: the dataset of the training phases.
        valid: the dataset for evaluation, with bag size 1, or None.
        splits: the document split of each training corpus.
        fingerprint: identifies the text of training and validation, wherever the corpora lie.
    """

    train: RunDataset
    valid: RunDataset | None
    splits: list[DocumentSplit]
    fingerprint: str


@dataclass(frozen=True)
class _Source:
    """A corpus and the range of its documents that the phases read."""

    corpus: Corpus
    start: int
    stop: int


@dataclass(frozen=True)
class SamplePlan:
    """Settings by which documents are split and samples are made, the same for training and validation.

    Attributes:
        tokenizer: the tokenizer, which gives the end-of-document token.
        seq_length: positions per sequence, L; a sample has L x bag size + 1 tokens.
        global_batch_size: sequences per step over all ranks.
        seed: seed of the document split and of all orders.
        cache: directory of the cached splits and indices.
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
    continued: list[DocumentSplit] | None = None,
) -> RunData:
    """Split the corpora's documents among the phases and build every phase's dataset.

    Collective: every rank of the world calls it; the main rank splits and writes indices, the others read them.

    Args:
        settings: the data settings, which name the corpora.
        schedule: the phases of the run.
        eval_iters: global batches of one evaluation; 0 if there is no evaluation.
        plan: how documents are split and samples are made.
        continued: the document splits of the resumed run, whose phases keep their documents.

    Raises:
        UserError: if a corpus cannot be read, is too small, or is not the one in ``continued``.
    """
    train, valid = _sources(settings)
    validation, valid_splits = None, list[DocumentSplit]()
    if eval_iters and valid:
        batches = min(eval_iters, _whole_batches(valid, plan))
        valid_phases, valid_splits = _build_phases(valid, (Phase(1, batches),), "valid", plan)
        validation = RunDataset(valid_phases)
    phases, splits = _build_phases(train, schedule.phases, "train", plan, continued)
    facts = [[(split.weight, split.documents, split.fingerprint) for split in part] for part in (splits, valid_splits)]
    return RunData(RunDataset(phases), validation, splits, _digest(facts))


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
            raise UserError(f"--split {settings.split}: leaves no documents of {source.corpus.prefix} for training")
    return train, [source for source in valid if source.start < source.stop]


def _whole_batches(sources: list[_Source], plan: SamplePlan) -> int:
    """Return the number of global batches that validation can read without reading a document twice."""
    total = sum(source.corpus.weight for source in sources)
    sequences = []
    for source in sources:
        tokens = int(source.corpus.lengths[source.start : source.stop].sum(dtype=numpy.int64))
        sequences.append((tokens - 1) // plan.seq_length * total / source.corpus.weight)
    batches = int(min(sequences)) // plan.global_batch_size
    if not batches:
        raise UserError(
            f"--eval-iters: validation has {int(min(sequences))} sequences of --seq-length {plan.seq_length}, fewer "
            f"than one global batch of {plan.global_batch_size}: enlarge it by --split, or set --eval-iters 0"
        )
    return batches


def _build_phases(
    sources: list[_Source],
    phases: tuple[Phase, ...],
    name: str,
    plan: SamplePlan,
    continued: list[DocumentSplit] | None = None,
) -> tuple[list[PhaseDataset], list[DocumentSplit]]:
    weights = [source.corpus.weight for source in sources]
    orders = []
    for phase in phases:
        samples = phase.num_steps * plan.global_batch_size
        digest = _digest(weights, samples)
        orders.append(blend_order(weights, samples, plan.cache / f"blend-{digest}.npy"))
    parts: list[list[CorpusDataset]] = [[] for _ in phases]
    tokens = [plan.seq_length * phase.tokens_per_position for phase in phases]
    counts_by_source = [[int((order["part"] == number).sum()) for order in orders] for number in range(len(sources))]
    splits = [
        _plan_split(source, [count * size + 1 for count, size in zip(counts, tokens, strict=True)])
        for source, counts in zip(sources, counts_by_source, strict=True)
    ]
    if continued is not None:
        splits = _continue_splits(splits, continued)
    for number, (source, counts, split) in enumerate(zip(sources, counts_by_source, splits, strict=True)):
        documents_by_phase, digest = _split(source, split, number, plan)
        for index, (documents, count, size) in enumerate(zip(documents_by_phase, counts, tokens, strict=True)):
            spec = DatasetSpec(
                name=f"{name}-phase{index}-corpus{number}-{size}tokens-{digest}",
                num_tokens=size,
                seed=(plan.seed, number, index),
                cache=plan.cache,
            )
            parts[index].append(CorpusDataset(source.corpus, documents, spec, count, plan.tokenizer))
    return [PhaseDataset(part, order) for part, order in zip(parts, orders, strict=True)], splits


def _plan_split(source: _Source, wanted: list[int]) -> DocumentSplit:
    """Plan the split of one source from the data tokens that each phase will read of it."""
    lengths = source.corpus.lengths[source.start : source.stop]
    num_tokens = int(lengths.sum(dtype=numpy.int64))
    budgets = token_budgets(wanted, num_tokens, int(lengths.max()))
    # Its beginning and end identify the corpus, because another one may be written to the same path later.
    ends = [lengths[:_ENDS].tobytes(), lengths[-_ENDS:].tobytes()]
    ends += [source.corpus.indexed[document][:_ENDS].tobytes() for document in (source.start, source.stop - 1)]
    return DocumentSplit(
        prefix=str(Path(source.corpus.prefix).resolve()),
        weight=source.corpus.weight,
        documents=(source.start, source.stop),
        fingerprint=_digest(num_tokens, *ends),
        token_budgets=tuple(budgets),
    )


def _continue_splits(planned: list[DocumentSplit], continued: list[DocumentSplit]) -> list[DocumentSplit]:
    """Return the splits of the resumed run with the current paths of their corpora.

    Raises:
        UserError: if the corpora are not the same.
    """
    for number, split in enumerate(planned):
        if len(planned) != len(continued) or not split.is_of(continued[number]):
            raise UserError(
                f"--data-path {split.prefix}: is not the corpus that the checkpoint was trained on, or has other "
                "documents or another weight; to resume with other data, add --override-run-config"
            )
    return [replace(split, token_budgets=old.token_budgets) for split, old in zip(planned, continued, strict=True)]


def _split(
    source: _Source, split: DocumentSplit, number: int, plan: SamplePlan
) -> tuple[list[NDArray[numpy.int32]], str]:
    """Return the documents of each phase, and a digest of everything that determines them.

    The main rank writes the documents to the cache, and every rank maps them into memory.
    """
    digest = _digest(split, plan.seed, number)
    paths = [plan.cache / f"split-{digest}-phase{index}.npy" for index in range(len(split.token_budgets))]

    def load() -> list[NDArray[numpy.int32]] | None:
        """Map the documents into memory; None if a file is missing or damaged."""
        whole = [array for array in map(read_array, paths) if array is not None]
        return whole if len(whole) == len(paths) else None

    def write() -> None:
        """Split the corpus and write the documents of each phase."""
        parts = split_into_phases(
            source.corpus.lengths, source.start, source.stop, list(split.token_budgets), plan.seed + number
        )
        for path, part in zip(paths, parts, strict=True):
            save_array(path, part.documents)

    return cached(load, write, plan.cache), digest


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]
