"""Token Superposition Training with Megatron-LM's own trainer and all its flags, through its hooks.

Only this room imports ``megatron.training``, which megatron-core contains from 0.19 on. Its modules look for a GPU when
they are imported, so they are imported only after the device is entered.
"""

from collections.abc import Sequence

from megatron_tst.distributed import destroy_parallel_state, enter_device
from megatron_tst.megatron_lm.availability import check_available
from megatron_tst.preflight import check_cluster

__all__ = ["check_available", "train"]


def train(argv: Sequence[str]) -> bool:
    """Train the run that a command line describes; return whether the end of its schedule was reached.

    Args:
        argv: command-line arguments after the program's name.

    Raises:
        UserError: if Megatron-LM's trainer is not installed, or a setting, a checkpoint or a file cannot be used.
        StoppedInSetUp: if a signal asks to stop before the first step.
        SystemExit: with code 0 after ``--help``.
    """
    check_available()
    device = enter_device()
    if device.torch_device.type == "cpu":
        from megatron_tst.megatron_patches.cpu import enter_cpu_card

        enter_cpu_card()
    from megatron_tst.megatron_lm.run import prepare

    run = prepare(argv, device)
    parallel = run.config.parallel
    if parallel.preflight or parallel.preflight_only:
        check_cluster(run.config)
        if parallel.preflight_only:
            return True
    is_complete = run.train()
    destroy_parallel_state()
    return is_complete
