# Site settings, sourced by every job script. Values in the environment have precedence, so a site may keep its own copy
# of this file or export its values in ~/.bashrc. docs/cluster.md lists these settings in a table.
# shellcheck shell=bash

# sbatch itself reads these variables, if they are exported where it is called:
#   SBATCH_PARTITION  SBATCH_ACCOUNT  SBATCH_QOS  SBATCH_RESERVATION

# Data and tokenizers, which every node must be able to read under these paths.
export DATA_PATH=${DATA_PATH:-/data/dclm_text_document}
export MOE_DATA_PATH=${MOE_DATA_PATH:-0.5 /data/fineweb_edu_text_document 0.5 /data/dclm_text_document}
export LLAMA_TOKENIZER=${LLAMA_TOKENIZER:-/data/tokenizers/Meta-Llama-3-8B}
export QWEN_TOKENIZER=${QWEN_TOKENIZER:-/data/tokenizers/Qwen3-30B-A3B}

# A run's directory is $RUNS_DIR/<job name>, which must be on a file system that all nodes share.
export RUNS_DIR=${RUNS_DIR:-$PWD/runs}

# Python runs in a container (enroot/pyxis, with the image of our Dockerfile), or in the virtual environment VENV.
export VENV=${VENV:-.venv}
export CONTAINER_IMAGE=${CONTAINER_IMAGE:-}
export CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-/data:/data:ro,$RUNS_DIR:$RUNS_DIR,$PWD:$PWD}
if [ -n "$CONTAINER_IMAGE" ]; then
  export PYTHON=${PYTHON:-python3}
else
  export PYTHON=${PYTHON:-$(realpath --no-symlinks --canonicalize-missing "$VENV")/bin/python}
fi

# A job that makes no progress in this many starts is not started again.
export MAX_RESTARTS=${MAX_RESTARTS:-5}

# If WANDB_PROJECT is set, metrics are sent to this Weights & Biases project. Its other variables (WANDB_API_KEY,
# WANDB_MODE) are passed to the ranks. A requeued job continues its W&B run, whose id is stored in the run directory.
export WANDB_PROJECT=${WANDB_PROJECT:-}

# NCCL detects InfiniBand and RoCE by itself; add settings that the site's network needs, such as
#   export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A rank that waits for a dead rank ends with an error that names the collective, instead of hanging.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Overlaps tensor-parallel communication with computation on GPUs before Blackwell; harmless on B200.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
