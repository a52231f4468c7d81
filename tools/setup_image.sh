#!/usr/bin/env bash
# Creates .venv in a container image, on top of the base image's packages; the Dockerfile runs this once.
#   bash tools/setup_image.sh EXTRAS                  extras of pyproject.toml, such as plot,dev
#   MEGATRON_CORE=0.19.2 bash tools/setup_image.sh EXTRAS    this megatron-core instead of the pinned one
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -m venv --system-site-packages --without-pip .venv

# If the base image has torch, Triton and numpy, these versions replace the pinned ones, because Transformer Engine and
# apex are compiled for them. All other packages have the pinned versions.
kept=$(python3 -m pip list --format=freeze | grep -E '^(torch|triton|numpy)==' || true)
kept+=${MEGATRON_CORE:+$'\n'megatron-core==$MEGATRON_CORE}
awk -F== 'NR == FNR { kept[$1]; print; next } !($1 in kept)' <(echo "$kept") constraints.txt >.venv/constraints.txt

# The installation needs a README, but an empty one suffices, so that a change of the README does not rebuild this layer.
touch README.md
# NVIDIA's images pin all packages by PIP_CONSTRAINT, and some of these are too old for megatron-core.
PIP_CONSTRAINT='' .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir \
  --constraint .venv/constraints.txt --editable ".[$1]"
touch .venv/final
