"""Processes that answer requests: they end with this one however it ends, and one that dies is named."""

import contextlib
import multiprocessing
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from megatron_tst.config import UserError
from megatron_tst.data.interruption import holding_back

# Of each worker: a request that it answers, and one that waits for it.
REQUESTS_AT_A_TIME = 2
REQUESTS_AHEAD = 3


class _Worker:
    """One process. Two threads may wait for an answer at a time, in the order in which they ask."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        # Spawned, not forked: this process may already run threads, the tokenizer's among them.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, answer))
        self._process.start()
        theirs.close()
        self._sending, self._receiving, self._joining = threading.Lock(), threading.Lock(), threading.Lock()

    def ask(self, request: Any) -> Any:
        """Return the answer.

        Raises:
            UserError: if the worker raised one, or ended.
        """
        try:
            with self._sending:
                self._pipe.send(request)
                self._receiving.acquire()
            try:
                answer = self._pipe.recv()
            finally:
                self._receiving.release()
        except (EOFError, OSError):
            raise UserError(self._obituary()) from None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def _obituary(self) -> str:
        self._join()
        code = self._process.exitcode or 0
        cause = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; did memory run out? fewer --workers need less" if code == -signal.SIGKILL else ""
        return f"--workers: worker process {self._process.pid} {cause}{hint}"

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()
        self._join()

    def _join(self) -> None:
        with self._joining:  # of two threads that wait for one process, the second would not learn its exit code
            self._process.join()


def _serve(pipe: Connection, answer: Callable[[Any], Any]) -> None:
    """Answer requests until the other end is closed, as it is when the process there ends, however it ends."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = pipe.recv()
            try:
                pipe.send(answer(request))
            except UserError as error:
                pipe.send(error)


def ask_one(answer: Callable[[Any], Any], request: Any) -> Any:
    """Call a function in a process of its own, which dies with this one.

    Raises:
        UserError: if the function raised one, or the process ended without an answer.
    """
    with _started(answer, 1) as (worker,):
        return worker.ask(request)


def ask_all(answer: Callable[[Any], Any], requests: Iterable[Any], count: int) -> Generator[Any, None, None]:
    """Call a function for each request in several processes; the answers come in the order of the requests.

    Close the iterator where it is not read to its end: it stops the processes.

    Args:
        answer: the function; it is pickled, as requests and answers are.
        requests: its arguments, read a few ahead.
        count: processes.

    Raises:
        UserError: if the function raised one, or a process ended.
    """
    # Workers leave first: threads that wait for them then go on.
    with ThreadPoolExecutor(count * REQUESTS_AT_A_TIME) as threads, _started(answer, count) as workers:
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers * REQUESTS_AT_A_TIME:
            free.put(worker)

        def ask(request: Any) -> Any:
            """Have whichever worker is free answer."""
            worker = free.get()
            try:
                return worker.ask(request)
            finally:
                free.put(worker)

        waiting: deque[Future[Any]] = deque()
        for request in requests:
            waiting.append(threads.submit(ask, request))
            if len(waiting) >= count * REQUESTS_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _started(answer: Callable[[Any], Any], count: int) -> Iterator[list[_Worker]]:
    workers: list[_Worker] = []
    try:
        for _ in range(count):
            # Signals may be sent to all processes at once: this one stops the others, also one that is half started.
            with holding_back():
                workers.append(_Worker(answer))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
