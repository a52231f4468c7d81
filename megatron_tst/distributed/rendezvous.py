"""A rendezvous of all ranks before process groups are formed, which reports missing ranks by name."""

import json
import os
import socket
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from megatron_tst.config import UserError

# The port next to that of torchrun's own store, which the process groups use later.
PORT_OFFSET = 1


class Rendezvous:
    """All ranks of a job, connected by a key-value store on the main rank; no process group, no GPU.

    Attributes:
        rank: 0-based number in the world.
        world_size: number of processes.
        host: name of this machine.
        store: torch's key-value store.
    """

    def __init__(self, timeout_s: float) -> None:
        """Connect to the main rank, whose address torchrun's environment gives.

        Args:
            timeout_s: seconds that a rank waits for another.

        Raises:
            UserError: if the main rank cannot be reached.
        """
        self.rank, self.world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self.host = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        self._timeout = timedelta(seconds=timeout_s)
        address, port = os.environ.get("MASTER_ADDR", "localhost"), int(os.environ.get("MASTER_PORT", "0"))
        try:
            self.store = dist.TCPStore(
                address,
                port and port + PORT_OFFSET,
                is_master=self.rank == 0,
                timeout=self._timeout,
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"preflight: {self.host} cannot reach {address}:{port + PORT_OFFSET} (MASTER_ADDR, MASTER_PORT): "
                f"{str(error).splitlines()[0]}",
                own_rank=True,
            ) from error

    def gather(self, topic: str, report: Any) -> list[Any]:
        """Return the reports of all ranks, in rank order, on every rank.

        Collective: every rank calls it. The error names missing ranks, and their hosts if the job script lists them.

        Args:
            topic: a name that is used only once.
            report: this rank's report, which must be representable in JSON.

        Raises:
            UserError: on the ranks that call, if another does not call within the timeout.
        """
        self.store.set(f"{topic}/{self.rank}", json.dumps(report))
        if self.rank == 0:
            missing = [rank for rank in range(self.world_size) if not self._arrives(f"{topic}/{rank}")]
            self.store.set(f"{topic}/missing", json.dumps(missing))
        elif not self._arrives(f"{topic}/missing", patience=2):
            raise UserError(f"preflight: {self.host} lost contact with rank 0", own_rank=True)
        missing = json.loads(self.store.get(f"{topic}/missing"))
        here = [rank for rank in range(self.world_size) if rank not in missing]
        reports = {rank: json.loads(self.store.get(f"{topic}/{rank}")) for rank in here}
        self._wait_for_readers(topic, here)
        if missing:
            raise UserError(f"preflight: no report from {self._names(missing)} within {self._timeout} ({topic})")
        return [reports[rank] for rank in here]

    def _wait_for_readers(self, topic: str, ranks: list[int]) -> None:
        """Make the main rank, whose process holds the store, wait until all other ranks have read the reports."""
        if self.rank != 0:
            self.store.set(f"{topic}/read/{self.rank}", "")
            return
        for rank in ranks:
            if rank != 0:
                self._arrives(f"{topic}/read/{rank}")

    def _arrives(self, key: str, patience: int = 1) -> bool:
        try:
            self.store.wait([key], patience * self._timeout)
        except dist.DistStoreError:
            return False
        return True

    def _names(self, ranks: list[int]) -> str:
        """Return the names of ranks, with their hosts if the job script lists them."""
        hosts = os.environ.get("TST_NODES", "").split()
        per_host = max(self.world_size // max(len(hosts), 1), 1)
        named = [f"rank {rank} on {hosts[rank // per_host]}" if hosts else f"rank {rank}" for rank in ranks]
        return ", ".join(named[:8]) + (f" and {len(named) - 8} more" if len(named) > 8 else "")
