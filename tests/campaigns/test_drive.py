"""The coordinator's loop with workers that go away at random: every chunk's result is taken, or it is put aside."""

from __future__ import annotations

import random
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool

import pytest

from emu.campaigns.drive import ALONE, drive
from emu.campaigns.plan import COMPARISON, CampaignError, Chunk, Result, Unit

CHUNKS = [Chunk(Unit(COMPARISON, "k", "6.12", "f", "4K", "plain"), 1, i, 1) for i in range(60)]


class Pool:
    """Workers of which one goes now and then, with all that was handed out: a process pool, without processes."""

    lost: tuple[type[BaseException], ...] = (BrokenProcessPool,)

    def __init__(self, rng: random.Random, poison: frozenset[Chunk] = frozenset(), chance: float = 0.1) -> None:
        self.rng, self.poison, self.chance = rng, poison, chance
        self.out: list[tuple[Future[Result], Chunk]] = []
        self.alone_with_poison = 0
        self.closed: bool | None = None

    def window(self) -> int:
        return 4

    def submit(self, chunk: Chunk) -> Future[Result]:
        future: Future[Result] = Future()
        self.out.append((future, chunk))
        if len(self.out) == self.window() or self.rng.random() < 0.5:
            self.work()
        return future

    def work(self) -> None:
        """All that is out is done, or lost."""
        lost = any(chunk in self.poison for _, chunk in self.out) or self.rng.random() < self.chance
        for future, _ in self.out:
            future.set_exception(BrokenProcessPool()) if lost else future.set_result(Result([], []))
        self.alone_with_poison += lost and len(self.out) == 1 and self.out[0][1] in self.poison
        self.out = []

    def close(self, *, at_once: bool) -> None:
        self.closed = at_once


class Impatient(Pool):
    """Whatever is handed out is worked on at once."""

    def submit(self, chunk: Chunk) -> Future[Result]:
        future: Future[Result] = Future()
        self.out.append((future, chunk))
        self.work()
        return future


def taken(pool: Pool) -> tuple[list[Chunk], list[Chunk]]:
    """The chunks whose results were taken, and those put aside."""
    found: list[Chunk] = []
    aside = drive(CHUNKS, pool, lambda chunk, _: found.append(chunk))
    return found, aside


@pytest.mark.parametrize("seed", range(20))
def test_no_chunk_is_lost_or_taken_twice(seed: int) -> None:
    pool = Impatient(random.Random(seed))
    found, aside = taken(pool)
    assert sorted(found + aside) == CHUNKS
    assert len(aside) < 3  # twice lost alone by chance
    assert pool.closed is False


def test_chunks_that_end_every_worker_are_put_aside_and_the_rest_is_done() -> None:
    poison = frozenset({CHUNKS[3], CHUNKS[40]})
    pool = Impatient(random.Random(1), poison, chance=0)
    found, aside = taken(pool)
    assert (set(aside), sorted([*found, *aside])) == (poison, CHUNKS)
    assert pool.alone_with_poison == 2 * (ALONE + 1)  # once among fresh ones


def test_an_error_of_a_worker_ends_the_campaign_and_the_workers() -> None:
    class Failing(Impatient):
        def work(self) -> None:
            for future, _ in self.out:
                future.set_exception(CampaignError("no QEMU"))
            self.out = []

    pool = Failing(random.Random(1))
    with pytest.raises(CampaignError, match="no QEMU"):
        taken(pool)
    assert pool.closed is True


def test_a_scheduler_that_is_gone_is_one_sentence() -> None:
    class Gone(Impatient):
        def work(self) -> None:
            for future, _ in self.out:
                future.set_exception(CancelledError())
            self.out = []

    with pytest.raises(CampaignError, match="the scheduler is gone"):
        taken(Gone(random.Random(1)))
