#!/usr/bin/env bash
# The paper's 10B-A1B baseline on 64 B200: 12311 GPU-hours (eight days) in the paper.
#   sbatch launch/moe_10b_baseline.sh [flags of pretrain_tst.py]
#SBATCH --job-name=moe-10b-baseline
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# shellcheck source=launch/job.sh
. "${SLURM_SUBMIT_DIR:?submit with sbatch}/launch/job.sh"
# shellcheck disable=SC2086  # a blend consists of several words
srun "${srun_options[@]}" launch/rank.sh --config launch/configs/moe_10b_baseline.yaml \
  --data-path $MOE_DATA_PATH --tokenizer-model "$QWEN_TOKENIZER" "$@"
launch/requeue.sh $?
