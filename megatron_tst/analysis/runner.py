"""Trains the runs of a grid in processes."""

import os
import queue
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from megatron_tst.analysis.sweep import SweepRun
from megatron_tst.config import EXIT_CODE

# Outcome of a run that was still waiting when the grid was stopped.
NOT_STARTED = "not started"


class Runner:
    """Runs pretrain_tst.py in a limited number of concurrent processes, each with its own GPU if there are GPUs."""

    def __init__(self, program: Path, workers: int, gpus: Sequence[str]) -> None:
        """Prepare one slot per concurrent run.

        Args:
            program: path of pretrain_tst.py.
            workers: number of concurrent runs.
            gpus: values of CUDA_VISIBLE_DEVICES; empty for CPU runs, which share the cores.
        """
        self._program, self.workers = program, workers
        self._slots: queue.Queue[dict[str, str]] = queue.Queue()
        share = str(max((os.cpu_count() or 1) // workers, 1))
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", share)}
        for slot in range(workers):
            self._slots.put({"CUDA_VISIBLE_DEVICES": gpus[slot % len(gpus)]} if gpus else threads)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._is_stopped = False

    @property
    def running(self) -> list[str]:
        """Names of the running runs."""
        return list(self._processes)

    def run_all(self, runs: Sequence[SweepRun]) -> Iterator[tuple[SweepRun, str | None]]:
        """Yield each run when it ends, with the reason of its failure or None.

        After a user's mistake no further run starts. On an interruption, the running runs are asked to save and stop,
        and this method waits for them.
        """
        with ThreadPoolExecutor(self.workers) as pool:
            futures = {pool.submit(self._run, run): run for run in runs}
            try:
                for future in as_completed(futures):
                    yield futures[future], future.result()
            finally:
                self._is_stopped = True
                for process in list(self._processes.values()):
                    process.terminate()

    def _run(self, run: SweepRun) -> str | None:
        slot = self._slots.get()
        try:
            if self._is_stopped:
                return NOT_STARTED
            run.write_settings()
            log = run.directory.path.with_name(f"{run.name}.out")
            with log.open("wb") as file:
                command = (sys.executable, str(self._program), *run.argv)
                environment = {**os.environ, **slot}
                # A session of its own keeps the terminal's signals, such as Ctrl-C, away from the run.
                process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
                self._processes[run.name] = process
                if self._is_stopped:
                    process.terminate()
                code = process.wait()
            self._is_stopped |= code == EXIT_CODE
            last = log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            return None if code == 0 else f"exit code {code}: {last} ({log})"
        finally:
            self._processes.pop(run.name, None)
            self._slots.put(slot)
