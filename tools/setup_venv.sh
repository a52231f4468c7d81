#!/usr/bin/env bash
# Make .venv in the repository with the pinned packages, once per change of the pins.
#   bash tools/setup_venv.sh [EXTRAS]                 extras of pyproject.toml, such as plot,dev,test (default: plot)
#   PYTHON=python3.12 bash tools/setup_venv.sh        another interpreter (3.10 or later)
# On Linux, PyPI's torch brings several GB of CUDA libraries; for a machine without a GPU:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tools/setup_venv.sh
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
extras=${1:-plot}
# An image's environment is final (tools/setup_image.sh).
if [ -e "$root/.venv/final" ]; then exit 0; fi
record=$root/.venv/installed-$extras
stamp=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
if [ "$(cat "$record" 2>/dev/null)" != "$stamp" ]; then
  echo "setting up $root/.venv (a few minutes the first time)"
  "${PYTHON:-python3}" -m venv "$root/.venv"
  "$root/.venv/bin/pip" install --quiet --disable-pip-version-check \
    --constraint "$root/constraints.txt" --editable "${root}[$extras]"
  echo "$stamp" >"$record"
fi
