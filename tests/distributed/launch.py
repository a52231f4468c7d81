"""Run a function on several gloo ranks of this machine without ever hanging."""

import contextlib
import multiprocessing
import os
import pickle
import random
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from typing import Any

import torch
import torch.distributed as dist

# Imported once by a server process that forks the ranks, because importing torch and megatron-core takes seconds.
PRELOADED = ["megatron_tst.training", "megatron_tst.megatron_patches.cpu", "tests.distributed.layouts"]


def run_distributed(function: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 600.0) -> list[Any]:
    """Call ``function(*args)`` on every rank and return the ranks' results in order.

    The environment of the ranks is that of torchrun. If a rank raises an error or dies, all others are killed.

    Raises:
        AssertionError: with the traceback of the first rank that failed, or naming the ranks that still ran after the
            timeout.
    """
    store = open_store()
    context = forking_context()
    processes, pipes = [], {}
    for rank in range(world_size):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(
            target=_rank, args=(function, args, rank, world_size, store.port, theirs), daemon=True
        )
        process.start()
        theirs.close()
        processes.append(process)
        pipes[ours] = rank
    try:
        return _collect(pipes, world_size, timeout_s)
    finally:
        for process in processes:
            # The process may end by itself before it is killed.
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            process.join()


def forking_context() -> ForkServerContext:
    """Return a multiprocessing context whose processes start with the slow imports done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def open_store() -> dist.TCPStore:
    """Open a store whose next port is free too, because the preflight uses it.

    Both ports lie below the kernel's ephemeral range, so no connection takes the second one in the meantime.
    """
    for port in random.SystemRandom().sample(range(20000, 32000, 2), 100):
        with contextlib.suppress(OSError, RuntimeError):
            with socket.socket() as neighbour:
                neighbour.bind(("", port + 1))
            return dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    raise AssertionError("no two ports in a row are free")


def _rank(function: Callable[..., Any], args: Any, rank: int, world_size: int, port: int, pipe: Connection) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        # The store belongs to the test's process, as torchrun's store belongs to its agent.
        TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    torch.set_num_threads(1)
    try:
        message = ("result", pickle.dumps(function(*args)))
    except BaseException:
        message = ("error", traceback.format_exc())
    pipe.send(message)
    pipe.close()
    # Exit without clean-up: a rank that waited for a dead one at exit would hang.
    os._exit(0)


def _collect(pipes: dict[Connection, int], world_size: int, timeout_s: float) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout_s
    waiting = dict(pipes)
    while waiting:
        ready = wait(list(waiting), timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            raise AssertionError(f"ranks {sorted(waiting.values())} of {world_size} still ran after {timeout_s:.0f} s")
        for pipe in ready:
            rank = waiting.pop(pipe)
            try:
                kind, content = pipe.recv()
            except EOFError:
                kind, content = "error", "the process died without a message"
            if kind == "error":
                raise AssertionError(f"rank {rank} of {world_size} failed:\n{content}")
            results[rank] = pickle.loads(content)
    return [results[rank] for rank in range(world_size)]
