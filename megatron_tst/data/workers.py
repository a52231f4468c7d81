"""Worker processes that answer requests; they end with this process, and the error names one that dies."""

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

# Each worker has one request that it is answering and one that waits.
REQUESTS_AT_A_TIME = 2
REQUESTS_AHEAD = 3


class _Worker:
    """One worker process. Two threads may wait for its answers at a time, which come in the order of their requests."""

    def __init__(self, answer: Callable[[Any], Any]) -> None:
        # The process is spawned, not forked, because this process may already run threads, such as the tokenizer's.
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, answer))
        self._process.start()
        theirs.close()
        self._sending, self._receiving, self._joining = threading.Lock(), threading.Lock(), threading.Lock()

    def ask(self, request: Any) -> Any:
        """Return the worker's answer to a request.

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
        cause = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        hint = "; if memory ran out, use fewer --workers" if code == -signal.SIGKILL else ""
        return f"--workers: worker process {self._process.pid} {cause}{hint}"

    def kill(self) -> None:
        """Kill the process and wait for its end."""
        self._process.kill()
        self._join()

    def _join(self) -> None:
        with self._joining:  # if two threads waited at the same time, the second would not get the exit code
            self._process.join()


def _serve(pipe: Connection, answer: Callable[[Any], Any]) -> None:
    """Answer requests until the other end of the pipe closes, which it does however the process there ends."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = pipe.recv()
            try:
                pipe.send(answer(request))
            except UserError as error:
                pipe.send(error)


def ask_one(answer: Callable[[Any], Any], request: Any) -> Any:
    """Call a function in a separate process, which ends with this one.

    Raises:
        UserError: if the function raised one, or the process ended without an answer.
    """
    with _started(answer, 1) as (worker,):
        return worker.ask(request)


def ask_all(answer: Callable[[Any], Any], requests: Iterable[Any], count: int) -> Generator[Any, None, None]:
    """Call a function for each request in several processes, and yield the answers in the order of the requests.

    Close the iterator if it is not read to its end, to stop the processes.

    Args:
        answer: the function to call, which must be picklable, as must requests and answers.
        requests: arguments of the calls, which are read a few ahead.
        count: number of processes.

    Raises:
        UserError: if the function raised one, or a process ended.
    """
    # The workers are stopped before the threads, which otherwise would keep waiting for them.
    with ThreadPoolExecutor(count * REQUESTS_AT_A_TIME) as threads, _started(answer, count) as workers:
        free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in workers * REQUESTS_AT_A_TIME:
            free.put(worker)

        def ask(request: Any) -> Any:
            """Return the answer of the next free worker."""
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
            # A signal may go to all processes at once; this process stops the others, even one that is still starting.
            with holding_back():
                workers.append(_Worker(answer))
        yield workers
    finally:
        for worker in workers:
            worker.kill()
