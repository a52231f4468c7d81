#!/usr/bin/env bash
# Runs one rank; srun starts it once per GPU. It sets torch's variables from SLURM's and becomes the training process,
# so that SLURM's signals reach the training directly and its exit code is the task's.
#   srun launch/rank.sh --config FILE [flags of pretrain_tst.py]
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$PYTHON" pretrain_tst.py --tst-run-dir "$RUN_DIR" --load "$RUN_DIR/checkpoints" --preflight \
  ${WANDB_PROJECT:+--wandb-project "$WANDB_PROJECT"} "$@"
