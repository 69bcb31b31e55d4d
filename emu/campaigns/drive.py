"""The coordinator's loop: hands out chunks, takes results, and hands out again what was lost with a worker.

Rules of this file:
- With a pool, all chunks that were handed out are lost together, and any of them may be the one that ended its worker.
  They are run again one at a time; a chunk that is lost ALONE times alone is put aside, and the campaign goes on.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future, wait

from emu.campaigns.plan import CampaignError, Chunk, Result
from emu.campaigns.workers import Workers

ALONE = 2  # times that a chunk may end its worker with nothing else handed out


def drive(chunks: Iterable[Chunk], workers: Workers, take: Callable[[Chunk, Result], None]) -> list[Chunk]:
    """Runs all chunks, and gives each result to `take` in the order in which they come.

    Returns the chunks that were put aside. Whatever ends this, the workers are closed.
    """
    at_once = True
    try:
        aside = _Drive(chunks, workers, take).run()
        at_once = False
        return aside
    finally:
        workers.close(at_once=at_once)


class _Drive:
    def __init__(self, chunks: Iterable[Chunk], workers: Workers, take: Callable[[Chunk, Result], None]) -> None:
        self.fresh, self.workers, self.take = iter(chunks), workers, take
        self.running: dict[Future[Result], Chunk] = {}
        self.suspects: deque[Chunk] = deque()
        self.alone: Chunk | None = None
        self.ended: Counter[Chunk] = Counter()  # workers that went while it was alone
        self.aside: list[Chunk] = []

    def run(self) -> list[Chunk]:
        self._hand_out()
        while self.running:
            done, _ = wait(self.running, return_when=FIRST_COMPLETED)
            for future in done:
                self._finished(self.running.pop(future), future)
            self._hand_out()
        return self.aside

    def _hand_out(self) -> None:
        if self.suspects:
            if not self.running:
                self.alone = self.suspects.popleft()
                self._submit(self.alone)
            return
        room = self.workers.window() - len(self.running)
        for _, chunk in zip(range(room), self.fresh, strict=False):
            self._submit(chunk)

    def _submit(self, chunk: Chunk) -> None:
        self.running[self.workers.submit(chunk)] = chunk

    def _finished(self, chunk: Chunk, future: Future[Result]) -> None:
        try:
            result = future.result()
        except self.workers.lost:
            self._lost(chunk)
        except CancelledError:
            raise CampaignError("the scheduler is gone; the store has what was done before") from None
        else:
            self.take(chunk, result)

    def _lost(self, chunk: Chunk) -> None:
        self.ended[chunk] += chunk == self.alone
        if self.ended[chunk] < ALONE:
            self.suspects.append(chunk)
        else:
            self.aside.append(chunk)
