# Common part of all job scripts, sourced inside the job, where SLURM has set its variables.
# shellcheck shell=bash
cd "${SLURM_SUBMIT_DIR:?submit with sbatch}" || exit 2
[ -f launch/env.sh ] || { echo "error: submit from the project's directory: $PWD has no launch/env.sh" >&2; exit 2; }
# shellcheck source=launch/env.sh
. launch/env.sh
export RUN_DIR=$RUNS_DIR/$SLURM_JOB_NAME
mkdir -p "$RUN_DIR/logs"

# The first node hosts the ranks' store. The port depends on the job's id, so that two jobs on a node do not collide.
TST_NODES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd' ')
export TST_NODES MASTER_ADDR=${TST_NODES%% *} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))

# Options of srun: each task is one rank, output goes to one file per node, and a failed rank ends all others.
srun_options=(--kill-on-bad-exit=1 --open-mode=append "--output=$RUN_DIR/logs/%N.log")
if [ -n "$CONTAINER_IMAGE" ]; then
  srun_options+=("--container-image=$CONTAINER_IMAGE" "--container-mounts=$CONTAINER_MOUNTS" "--container-workdir=$PWD")
fi
