#!/usr/bin/env bash
# Set up .venv and run everything that must hold: style, types, tests. Arguments go to pytest:
#   bash tests/run.sh -m "not distributed" -k loss
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup_venv.sh
# Two spinning OpenMP threads per process can be far slower than one; tests run several processes.
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest "$@"
