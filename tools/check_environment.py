#!/usr/bin/env python3
"""Import every module of the package, and print the versions that a run records.

python tools/check_environment.py
"""

import importlib
import pkgutil

import megatron_tst
from megatron_tst.config import write_json
from megatron_tst.telemetry import versions


def main() -> None:
    """Fail where a module cannot be imported."""
    for module in pkgutil.walk_packages(megatron_tst.__path__, "megatron_tst."):
        importlib.import_module(module.name)
    print(write_json(versions(), indent=2))


if __name__ == "__main__":
    main()
