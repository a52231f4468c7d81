#!/usr/bin/env bash
# Set up .venv and run everything that must hold: style, types, tests. Arguments go to pytest:
#   bash tests/run.sh -m "not distributed" -k loss
#   PYTHON=python3.12 VENV=.venv-3.12 bash tests/run.sh    with another interpreter
set -euo pipefail
cd "$(dirname "$0")/.."
export VENV=${VENV:-.venv}
bash tools/setup_venv.sh plot,hf,wandb,tensorboard,dev,test
# Two spinning OpenMP threads per process can be far slower than one; tests run several processes.
export OMP_NUM_THREADS=1
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
"$VENV/bin/python" -m pytest "$@"
if [ $# -eq 0 ] && [ ! -e "$VENV/final" ] && "$VENV/bin/python" -c 'import triton' 2>/dev/null; then
  # On their own: Triton chooses its interpreter when it is first imported.
  echo "== Transformer Engine's kernels under Triton's interpreter, and what its Python code shows without a card"
  bash tests/fetch_te_wheels.sh "$VENV/transformer_engine" "$VENV/bin/pip"
  TRITON_INTERPRET=1 TST_TE_WHEELS=$VENV/transformer_engine "$VENV/bin/python" -m pytest \
    tests/model/test_te_kernels.py tests/model/test_te_without_card.py
fi
