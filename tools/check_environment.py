#!/usr/bin/env python3
"""Say whether this environment can train.

Every module of the package and every compiled library that is installed is imported, and Transformer Engine's version
has to belong to megatron-core's. Prints the versions that a run records.

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
# In a process of its own, since the package hides these libraries where no GPU is. They need torch's shared libraries.
IMPORT = f"""
import importlib.util, sys
name = sys.argv[1]
if importlib.util.find_spec(name.partition(".")[0]) is None:
    print("{ABSENT}")
    sys.exit()
import torch
importlib.import_module(name)
"""
# How an import fails without a driver, as while an image is built: no image holds the driver's libraries.
NO_DRIVER = re.compile(r"lib(cuda|nvidia-ml)\.so\.1: cannot open shared object|no NVIDIA driver|0 active drivers")


def import_compiled(name: str) -> str:
    """Import a compiled library.

    Returns:
        ``imported``, ``absent``, or what the machine lacks to import it.

    Raises:
        UserError: if it is installed and cannot be imported, for another reason than the driver's absence.
    """
    command = [sys.executable, "-c", IMPORT, name]
    done = subprocess.run(command, capture_output=True, text=True)  # noqa: S603, with fixed arguments
    if done.returncode == 0:
        return ABSENT if ABSENT in done.stdout.split() else "imported"
    reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    if NO_DRIVER.search(reason):
        return f"not tried, for want of a driver: {reason}"
    raise UserError(f"{name} is installed and cannot be imported: {reason}")


def main() -> None:
    """Fail with the first thing that is wrong."""
    recorded = versions()
    check_transformer_engine(recorded["transformer-engine"])
    imported = {name: import_compiled(name) for name in COMPILED}
    for module in pkgutil.walk_packages(megatron_tst.__path__, "megatron_tst."):
        importlib.import_module(module.name)
    print(write_json({**recorded, "imported": imported}, indent=2))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"check_environment.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
