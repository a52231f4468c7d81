#!/usr/bin/env bash
# Submits one job per bag size and step ratio, each with its own run directory.
#   launch/sweep.sh launch/dense_270m_tst.sh "4 6 8" "0.2 0.3 0.4" [flags of pretrain_tst.py]
#   SBATCH="sbatch --time=12:00:00" launch/sweep.sh ...       another submit command; SBATCH=echo is a dry run
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,4p' "$0" >&2; exit 2; }
script=$1 bag_sizes=$2 ratios=$3
shift 3
job=$(sed -n 's/^#SBATCH --job-name=//p' "$script")
for s in $bag_sizes; do
  for r in $ratios; do
    # shellcheck disable=SC2086  # SBATCH may contain flags
    ${SBATCH:-sbatch} --job-name="$job-s$s-r$r" "$script" --tst-bag-size "$s" --tst-steps None --tst-step-ratio "$r" "$@"
  done
done
