#!/usr/bin/env bash
# Make .venv in a container image, once and for all, on top of the packages that the base image has (Dockerfile).
#   bash tools/setup_image.sh EXTRAS                  extras of pyproject.toml, such as plot,dev
#   MEGATRON_CORE=0.19.2 bash tools/setup_image.sh EXTRAS    this megatron-core, whatever constraints.txt picks
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python3 -m venv --system-site-packages --without-pip .venv

# Where the base has torch, Triton and numpy, they stay, in place of the pins: Transformer Engine and apex are compiled
# for them. Every other package is the pinned one.
kept=$(python3 -m pip list --format=freeze | grep -E '^(torch|triton|numpy)==' || true)
kept+=${MEGATRON_CORE:+$'\n'megatron-core==$MEGATRON_CORE}
awk -F== 'NR == FNR { kept[$1]; print; next } !($1 in kept)' <(echo "$kept") constraints.txt >.venv/constraints.txt

# The package's description is not part of its dependencies: a new README leaves this layer as it is.
touch README.md
# NVIDIA's images hold all their packages with PIP_CONSTRAINT, some older than megatron-core accepts.
PIP_CONSTRAINT='' .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-cache-dir \
  --constraint .venv/constraints.txt --editable ".[$1]"
touch .venv/final
