#!/usr/bin/env bash
# The paper's 600M model with superposition on 8 B200: 61 GPU-hours (eight hours) in the paper.
#   sbatch launch/dense_600m_tst.sh [flags of pretrain_tst.py]
#SBATCH --job-name=dense-600m-tst
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=12:00:00
#SBATCH --signal=USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# shellcheck source=launch/job.sh
. "${SLURM_SUBMIT_DIR:?submit with sbatch}/launch/job.sh"
# shellcheck disable=SC2086  # a blend consists of several words
srun "${srun_options[@]}" launch/rank.sh --config launch/configs/dense_600m_tst.yaml \
  --data-path $DATA_PATH --tokenizer-model "$LLAMA_TOKENIZER" "$@"
launch/requeue.sh $?
