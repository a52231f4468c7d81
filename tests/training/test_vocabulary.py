"""Initial rows of a vocabulary that is larger than the tokenizer's, or smaller or larger than the checkpoint's."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_tst.config import UserError
from megatron_tst.conversion.safetensors_files import SafetensorsFolder
from megatron_tst.conversion.saved_checkpoints import find_saved_checkpoint
from megatron_tst.conversion.to_hugging_face import EndOfDocument, Export
from megatron_tst.conversion.to_megatron import Import
from tests.training.runs import arguments, build_here, parameters, train_here

# Published models have vocabularies larger than their tokenizers; the tests' tokenizer knows 300 tokens.
SIZE = 310
TABLES = ("embedding.word_embeddings.weight", "output_layer.weight")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("vocabulary")


@pytest.fixture
def trained(here, corpus, tokenizer, folder: Path) -> dict[str, torch.Tensor]:
    """The embedding and output tables of a run that is trained once; its checkpoints are in the folder."""
    if not (folder / "tables.pt").exists():
        run = train_here(arguments(corpus, str(tokenizer.path), folder / "run", f"--vocab-size {SIZE} --eval-iters 0"))
        torch.save(tables(run), folder / "tables.pt")
    return torch.load(folder / "tables.pt")


@pytest.fixture
def build(here, corpus, tokenizer, tmp_path: Path):
    def build(load: Path, flags: str = "") -> dict[str, torch.Tensor]:
        run = build_here(arguments(corpus, str(tokenizer.path), tmp_path / "next", f"--load {load} {flags}"))
        run.directory.leave()
        return tables(run)

    return build


def tables(run) -> dict[str, torch.Tensor]:
    found = {name.removeprefix("module."): value for name, value in parameters(run).items()}
    return {name: found[name] for name in TABLES}


def assert_begins_with(found, wanted, rows: int) -> None:
    """Assert that the tables hold the first rows of the wanted ones, followed by zeros."""
    for name in TABLES:
        kept = wanted[name][:rows]
        assert len(found[name]) == rows and torch.equal(found[name][: len(kept)], kept), name
        assert not found[name][len(kept) :].any(), name


@pytest.mark.parametrize("flags", ["", "--finetune", f"--finetune --vocab-size {SIZE}"])
def test_a_run_takes_the_checkpoints_vocabulary(trained, build, folder, flags):
    assert_begins_with(build(folder / "run" / "checkpoints", flags), trained, SIZE)


@pytest.mark.parametrize("size", [305, 320])
def test_another_vocabulary_size_needs_finetune_and_override(trained, build, folder, size):
    checkpoints, other = folder / "run" / "checkpoints", f"--vocab-size {size}"
    told = f"^{other}: the checkpoint's vocabulary has {SIZE} tokens"
    with pytest.raises(UserError, match=f"{told}$"):
        build(checkpoints, f"{other} --override-run-config")
    with pytest.raises(UserError, match=f"{told}; to cut rows off, or add rows of zeros, add --override-run-config$"):
        build(checkpoints, f"{other} --finetune")
    assert_begins_with(build(checkpoints, f"{other} --finetune --override-run-config"), trained, size)


@pytest.mark.parametrize("flags", [f"--vocab-size {SIZE}", "--make-vocab-size-divisible-by 31"])
def test_rows_of_a_foreign_checkpoint_need_a_vocabulary_size_or_padding(trained, build, folder, tmp_path, flags):
    """Checkpoints of Megatron-LM record no vocabulary size besides the tokenizer's."""
    theirs = Path(shutil.copytree(folder / "run" / "checkpoints", tmp_path / "theirs"))
    for name in ("run_state.json", "config.yaml", "SHA256SUMS"):
        (theirs / "iter_0000008" / name).unlink()
    common = torch.load(theirs / "iter_0000008" / "common.pt", weights_only=False)
    common["args"].vocab_size = None
    torch.save(common, theirs / "iter_0000008" / "common.pt")
    with pytest.raises(UserError, match=f"--vocab-size 300: the checkpoint's table has {SIZE} rows; give its vocab"):
        build(theirs, "--finetune")
    with pytest.raises(UserError, match=f"--vocab-size 320: the checkpoint's table has {SIZE} rows"):
        build(theirs, "--finetune --vocab-size 320")
    assert_begins_with(build(theirs, f"--finetune {flags}"), trained, SIZE)


def test_a_conversion_keeps_the_rows_beyond_the_tokenizer(trained, build, folder, tmp_path, tokenizer):
    saved = find_saved_checkpoint(folder / "run" / "checkpoints", None)
    end = EndOfDocument(tokenizer.eod, tokenizer.decode([tokenizer.eod]))
    Export(saved).write(tmp_path / "hf", tokenizer.path, end, 10**9)
    exported = SafetensorsFolder(tmp_path / "hf")
    for name, key in zip(("model.embed_tokens.weight", "lm_head.weight"), TABLES, strict=True):
        assert torch.equal(exported.read(name), trained[key])
    Import(tmp_path / "hf").write(tmp_path / "weights", tokenizer.path)
    assert find_saved_checkpoint(tmp_path / "weights", None).vocab_size == SIZE
    assert_begins_with(build(tmp_path / "weights", "--finetune"), trained, SIZE)
