"""Checkpoints of stock Megatron-LM load here, and ours load in stock Megatron-LM."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_tst.checkpoint.folders import CheckpointFolders
from megatron_tst.config import UserError, parse_config
from megatron_tst.conversion.saved_checkpoints import find_saved_checkpoint
from megatron_tst.data.tokenizer import train_bpe
from megatron_tst.distributed import destroy_parallel_state
from megatron_tst.distributed.signals import StopSignals
from megatron_tst.megatron_patches.common_state import read_common_state
from megatron_tst.megatron_patches.safe_checkpoint import read_metadata
from megatron_tst.training import start_run
from tests.checkpoint.recorded_run import RECORDED
from tests.checkpoint.recorded_run import SAVED_STEP as RECORDED_STEP
from tests.checkpoint.stock_trainer import MODEL, SAVED_STEP, STOCK
from tests.corpora import write_corpus
from tests.distributed.launch import run_distributed
from tests.distributed.layouts import pieces, train_layout, whole
from tests.training.runs import start

VERSIONS = sorted(folder.name for folder in STOCK.iterdir())
RUN = (
    "--micro-batch-size 2 --global-batch-size 4 --train-iters 4 --lr 1e-2 --eval-iters 0 --eval-interval 100 "
    "--num-workers 0 --split 100,0,0"
)
PADDED_VOCABULARY = 264


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> tuple[str, ...]:
    """Return flags for a corpus and a tokenizer whose tokens are all in the recorded models' vocabulary."""
    folder = tmp_path_factory.mktemp("text")
    tokenizer = train_bpe(["the text of a tokenizer"], 260, folder / "tokenizer.json")
    documents = [[(7 * place * place + 31 * number) % 256 for place in range(40)] for number in range(60)]
    corpus = write_corpus(folder / "corpus", documents, tokenizer.vocab_size)
    return ("--data-path", corpus, "--tokenizer-model", str(tokenizer.path))


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a checkpoint, read by torch alone."""
    reader = dcp.FileSystemReader(folder)
    entries = reader.read_metadata().state_dict_metadata.items()
    tensors = {
        key: torch.full(entry.size, -1, dtype=entry.properties.dtype)
        for key, entry in entries
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return tensors


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: tensor for key, tensor in stored(folder).items() if not key.startswith("optimizer.")}


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    assert ours.keys() == theirs.keys()
    return [key for key in ours if not torch.equal(ours[key], theirs[key])]


def first_weights(argv: list[str]) -> list:
    """Return the weights with which a rank starts a run."""
    started = [
        (*piece[:3], piece[3].detach().clone()) for piece in pieces(start_run(parse_config(argv), StopSignals()))
    ]
    destroy_parallel_state()
    return started


def our_flags(text, run_dir: Path, flags: str) -> list[str]:
    return [*MODEL.split(), *RUN.split(), *text, "--tst-run-dir", str(run_dir), *flags.split()]


def of_stock(version: str) -> Path:
    return CheckpointFolders(STOCK / version).of(SAVED_STEP)


def test_both_versions_are_recorded():
    assert VERSIONS == ["0.16.1", "0.19.2"]
    assert [(of_stock(version) / "common.pt").exists() for version in VERSIONS] == [True, False]
    assert all(sum(file.stat().st_size for file in (STOCK / v).rglob("*.*")) < 200_000 for v in VERSIONS)


@pytest.mark.distributed
@pytest.mark.parametrize(("ranks", "flags"), [(1, ""), (2, "--tensor-model-parallel-size 2 --sequence-parallel")])
@pytest.mark.parametrize("version", VERSIONS)
def test_run_starts_from_weights_of_megatron_lm(text, tmp_path, version, ranks, flags):
    wanted = weights(of_stock(version))
    argv = our_flags(text, tmp_path / "run", f"{flags} --tst-bag-size 4 --tst-steps 2")
    load = ["--load", str(STOCK / version), "--finetune"]
    started = run_distributed(first_weights, ranks, [*argv, *load])
    found = whole([piece for rank in started for piece in rank])
    padding = {
        key: tensor[:PADDED_VOCABULARY] if "word" in key or "output" in key else tensor for key, tensor in found.items()
    }
    assert differing(padding, wanted) == []
    fresh = whole([piece for rank in run_distributed(first_weights, ranks, argv) for piece in rank])
    assert {key for key in wanted if not torch.equal(fresh[key][: len(wanted[key])], wanted[key])} == wanted.keys()


@pytest.mark.distributed
def test_settings_that_change_the_models_function_are_refused(text, tmp_path):
    load = f"--load {STOCK / VERSIONS[1]} --finetune"
    for flags, rule in {
        "--norm-epsilon 1e-5": "--norm-epsilon 1e-05: the checkpoint was made with 0.001",
        "--rotary-base 10000": "--rotary-base 10000: the checkpoint was made with 5000",
    }.items():
        with pytest.raises(AssertionError, match=rule):
            run_distributed(first_weights, 1, our_flags(text, tmp_path / "run", f"{load} {flags}"))
        run_distributed(first_weights, 1, our_flags(text, tmp_path / "run", f"{load} {flags} --override-run-config"))


def changed(version: str, target: Path, **arguments) -> Path:
    """Copy the recorded checkpoints and change their arguments; return the copy."""
    folder = CheckpointFolders(Path(shutil.copytree(STOCK / version, target))).of(SAVED_STEP)
    common = torch.load(folder / "common.pt", weights_only=False)
    vars(common["args"]).update(arguments)
    torch.save(common, folder / "common.pt")
    return target


@pytest.mark.distributed
def test_unsupported_model_of_megatron_lm_is_refused(text, tmp_path):
    checkpoints = changed("0.16.1", tmp_path / "changed", layernorm_zero_centered_gamma=True)
    with pytest.raises(UserError, match="made with layernorm_zero_centered_gamma=True, which no model here supports"):
        find_saved_checkpoint(checkpoints, None)
    argv = our_flags(text, tmp_path / "run", f"--load {checkpoints} --finetune")
    with pytest.raises(AssertionError, match=r"layernorm_zero_centered_gamma=True.*--override-run-config"):
        run_distributed(first_weights, 1, argv)
    run_distributed(first_weights, 1, [*argv, "--override-run-config"])


@pytest.mark.parametrize("version", VERSIONS)
def test_checkpoint_of_megatron_lm_converts_to_hugging_face(text, tmp_path, version):
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    tokenizer = Path(text[-1]).parent
    argv = ("--load", STOCK / version, "--save", tmp_path / "hf", "--tokenizer", tokenizer, "--verify")
    done = start("tools/convert_ckpt.py", *map(str, argv))
    assert done.returncode == 0, done.stderr
    difference = re.search(r"largest logit difference (\S+) .* same most likely token at (\d+) of (\d+)", done.stdout)
    assert float(difference[1]) < 1e-5
    assert difference[2] == difference[3] == "16"
    (line,) = done.stderr.splitlines()
    assert line.endswith("was not written by megatron-tst and has no checksums, so it was converted unchecked")
    # Both models of that comparison are built from this configuration.
    settings = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert settings.items() >= {
        "num_hidden_layers": 2, "hidden_size": 6, "intermediate_size": 12, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 2, "max_position_embeddings": 16, "rms_norm_eps": 1e-3,
        "rope_theta": 5000.0, "vocab_size": PADDED_VOCABULARY, "tie_word_embeddings": False,
    }.items()  # fmt: skip


def test_conversion_names_what_the_checkpoint_lacks(tmp_path):
    argv = ("--load", STOCK / VERSIONS[1], "--save", tmp_path / "hf")
    done = start("tools/convert_ckpt.py", *map(str, argv))
    assert (done.returncode, (tmp_path / "hf").exists()) == (2, False)
    assert done.stderr.strip().endswith("names no tokenizer: name the folder of its tokenizer with --tokenizer")
    bare = Path(shutil.copytree(STOCK / VERSIONS[0], tmp_path / "bare"))
    (CheckpointFolders(bare).of(SAVED_STEP) / "common.pt").unlink()
    with pytest.raises(UserError, match=r"has neither config\.yaml nor Megatron-LM's args"):
        find_saved_checkpoint(bare, None)


def test_checkpoint_of_ours_without_checksums_is_refused(tmp_path):
    ours = Path(shutil.copytree(RECORDED / VERSIONS[0], tmp_path / "ours"))
    folder = CheckpointFolders(ours).of(RECORDED_STEP)
    assert find_saved_checkpoint(ours, None).has_checksums
    (folder / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match="SHA256SUMS: cannot be read"):
        find_saved_checkpoint(ours, None)


needs_trainer = pytest.mark.skipif(
    importlib.util.find_spec("megatron.training") is None, reason="megatron-core has its trainer from 0.19 on"
)


def train_ours(text, folder: Path, ranks: int, flags: str) -> Path:
    """Train with megatron-tst and return the last checkpoint."""
    run_distributed(train_layout, ranks, our_flags(text, folder, flags))
    return CheckpointFolders(folder / "checkpoints").of(4)


def train_stock(ranks: int, flags: str) -> None:
    launch = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} -m tests.checkpoint.stock_trainer {flags}"
    done = start(*launch.split())
    assert done.returncode == 0, done.stderr[-5000:]


@needs_trainer
@pytest.mark.distributed
def test_megatron_lm_starts_from_our_weights(text, tmp_path):
    wanted = weights(
        train_ours(text, tmp_path / "run", 1, "--tst-bag-size 4 --tst-steps 2 --use-distributed-optimizer")
    )
    # A step with learning rate 0 does not change the loaded weights.
    train_stock(
        2,
        f"--load {tmp_path}/run/checkpoints --finetune --lr 0 --train-iters 1 --save {tmp_path}/stock "
        "--save-interval 1 --tensor-model-parallel-size 2 --make-vocab-size-divisible-by 4",
    )
    loaded = weights(tmp_path / "stock" / "iter_0000001")
    assert differing(loaded, wanted) == []
    assert differing({key: tensor + 1e-6 for key, tensor in loaded.items()}, wanted) == [*wanted]


@needs_trainer
@pytest.mark.distributed
def test_megatron_lm_resumes_our_run(text, tmp_path):
    wanted = stored(train_ours(text, tmp_path / "run", 1, ""))
    # Megatron-LM loads step 4, has no steps left to train, and saves.
    train_stock(1, f"--load {tmp_path}/run/checkpoints --train-iters 4 --save {tmp_path}/stock --save-interval 3")
    resumed = tmp_path / "stock" / "iter_0000004"
    assert sum(key.startswith("optimizer.") for key in wanted) == 2 * len(weights(resumed))
    assert differing(stored(resumed), wanted) == []
    common = read_common_state(resumed, read_metadata(resumed))
    assert common["iteration"] == 4
    assert common["opt_param_scheduler"]["num_steps"] == common["args"].consumed_train_samples == 16
    assert common["optimizer"]["state"]["common_step"] == 4
