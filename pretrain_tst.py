#!/usr/bin/env python3
"""Pre-train a GPT with megatron-core, by Token Superposition Training if a bag size is set.

python pretrain_tst.py --config examples/quickstart/config.yaml
torchrun --nproc-per-node 8 pretrain_tst.py --config ... --tensor-model-parallel-size 2
"""

import os
import sys
from typing import NoReturn

from megatron_tst.config import EXIT_RESUMABLE, RunConfig, StoppedInSetUp, UserError, find_trainer, parse_config
from megatron_tst.determinism import compute_deterministically

# Most errors and stops occur on all ranks, and one rank reports them for all.
IS_MAIN_RANK = os.environ.get("RANK", "0") == "0"


def main(config: RunConfig) -> int:
    """Set the run up, train, and return the exit code."""
    if config.training.deterministic_mode:
        compute_deterministically()
    # Imported only now: megatron-core imports Transformer Engine, which reads its environment variables on import.
    from megatron_tst.distributed import destroy_parallel_state
    from megatron_tst.distributed.signals import StopSignals, ignore_stop_signals
    from megatron_tst.training import check_cluster, start_run, train

    signals = StopSignals()
    try:
        if config.parallel.preflight or config.parallel.preflight_only:
            check_cluster(config)
            if config.parallel.preflight_only:
                return 0
        is_complete = train(start_run(config, signals), signals)
        destroy_parallel_state()
        return 0 if is_complete else EXIT_RESUMABLE
    finally:
        # The exit code is decided; a scheduler that sees the first rank end sends signals to ranks that are about to.
        ignore_stop_signals()


def main_megatron_lm(argv: list[str]) -> int:
    """Train with Megatron-LM's trainer; return the exit code."""
    from megatron_tst.distributed.signals import ignore_stop_signals
    from megatron_tst.megatron_lm import train

    try:
        return 0 if train(argv) else EXIT_RESUMABLE
    finally:
        ignore_stop_signals()


def leave(code: int, line: str | None = None) -> NoReturn:
    """Print a line and exit; the exit code stays the same if the line cannot be written."""
    try:
        if line is not None:
            print(f"pretrain_tst.py: {line}", file=sys.stderr)
        sys.stderr.flush()
    except OSError:
        # Otherwise Python would flush stderr again at exit, fail, and exit with 120.
        sys.stderr = None  # type: ignore[assignment]
    sys.exit(code)


if __name__ == "__main__":
    try:
        arguments = sys.argv[1:]
        if find_trainer(arguments) == "megatron-lm":
            leave(main_megatron_lm(arguments))
        leave(main(parse_config(arguments)))
    except KeyboardInterrupt:
        leave(130)
    except StoppedInSetUp as stop:
        leave(stop.exit_code, str(stop) if IS_MAIN_RANK else None)
    except UserError as error:
        leave(error.exit_code, f"error: {error}" if IS_MAIN_RANK or error.own_rank else None)
