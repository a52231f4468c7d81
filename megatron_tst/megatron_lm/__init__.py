"""Megatron-LM's own trainer with bags, through its hooks: every flag it has, and Token Superposition Training.

This room alone imports ``megatron.training``, which megatron-core has from 0.19 on. Its modules are imported only once
the device is entered, since they ask for a card when they are.
"""

from collections.abc import Sequence

from megatron_tst.distributed import destroy_parallel_state, enter_device
from megatron_tst.megatron_lm.availability import check_available
from megatron_tst.preflight import check_cluster

__all__ = ["check_available", "train"]


def train(argv: Sequence[str]) -> bool:
    """Train a run as a command line says; return whether its end was reached.

    Args:
        argv: the arguments after the program's name.

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
