"""The settings that --deterministic-mode makes, and when; tests/training/test_run.py trains with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_tst.config import UserError
from megatron_tst.determinism import compute_deterministically
from tests.training.runs import ROOT, arguments

VARIABLES = ["NVTE_ALLOW_NONDETERMINISTIC_ALGO", "CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"]


@pytest.fixture
def unset(monkeypatch):
    for name in VARIABLES:
        # Setting the variable first makes monkeypatch also undo what the tested function sets.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield monkeypatch
    torch.use_deterministic_algorithms(False)


def test_torch_and_the_environment_are_set(unset):
    compute_deterministically()
    assert torch.are_deterministic_algorithms_enabled()
    assert [os.environ[name] for name in VARIABLES] == ["0", ":4096:8", "Ring"]


def test_accepted_values_in_the_environment_are_kept(unset):
    unset.setenv("NCCL_ALGO", "CollnetDirect,Ring")
    unset.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    compute_deterministically()
    assert [os.environ[name] for name in VARIABLES] == ["0", ":16:8", "CollnetDirect,Ring"]


@pytest.mark.parametrize("setting", [f"{VARIABLES[0]}=1", f"{VARIABLES[1]}=:0:0", f"{VARIABLES[2]}=Ring,Tree"])
def test_conflicting_value_in_the_environment_is_refused(unset, setting):
    unset.setenv(*setting.split("="))
    with pytest.raises(UserError, match=f"--deterministic-mode: {setting}: must be"):
        compute_deterministically()
    assert not torch.are_deterministic_algorithms_enabled()


# Prints the settings at the moment when the import of megatron-core begins, and exits.
WATCH = """
import importlib.abc, json, os, sys
import torch

class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "megatron.core":
            found = [os.environ.get(name) for name in VARIABLES] + [torch.are_deterministic_algorithms_enabled()]
            print(json.dumps(found), flush=True)
            os._exit(0)

sys.meta_path.insert(0, Watch())
import pretrain_tst
pretrain_tst.main(pretrain_tst.parse_config(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("flag", "found"), [("--deterministic-mode", ["0", ":4096:8", "Ring", True]), ("", [None, None, None, False])]
)
def test_settings_are_made_before_megatron_core_is_imported(tmp_path: Path, flag, found):
    argv = arguments("corpus", "tokenizer", tmp_path / "run", flag)
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    code = f"VARIABLES = {VARIABLES}\n{WATCH}"
    command = [sys.executable, "-c", code, *argv]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert json.loads(done.stdout) == found, done.stderr
