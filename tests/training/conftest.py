from pathlib import Path

import pytest

from megatron_tst.data.documents import Skipped, list_inputs, read_documents
from megatron_tst.data.preprocess import write_indexed
from megatron_tst.training import run as run_module
from tests.training.runs import real_text


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer) -> str:
    folder = tmp_path_factory.mktemp("corpus")
    documents = read_documents(list_inputs(real_text(folder / "text")), "text", Skipped())
    return str(write_indexed(documents, tokenizer, folder / "corpus").prefix)


@pytest.fixture
def here(rank, monkeypatch):
    """Let a run use the ranks that the tests have joined; the process groups can be joined only once."""
    monkeypatch.setattr(run_module, "join_ranks", lambda *_: rank)
    return rank
