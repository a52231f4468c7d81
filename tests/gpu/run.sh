#!/usr/bin/env bash
# Runs all tests that need a GPU in less than ten minutes, and writes a report in Markdown (docs/gpu.md).
#   bash tests/gpu/run.sh [REPORT]             writes to standard output, and to REPORT or $OUT/gpu_report.md
#   PYTHON=python3.12 bash tests/gpu/run.sh    another interpreter (default: .venv's, otherwise python3)
#   TST_WHEELS=FOLDER bash tests/gpu/run.sh    takes missing packages from wheels, without a network
set -euo pipefail
report=${1:-${OUT:+$OUT/gpu_report.md}}
report=${report:+$(realpath -m "$report")}
wheels=${TST_WHEELS:+$(realpath "$TST_WHEELS")}
cd "$(dirname "$0")/../.."
python=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
packages=$(mktemp -d)
trap 'rm -rf "$packages"' EXIT
if [ -n "$wheels" ]; then
  for wheel in "$wheels"/*.whl; do
    name=$(basename "$wheel")
    case $name in
      # Transformer Engine is only unpacked: three of its files are tested, and it cannot be imported without its library.
      transformer_engine-*)
        version=${name#transformer_engine-} && version=${version%%-*}
        "$python" -m zipfile -e "$wheel" "$packages/transformer_engine_wheels/$version"
        export TST_TE_WHEELS=$packages/transformer_engine_wheels
        ;;
      *) "$python" -m zipfile -e "$wheel" "$packages" ;;
    esac
  done
  export PYTHONPATH=$packages${PYTHONPATH:+:$PYTHONPATH}
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
"$python" -m tests.gpu.report ${report:+"$report"}
