#!/usr/bin/env bash
# One rank, started by srun once per GPU: gives torch its names for what SLURM knows and becomes the training process,
# so that SLURM's signals and exit codes are the training's own.
#   srun launch/rank.sh --config FILE [flags of pretrain_tst.py]
set -euo pipefail
export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID WORLD_SIZE=$SLURM_NTASKS
exec "$PYTHON" pretrain_tst.py --tst-run-dir "$RUN_DIR" --load "$RUN_DIR/checkpoints" --preflight \
  ${WANDB_PROJECT:+--wandb-project "$WANDB_PROJECT"} "$@"
