#!/usr/bin/env bash
# Creates .venv in the repository with the pinned packages, or updates it after a change of the pins.
#   bash tools/setup_venv.sh [EXTRAS]                 extras of pyproject.toml, such as plot,dev,test (default: plot)
#   PYTHON=python3.12 VENV=.venv-3.12 bash tools/setup_venv.sh
#                                                     another interpreter (3.10 or later), in its own folder
# On Linux, PyPI's torch includes several GB of CUDA libraries; on a machine without a GPU, use:
#   PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu bash tools/setup_venv.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
extras=${1:-plot} venv=${VENV:-.venv}
if [[ ,$extras, == *,gpu,* ]]; then
  echo "setup_venv.sh: gpu: Transformer Engine and apex are part of the container image; docs/docker.md describes it and the manual installation" >&2
  exit 2
fi
# The environment of a container image must not change (tools/setup_image.sh).
if [ -e "$venv/final" ]; then exit 0; fi
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
if [ -n "${PYTHON:-}" ] && [ -e "$venv/bin/python" ] && [ "$(version "$PYTHON")" != "$(version "$venv/bin/python")" ]; then
  echo "$venv holds Python $(version "$venv/bin/python"), but PYTHON=$PYTHON is $(version "$PYTHON"): set VENV to another folder" >&2
  exit 2
fi
record=$venv/installed-$extras
stamp=$(cat pyproject.toml constraints.txt | cksum)
if [ "$(cat "$record" 2>/dev/null)" != "$stamp" ]; then
  echo "setting up $venv (a few minutes the first time)"
  [ -e "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable ".[$extras]"
  echo "$stamp" >"$record"
fi
