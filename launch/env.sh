# What differs from site to site. Sourced by every job script; a value from the environment wins, so a site may keep its
# own copy, or export what it needs in ~/.bashrc. Every line of docs/cluster.md's table is here.
# shellcheck shell=bash

# sbatch reads these itself, if they are exported where it is called:
#   SBATCH_PARTITION  SBATCH_ACCOUNT  SBATCH_QOS  SBATCH_RESERVATION

# Text and tokenizer, readable under these paths on every node.
export DATA_PATH=${DATA_PATH:-/data/dclm_text_document}
export MOE_DATA_PATH=${MOE_DATA_PATH:-0.5 /data/fineweb_edu_text_document 0.5 /data/dclm_text_document}
export LLAMA_TOKENIZER=${LLAMA_TOKENIZER:-/data/tokenizers/Meta-Llama-3-8B}
export QWEN_TOKENIZER=${QWEN_TOKENIZER:-/data/tokenizers/Qwen3-30B-A3B}

# A run's directory is $RUNS_DIR/<job name>: on a file system that all nodes share.
export RUNS_DIR=${RUNS_DIR:-$PWD/runs}

# Python: in a container (enroot/pyxis; the image of our Dockerfile), or else from the virtual environment VENV.
export VENV=${VENV:-.venv}
export CONTAINER_IMAGE=${CONTAINER_IMAGE:-}
export CONTAINER_MOUNTS=${CONTAINER_MOUNTS:-/data:/data:ro,$RUNS_DIR:$RUNS_DIR,$PWD:$PWD}
if [ -n "$CONTAINER_IMAGE" ]; then
  export PYTHON=${PYTHON:-python3}
else
  export PYTHON=${PYTHON:-$(realpath --no-symlinks --canonicalize-missing "$VENV")/bin/python}
fi

# A job that makes no progress over this many starts is not started again.
export MAX_RESTARTS=${MAX_RESTARTS:-5}

# Weights & Biases: where WANDB_PROJECT is set, metrics go there. Its other variables (WANDB_API_KEY, WANDB_MODE) reach the
# ranks as they are; a requeued job goes on under the run's identity, which is kept in the run directory.
export WANDB_PROJECT=${WANDB_PROJECT:-}

# Fabric: NCCL finds InfiniBand and RoCE by itself; set here what the site's network needs, such as
#   export NCCL_SOCKET_IFNAME=eth0 NCCL_IB_HCA=mlx5
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# A rank that waits for a dead one ends, with the collective it waited in, instead of hanging.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=${TORCH_NCCL_ASYNC_ERROR_HANDLING:-1}
# Overlaps tensor-parallel communication with computation on cards before Blackwell; harmless on B200.
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}
