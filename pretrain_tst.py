#!/usr/bin/env python3
"""Pre-train a GPT with megatron-core, by Token Superposition Training where a bag size is set.

python pretrain_tst.py --config examples/quickstart/config.yaml
torchrun --nproc-per-node 8 pretrain_tst.py --config ... --tensor-model-parallel-size 2
"""

import os
import sys

from megatron_tst.config import EXIT_RESUMABLE, RunConfig, UserError, parse_config
from megatron_tst.determinism import compute_deterministically


def main(config: RunConfig) -> int:
    """Build the run and train it; return the exit code."""
    if config.training.deterministic_mode:
        compute_deterministically()
    # Imported only now: megatron-core brings Transformer Engine, which reads its switches when it is imported.
    from megatron_tst.platform import leave_ranks
    from megatron_tst.training import build_run, check_cluster, train

    if config.parallel.preflight or config.parallel.preflight_only:
        check_cluster(config)
        if config.parallel.preflight_only:
            return 0
    is_complete = train(build_run(config))
    leave_ranks()
    return 0 if is_complete else EXIT_RESUMABLE


if __name__ == "__main__":
    try:
        sys.exit(main(parse_config(sys.argv[1:])))
    except KeyboardInterrupt:
        sys.exit(130)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or error.own_rank:
            print(f"pretrain_tst.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
