#!/usr/bin/env bash
# The paper's 3B baseline on 64 B200: ordinary training for the same number of steps.
#   sbatch launch/dense_3b_baseline.sh [flags of pretrain_tst.py]
#SBATCH --job-name=dense-3b-baseline
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=8:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# shellcheck source=launch/job.sh
. "${SLURM_SUBMIT_DIR:?submit with sbatch}/launch/job.sh"
# shellcheck disable=SC2086  # a blend consists of several words
srun "${srun_options[@]}" launch/rank.sh --config launch/configs/dense_3b_baseline.yaml \
  --data-path $DATA_PATH --tokenizer-model "$LLAMA_TOKENIZER" "$@"
launch/requeue.sh $?
