#!/usr/bin/env bash
# Decide after srun whether the job is to run again.
#   launch/requeue.sh CODE     CODE is srun's: the highest exit code of any rank
set -euo pipefail
code=$1
say() { echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"; }

case $code in
  0) say "the run is complete"; exit 0 ;;
  2 | 3) say "not started again: exit code $code (see $RUN_DIR/logs)"; exit "$code" ;;
esac

# Ranks that were killed for another's sake report other codes than the one that ended first: what counts is progress.
step=$(cat "$RUN_DIR/checkpoints/latest_checkpointed_iteration.txt" 2>/dev/null || echo 0)
last=-1 starts=0
if [ -f "$RUN_DIR/restarts" ]; then read -r last starts <"$RUN_DIR/restarts"; fi
if [ "$step" -gt "$last" ]; then starts=0; fi
starts=$((starts + 1))
echo "$step $starts" >"$RUN_DIR/restarts"
if [ "$starts" -gt "$MAX_RESTARTS" ]; then
  say "not started again: $MAX_RESTARTS starts from step $step made no progress (MAX_RESTARTS), exit code $code"
  exit "$code"
fi
say "stopped with exit code $code at step $step: starting again"
scontrol requeue "$SLURM_JOB_ID"
