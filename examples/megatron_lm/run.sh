#!/usr/bin/env bash
# Trains the same run with the own trainer and with Megatron-LM's and compares their losses; needs Python 3.12.
#   bash examples/megatron_lm/run.sh
#   STEPS=20 bash examples/megatron_lm/run.sh     shorter runs; DATA=, RUNS= set folders, PYTHON=, VENV= an interpreter
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-python3.12} VENV=${VENV:-.venv-3.12} OMP_NUM_THREADS=1
steps=${STEPS:-100} runs=${RUNS:-runs/megatron_lm} data=${DATA:-data/megatron_lm}

bash tools/setup_venv.sh
python=$VENV/bin/python

if [ ! -f "$data/sources_text_document.idx" ]; then
  $python tools/preprocess_data.py --input megatron_tst tests tools --tst-suffixes .py --tst-shuffle-files 1 \
    --output-prefix "$data/sources" --tokenizer-model "$data/tokenizer.json" --tst-train-bpe 512 --append-eod
fi

# train TRAINER [flags]
train() {
  local folder=$runs/$1
  rm -rf "${folder:?}"
  $python pretrain_tst.py --tst-trainer "$@" --config examples/megatron_lm/config.yaml --tst-run-dir "$folder" \
    --data-path "$data/sources_text_document" --tokenizer-model "$data/tokenizer.json" --train-iters "$steps"
}
echo "== training with the own trainer"
train own
echo "== training with Megatron-LM's trainer and two of its own flags"
train megatron-lm --log-throughput --timing-log-level 1

echo "== comparing"
$python - "$runs" <<'PYTHON'
import sys
from pathlib import Path

from megatron_tst.telemetry import read_metrics

own, theirs = (read_metrics(Path(sys.argv[1]) / trainer / "metrics.jsonl") for trainer in ("own", "megatron-lm"))
for name in ("loss", "valid_loss"):
    pairs = [(ours[name], line[name]) for ours, line in zip(own, theirs, strict=True) if name in ours]
    print(f"{name}: {len(pairs)} values, at most {max(abs(a - b) for a, b in pairs):.1e} apart, at last {pairs[-1][1]:.4f}")
PYTHON
