#!/usr/bin/env python3
"""Check whether this environment can train.

Imports every module of the package and every installed compiled library, checks that the versions of Transformer Engine
and megatron-core match, and prints the versions that a run records.

python tools/check_environment.py
"""

import importlib
import pkgutil
import re
import subprocess
import sys

import megatron_tst
from megatron_tst.config import EXIT_CODE, UserError, write_json
from megatron_tst.megatron_patches.versions import check_transformer_engine
from megatron_tst.telemetry import versions

COMPILED = ("transformer_engine.pytorch", "amp_C", "fused_weight_gradient_mlp_cuda")
ABSENT = "absent"
# This runs in a process of its own, because the package hides these libraries on machines without a GPU. They need
# torch's shared libraries, so torch is imported first.
IMPORT = f"""
import importlib.util, sys
name = sys.argv[1]
if importlib.util.find_spec(name.partition(".")[0]) is None:
    print("{ABSENT}")
    sys.exit()
import torch
importlib.import_module(name)
"""
# Errors of an import without a driver. A container image holds no driver, so they occur while an image is built.
NO_DRIVER = re.compile(r"lib(cuda|nvidia-ml)\.so\.1: cannot open shared object|no NVIDIA driver|0 active drivers")


def import_compiled(name: str) -> str:
    """Import a compiled library.

    Returns:
        ``imported``, ``absent``, or the reason why it was not imported on this machine.

    Raises:
        UserError: if the library is installed and its import fails for another reason than a missing driver.
    """
    command = [sys.executable, "-c", IMPORT, name]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603, with fixed arguments
    if done.returncode == 0:
        return ABSENT if ABSENT in done.stdout.split() else "imported"
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if NO_DRIVER.search(reason):
        return f"not imported, because there is no driver: {reason}"
    raise UserError(f"{name} is installed, but cannot be imported: {reason}")


def main() -> None:
    """Check everything, and fail with the first problem."""
    recorded = versions()
    check_transformer_engine(recorded["transformer-engine"])
    imported = {name: import_compiled(name) for name in COMPILED}
    for module in pkgutil.walk_packages(megatron_tst.__path__, "megatron_tst."):
        # Megatron-LM's trainer asks for a card as soon as it is imported, and not every megatron-core has it.
        if not module.name.startswith("megatron_tst.megatron_lm."):
            importlib.import_module(module.name)
    print(write_json({**recorded, "imported": imported}, indent=2))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"check_environment.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
