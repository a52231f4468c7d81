#!/usr/bin/env python3
"""Print the status of runs from their metrics.jsonl: phase, step, loss, speed and remaining time.

python tools/run_status.py runs/moe-10b-tst [more runs]
"""

import argparse
import sys
from datetime import timedelta
from pathlib import Path

from megatron_tst.config import EXIT_CODE, UserError
from megatron_tst.telemetry.status import read_status


def main() -> None:
    """Print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories")
    for run in parser.parse_args().runs:
        status = read_status(run)
        valid = "" if status.valid_loss is None else f"  validation {status.valid_loss:.4f}"
        left = "complete" if status.is_complete else f"{timedelta(seconds=round(status.seconds_left))} left"
        saved = "no checkpoint" if status.checkpoint is None else f"checkpoint {status.checkpoint}"
        print(
            f"{run}: step {status.step}/{status.num_steps}  phase {status.phase + 1}/{status.num_phases} "
            f"s={status.bag_size}  {status.loss_kind} {status.loss:.4f}{valid}  {status.step_time_s:.3g} s/step  "
            f"{left}  {saved}"
        )


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(f"run_status.py: error: {error}", file=sys.stderr)
        sys.exit(EXIT_CODE)
