#!/usr/bin/env bash
# From nothing to a comparison: sets up .venv, prepares real text, trains a baseline and a TST run, compares them, and
# exports the TST model to Hugging Face's format.
#   bash examples/quickstart/run.sh                   equal steps, same seed and model; runs/quickstart/loss_curves.png
#   bash examples/quickstart/run.sh --seed 2          another seed
#   bash examples/quickstart/run.sh --equal-loss      then shorter TST runs, until one ends above the baseline's loss
#   STEPS=40 bash examples/quickstart/run.sh          a shorter trial of the script itself
#   PYTHON=python3.12 VENV=.venv-3.12 bash examples/quickstart/run.sh    another interpreter
set -euo pipefail
cd "$(dirname "$0")/../.."
seed=1 equal_loss=no
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) seed=${2:?--seed needs a number}; shift 2 ;;
    --equal-loss) equal_loss=yes; shift ;;
    *) sed -n '2,8p' "$0" >&2; exit 2 ;;
  esac
done
steps=${STEPS:-2500}
runs=${RUNS:-runs/quickstart-seed$seed}
data=${DATA:-data/quickstart}
# The two runs share a machine: one thread each leaves no OpenMP threads spinning for a core that the other holds.
export OMP_NUM_THREADS=1

bash tools/setup_venv.sh plot,hf
python=${VENV:-.venv}/bin/python

if [ ! -f "$data/stdlib_text_document.idx" ]; then
  stdlib=$($python -c 'import sysconfig; print(sysconfig.get_paths()["stdlib"])')
  echo "== preparing the source of Python's standard library, $stdlib"
  $python tools/preprocess_data.py --input "$stdlib" --tst-suffixes .py --tst-exclude site-packages \
    --tst-shuffle-files 1 --output-prefix "$data/stdlib" --tokenizer-model "$data/tokenizer.json" \
    --tst-train-bpe 512 --append-eod --workers 2
fi

# train NAME STEPS [flags]: warm-up and decay keep their share of the run.
train() {
  local name=$1 steps=$2
  shift 2
  rm -rf "${runs:?}/$name"
  $python pretrain_tst.py --config examples/quickstart/config.yaml --seed "$seed" --tst-run-dir "$runs/$name" \
    --data-path "$data/stdlib_text_document" --tokenizer-model "$data/tokenizer.json" \
    --data-cache-path "$data/index_cache" --train-iters "$steps" --lr-warmup-iters $((steps / 25)) \
    --lr-wsd-decay-iters $((steps / 5)) --eval-interval $(((steps + 9) / 10)) --log-interval $(((steps + 9) / 10)) \
    "$@" 2>&1 | sed -u "s/^/[$name] /"
}

echo "== training a baseline and a TST run, $steps steps each, side by side"
train baseline "$steps" --tst-bag-size 1 --tst-step-ratio 0 &
baseline=$!
train tst "$steps"
wait "$baseline"
$python tools/compare_runs.py "$runs/baseline" "$runs/tst" --output "$runs/loss_curves.png"

if [ "$equal_loss" = yes ]; then
  echo "== shorter TST runs, each with its own decay, until one ends above the baseline"
  for percent in 90 80 70 60 50; do
    train "tst-$percent" $((steps * percent / 100))
    $python tools/compare_runs.py "$runs/baseline" "$runs"/tst* --output "$runs/equal_loss.png" |
      tee "$runs/equal_loss.txt"
    # Until the baseline's final loss lies between those of two lengths, there is a bound only.
    if ! grep -Eq "speed-up .* at least" "$runs/equal_loss.txt"; then break; fi
  done
fi

echo "== exporting the TST model to $runs/hf"
$python tools/convert_ckpt.py --load "$runs/tst/checkpoints" --save "$runs/hf" --force --verify
echo "== transformers continues 'def test_': $runs/hf"
$python examples/evaluate/generate.py "$runs/hf" "def test_" --tokens 24 --temperature 0.7
