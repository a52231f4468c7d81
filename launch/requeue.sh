#!/usr/bin/env bash
# Decides after srun whether the job is started again.
#   launch/requeue.sh CODE     CODE is srun's exit code: the highest exit code of any rank
set -euo pipefail
say() { echo "$(date '+%F %T') job ${SLURM_JOB_ID:?}: $*"; }
give_up() { say "not started again: exit code $code: $*"; exit "$code"; }
# Print a whole number without leading zeros, which bash would read as octal; fail if the text is not a whole number.
number() { [[ $1 =~ ^0*([0-9]{1,18})$ ]] && echo "${BASH_REMATCH[1]}"; }

code=$(number "${1-}") || { sed -n '2,3p' "$0" >&2; exit 2; }
case $code in
  0) say "the run is complete"; exit 0 ;;
  2 | 3) give_up "see ${RUN_DIR:?}/logs" ;;
esac
most=$(number "${MAX_RESTARTS-}") || give_up "MAX_RESTARTS '${MAX_RESTARTS-}' is not a whole number"

# The number of starts of this job since its last progress; a job that is submitted again has its own count.
restarts=${RUN_DIR:?}/restarts job='' last='' starts=''
if [ -e "$restarts" ]; then
  { read -r job last starts <"$restarts"; } 2>/dev/null || true
  if ! last=$(number "$last") || ! starts=$(number "$starts"); then
    say "$restarts contains no valid count: counting starts again"
    job=''
  fi
fi
if [ "$job" != "$SLURM_JOB_ID" ]; then last='' starts=0; fi

# Ranks that are killed because another one failed report other exit codes, so progress decides instead of the code:
# the step of the latest checkpoint. With --save, `checkpoints` is a link to the directory of the checkpoints.
checkpoints=$RUN_DIR/checkpoints
tracker=$checkpoints/latest_checkpointed_iteration.txt
if [ -L "$checkpoints" ] && [ ! -e "$checkpoints" ]; then
  say "$checkpoints links to $(readlink "$checkpoints"), which does not exist on this node: counted as no progress"
  step=${last:-0}
elif [ ! -e "$tracker" ]; then
  step=0
else
  { read -r step <"$tracker"; } 2>/dev/null || true
  if ! step=$(number "${step-}"); then
    say "$tracker names no step: counted as no progress"
    step=${last:-0}
  fi
fi

# Any other step than before is progress, also an earlier one, to which the run was reset by hand.
if [ "$step" != "$last" ]; then starts=0; fi
starts=$((starts + 1))
if [ "$starts" -gt "$most" ]; then
  give_up "$most starts from step $step made no progress (MAX_RESTARTS)"
fi
{ echo "$SLURM_JOB_ID $step $starts" >"$restarts.new" && mv -T "$restarts.new" "$restarts"; } ||
  give_up "$restarts cannot be written, so starts cannot be counted"
say "stopped with exit code $code at step $step: starting again"
scontrol requeue "$SLURM_JOB_ID" || give_up "scontrol could not requeue it"
