"""Checks of an environment whose compiled libraries can be imported, lack a driver or are broken."""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from tests.training.runs import start

NO_DRIVER = "raise OSError('libcuda.so.1: cannot open shared object file: No such file or directory')"
BELONGS = {"0.16.1": "2.9.0", "0.19.2": "2.16.0"}[importlib.metadata.version("megatron-core")]


def check(folder: Path, version: str = BELONGS, **libraries: str):
    """Run the tool with these modules and a Transformer Engine of this version installed."""
    for name, source in libraries.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
        (folder / name / "pytorch.py").write_text("")
    metadata = folder / f"transformer_engine-{version}.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: transformer_engine\nVersion: {version}\n")
    path = os.pathsep.join((str(folder), os.environ.get("PYTHONPATH", "")))
    return start("tools/check_environment.py", PYTHONPATH=path)


def test_a_missing_driver_is_reported_without_an_error(tmp_path: Path):
    torch_first = "import sys; assert 'torch' in sys.modules"
    done = check(tmp_path, transformer_engine=NO_DRIVER, amp_C=torch_first)
    assert done.returncode == 0, done.stderr
    imported = json.loads(done.stdout)["imported"]
    te = imported.pop("transformer_engine.pytorch")
    assert te.startswith("not imported, because there is no driver: OSError: libcuda.so.1")
    assert imported == {"amp_C": "imported", "fused_weight_gradient_mlp_cuda": "absent"}


@pytest.mark.parametrize("reason", ["undefined symbol: _ZN3c10", "libcublas.so.99: cannot open shared object file"])
def test_any_other_import_error_fails(tmp_path: Path, reason: str):
    # A warning about a missing driver does not excuse another error.
    warning = "print('no NVIDIA driver', file=__import__('sys').stderr)"
    done = check(tmp_path, amp_C=f"{warning}; raise ImportError({reason!r})")
    assert done.returncode == 2 and done.stdout == ""
    wanted = f"check_environment.py: error: amp_C is installed, but cannot be imported: ImportError: {reason}"
    assert done.stderr.splitlines()[-1] == wanted


def test_a_transformer_engine_that_does_not_match_megatron_core_fails(tmp_path: Path):
    done = check(tmp_path, version="2.8.0", transformer_engine="")
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("check_environment.py: error: Transformer Engine 2.8.0 does not match megatron-core 0.1")
