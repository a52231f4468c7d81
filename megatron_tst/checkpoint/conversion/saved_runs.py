"""A checkpoint's place, settings and state, as files beside its tensors."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

from megatron_tst.config import RunConfig, UserError, config_from_mapping, dump_config
from megatron_tst.platform.shard_writer import sha256

TRACKER = "latest_checkpointed_iteration.txt"
CONFIG, STATE, SUMS = "config.yaml", "run_state.json", "SHA256SUMS"


@dataclass(frozen=True)
class SavedRun:
    """One checkpoint of a run.

    Attributes:
        folder: ``iter_0000123``.
        config: the run's settings.
        vocab_size: tokens of its vocabulary, without padding.
        tokenizer: its tokenizer's file or folder.
    """

    folder: Path
    config: RunConfig
    vocab_size: int
    tokenizer: str


def iteration_folder(iteration: int) -> str:
    """Name the folder of a checkpoint, as Megatron-LM does."""
    return f"iter_{iteration:07}"


def find_saved_run(checkpoints: Path, iteration: int | None) -> SavedRun:
    """Find a checkpoint and read what it is.

    Args:
        checkpoints: the folder of a run's checkpoints.
        iteration: which; the latest where not given.

    Raises:
        UserError: if there is none, or its settings cannot be read.
    """
    tracker = checkpoints / TRACKER
    if iteration is None:
        try:
            iteration = int(tracker.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(
                f"--load {checkpoints}: is not a folder of checkpoints: {TRACKER} is missing or holds no number"
            ) from None
    folder = checkpoints / iteration_folder(iteration)
    if not folder.is_dir():
        present = sorted(int(path.name[5:]) for path in checkpoints.glob("iter_*") if path.name[5:].isdigit())
        raise UserError(f"--iteration {iteration}: {folder} does not exist; there are {present or 'none'}")
    return _read(folder)


def _read(folder: Path) -> SavedRun:
    try:
        config = config_from_mapping(yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8")), str(folder / CONFIG))
        state = json.loads((folder / STATE).read_text(encoding="utf-8"))
        return SavedRun(folder, config, int(state["vocab_size"]), str(state["tokenizer"]))
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise UserError(f"{folder}: its {CONFIG} or {STATE} cannot be read: {' '.join(repr(error).split())}") from error


def write_run_files(checkpoints: Path, config: RunConfig, vocab_size: int, tokenizer: str) -> None:
    """Make a checkpoint of iteration 0 out of a folder that holds its tensors: write all other files.

    Args:
        checkpoints: the folder of checkpoints, with the tensors in :func:`iteration_folder` of 0.
        config: settings of the model; the rest has its defaults.
        vocab_size: tokens of the vocabulary, without padding.
        tokenizer: its tokenizer's file or folder.
    """
    folder = checkpoints / iteration_folder(0)
    torch.save({"checkpoint_version": 3.0, "iteration": 0}, folder / "common.pt")
    formats = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    formats |= {"common_backend": "torch", "common_backend_version": 1}
    (folder / "metadata.json").write_text(json.dumps(formats), encoding="utf-8")
    (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")
    state = {"iteration": 0, "vocab_size": vocab_size, "tokenizer": tokenizer}
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    files = sorted(path for path in folder.iterdir() if path.name != SUMS)
    sums = "".join(f"{sha256(path)}  {path.name}\n" for path in files)
    (folder / SUMS).write_text(sums, encoding="utf-8")
    (checkpoints / TRACKER).write_text("0", encoding="utf-8")
