"""Who does the work: processes of this machine, or a Dask cluster. Both are a concurrent.futures.Executor.

Rules of this file:
- `lost`: the exceptions that say that a worker went away in the middle. Work can be handed out all the same.
- A local worker ends with its coordinator, however that ends, and leaves Ctrl-C to it.
"""

from __future__ import annotations

import importlib
import os
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor
from multiprocessing import active_children, get_context, parent_process
from signal import SIG_IGN, SIGINT, signal
from threading import Thread
from typing import Any, Protocol

from emu.campaigns.plan import CampaignError, Chunk, Result
from emu.campaigns.work import run_chunk

AHEAD = 2  # chunks that are handed out for each worker


class Workers(Protocol):
    """What hands chunks to workers."""

    lost: tuple[type[BaseException], ...]

    def submit(self, chunk: Chunk) -> Future[Result]:
        """Hands out a chunk."""
        ...

    def window(self) -> int:
        """How many chunks should be handed out now."""
        ...

    def close(self, *, at_once: bool) -> None:
        """Ends what was started here; `at_once`: chunks in the middle too."""
        ...


class Processes:
    """`jobs` processes of this machine."""

    lost: tuple[type[BaseException], ...] = (BrokenExecutor,)

    def __init__(self, jobs: int) -> None:
        self.jobs, self._others = jobs, active_children()
        self._pool = self._started()

    def _started(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(self.jobs, get_context("spawn"), _begin)

    def submit(self, chunk: Chunk) -> Future[Result]:
        """Hands out a chunk; to new processes after a loss, with which a pool ends the others too."""
        try:
            return self._pool.submit(run_chunk, chunk)
        except BrokenExecutor:
            self._pool = self._started()
            return self._pool.submit(run_chunk, chunk)

    def window(self) -> int:
        """Some for each process."""
        return AHEAD * self.jobs

    def close(self, *, at_once: bool) -> None:
        """Ends the processes."""
        if at_once:
            for process in set(active_children()) - set(self._others):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """Of a process, before its first chunk."""
    signal(SIGINT, SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent
    parent.join()
    os._exit(1)


class Cluster:
    """The workers of a Dask scheduler ("tcp://HOST:PORT"), however many there are at a time."""

    def __init__(self, address: str) -> None:
        try:
            distributed: Any = importlib.import_module("distributed")
        except ImportError:
            raise CampaignError("--scheduler needs Dask: pip install 'pgtable[cluster]'") from None
        self.lost: tuple[type[BaseException], ...] = (distributed.KilledWorker,)
        try:
            self._client = distributed.Client(address, set_as_default=False)
        except (OSError, ValueError) as error:
            raise CampaignError(f"--scheduler {address}: {error}") from None
        self._executor: Executor = self._client.get_executor(pure=False)

    def submit(self, chunk: Chunk) -> Future[Result]:
        """Hands out a chunk; the scheduler gives it to another worker where one is lost, a few times."""
        return self._executor.submit(run_chunk, chunk)

    def window(self) -> int:
        """Some for each thread that there is now."""
        threads: dict[str, int] = self._client.nthreads()
        return AHEAD * max(1, sum(threads.values()))

    def close(self, *, at_once: bool) -> None:
        """Leaves the cluster, which gives up what it still runs for us."""
        self._executor.shutdown(wait=not at_once)
        self._client.close()
