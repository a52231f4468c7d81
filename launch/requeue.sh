#!/usr/bin/env bash
# Decide after srun whether the job is to run again.
#   launch/requeue.sh CODE     CODE is srun's: the highest exit code of any rank
set -euo pipefail
say() { echo "$(date '+%F %T') job ${SLURM_JOB_ID:?}: $*"; }
give_up() { say "not started again: exit code $code: $*"; exit "$code"; }
# Print the whole number that a text is, without leading zeros, which bash takes for octal; fail where it is none.
number() { [[ $1 =~ ^0*([0-9]{1,18})$ ]] && echo "${BASH_REMATCH[1]}"; }

code=$(number "${1-}") || { sed -n '2,3p' "$0" >&2; exit 2; }
case $code in
  0) say "the run is complete"; exit 0 ;;
  2 | 3) give_up "see ${RUN_DIR:?}/logs" ;;
esac
most=$(number "${MAX_RESTARTS-}") || give_up "MAX_RESTARTS '${MAX_RESTARTS-}' is no whole number"

# How often this job was started since its last progress; a job that was submitted anew begins a count of its own.
restarts=${RUN_DIR:?}/restarts job='' last='' starts=''
if [ -e "$restarts" ]; then
  { read -r job last starts <"$restarts"; } 2>/dev/null || true
  if ! last=$(number "$last") || ! starts=$(number "$starts"); then
    say "$restarts holds no count: it begins anew"
    job=''
  fi
fi
if [ "$job" != "$SLURM_JOB_ID" ]; then last='' starts=0; fi

# Ranks that were killed for another's sake report other codes than the one that ended first: what counts is progress,
# the step of the latest checkpoint. With --save, `checkpoints` is a link to where they are.
checkpoints=$RUN_DIR/checkpoints
tracker=$checkpoints/latest_checkpointed_iteration.txt
if [ -L "$checkpoints" ] && [ ! -e "$checkpoints" ]; then
  say "$checkpoints leads to $(readlink "$checkpoints"), which is not seen here: counted as no progress"
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

# Another step than before is progress, an earlier one too: the run was set back by hand.
if [ "$step" != "$last" ]; then starts=0; fi
starts=$((starts + 1))
if [ "$starts" -gt "$most" ]; then
  give_up "$most starts from step $step made no progress (MAX_RESTARTS)"
fi
{ echo "$SLURM_JOB_ID $step $starts" >"$restarts.new" && mv -T "$restarts.new" "$restarts"; } ||
  give_up "$restarts cannot be written, so starts cannot be counted"
say "stopped with exit code $code at step $step: starting again"
scontrol requeue "$SLURM_JOB_ID" || give_up "scontrol did not requeue it"
