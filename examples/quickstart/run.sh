#!/usr/bin/env bash
# Runs the whole comparison: sets up .venv, prepares real text, trains a baseline and a TST run, compares them, explains
# the result, and exports the TST model to Hugging Face's format.
#   bash examples/quickstart/run.sh                   equal steps and seed; runs/quickstart-seed1/loss_curves.png
#   bash examples/quickstart/run.sh --seed 2          another seed
#   bash examples/quickstart/run.sh --seeds 3         seeds 1 to 3, one after the other, compared together
#   bash examples/quickstart/run.sh --equal-loss      also trains two shorter TST runs to measure the speed-up at equal loss
#   STEPS=50 PACKAGES=networkx bash examples/quickstart/run.sh    a short test of the script itself; DATA=, RUNS=: folders
#   PYTHON=python3.12 VENV=.venv-3.12 bash examples/quickstart/run.sh    another interpreter
set -euo pipefail
cd "$(dirname "$0")/../.."
seeds=(1) equal_loss=no
while [ $# -gt 0 ]; do
  case "$1" in
    --seed) seeds=("${2:?--seed needs a number}"); shift 2 ;;
    --seeds) mapfile -t seeds < <(seq "${2:?--seeds needs a number}"); shift 2 ;;
    --equal-loss) equal_loss=yes; shift ;;
    *) sed -n '2,10p' "$0" >&2; exit 2 ;;
  esac
done
steps=${STEPS:-4500}
runs=${RUNS:-runs}
data=${DATA:-data/quickstart}
# Each of the two concurrent runs uses one thread, so OpenMP threads do not spin on a core that the other run uses.
export OMP_NUM_THREADS=1

bash tools/setup_venv.sh plot,hf
python=${VENV:-.venv}/bin/python

# These packages are installed with torch and transformers. Their versions are pinned, and their source is the same for every
# Python from 3.11 on.
read -ra packages <<<"${PACKAGES:-sympy networkx pygments huggingface_hub mpmath rich}"
if [ ! -f "$data/packages_text_document.idx" ]; then
  echo "== preparing the source of the packages ${packages[*]}"
  mapfile -t folders < <($python -c 'import sys; from importlib.util import find_spec
for name in sys.argv[1:]: print(find_spec(name).submodule_search_locations[0])' "${packages[@]}")
  $python tools/preprocess_data.py --input "${folders[@]}" --tst-suffixes .py --tst-shuffle-files 1 \
    --output-prefix "$data/packages" --tokenizer-model "$data/tokenizer.json" --tst-train-bpe 512 --append-eod --workers 2
fi
echo "text: sha256 $(sha256sum <"$data/packages_text_document.bin" | cut -c1-16)"

# train NAME SEED STEPS [flags]: warm-up and decay scale with the number of steps.
train() {
  local name=$1 seed=$2 steps=$3
  local folder=$runs/quickstart-seed$seed/$name
  shift 3
  rm -rf "${folder:?}"
  $python pretrain_tst.py --config examples/quickstart/config.yaml --seed "$seed" --tst-run-dir "$folder" \
    --data-path "$data/packages_text_document" --tokenizer-model "$data/tokenizer.json" \
    --data-cache-path "$data/index_cache" --train-iters "$steps" --lr-warmup-iters $((steps / 25)) \
    --lr-wsd-decay-iters $((steps / 5)) --eval-interval $(((steps + 9) / 10)) --log-interval $(((steps + 9) / 10)) \
    "$@" 2>&1 | sed -u "s/^/[$name] /"
}

compared=()
for seed in "${seeds[@]}"; do
  echo "== training a baseline and a TST run of seed $seed, $steps steps each, side by side"
  train baseline "$seed" "$steps" --tst-bag-size 1 --tst-step-ratio 0 &
  other=$!
  train tst "$seed" "$steps"
  wait "$other"
  compared+=("$runs/quickstart-seed$seed"/{baseline,tst})
  if [ "$equal_loss" = yes ]; then
    echo "== training two shorter TST runs of seed $seed, each with its own decay, side by side"
    train tst-60 "$seed" $((steps * 3 / 5)) &
    other=$!
    train tst-40 "$seed" $((steps * 2 / 5))
    wait "$other"
    compared+=("$runs/quickstart-seed$seed"/{tst-40,tst-60})
  fi
done
folder=$runs/quickstart-seed${seeds[0]}
if [ ${#seeds[@]} -gt 1 ]; then folder=$runs/quickstart-seeds; fi
$python tools/compare_runs.py "${compared[@]}" --output "$folder/loss_curves.png"
echo "== what this shows"
$python examples/quickstart/verdict.py "${compared[@]}"

tst=$runs/quickstart-seed${seeds[0]}/tst
echo "== exporting the TST model to $tst-hf"
$python tools/convert_ckpt.py --load "$tst/checkpoints" --save "$tst-hf" --force --verify
echo "== transformers continues 'def test_': $tst-hf"
$python examples/evaluate/generate.py "$tst-hf" "def test_" --tokens 24 --temperature 0.7
