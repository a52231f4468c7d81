"""Shared fixtures: megatron-core's groups, which one process joins once, and a small corpus and tokenizer."""

from pathlib import Path

import pytest
import torch

from megatron_tst.data.documents import Skipped, list_inputs, read_documents
from megatron_tst.data.preprocess import write_indexed
from megatron_tst.data.tokenizer import Tokenizer, train_bpe
from megatron_tst.distributed import (
    ParallelSizes,
    ParallelState,
    destroy_parallel_state,
    init_parallel_state,
    seed_everything,
)
from tests.corpora import FILES
from tests.training.runs import real_text

# Markers of tests that are too long for every run: the reason to skip them, with the command that runs them.
ON_REQUEST = {
    "docker": "builds images for some ten minutes: bash tests/run.sh -m docker",
    "long": "takes minutes: bash .ci/long",
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]):
    for marker, reason in ON_REQUEST.items():
        if marker not in config.getoption("markexpr"):
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def one_rank():
    ranks = init_parallel_state(ParallelSizes())
    yield ranks
    destroy_parallel_state()


@pytest.fixture
def rank(one_rank: ParallelState) -> ParallelState:
    """Return the parallel state of a world of one rank, freshly seeded."""
    seed_everything(1234)
    return one_rank


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = (Path(file).read_text(encoding="utf-8") for file in FILES)
    return train_bpe(texts, 300, tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    documents = read_documents(list_inputs(real_text(folder / "text")), "text", Skipped())
    return str(write_indexed(documents, tokenizer, folder / "corpus").prefix)


@pytest.fixture
def here(rank: ParallelState) -> ParallelState:
    """The ranks that this process has joined, for runs that are built in it."""
    return rank
