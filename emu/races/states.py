"""What a search keeps of a moment: memory, registers, how far each actor is; and what a step in progress has met."""

from __future__ import annotations

import ctypes
from typing import Any

from emu.races.actors import Note, Progress
from pgtable.bits import Words


class State:
    """A moment: `pages` of memory, the CPUs' `contexts`, how far each actor is, freed pages, notes so far.

    `judged`: what the checkers know; `judged_key`: of it, what matters for what comes.
    """

    __slots__ = ("_key", "actors", "contexts", "freed", "given", "judged", "judged_key", "notes", "pages")

    def __init__(
        self,
        pages: Words,
        contexts: tuple[Context, ...],
        actors: tuple[Progress, ...],
        freed: frozenset[int],
        notes: tuple[Note, ...],
        given: int,
        judged: Any = None,
        judged_key: Any = None,
    ) -> None:
        self.pages, self.contexts, self.actors = pages, contexts, actors
        self.freed, self.notes, self.given = freed, notes, given
        self.judged, self.judged_key = judged, judged_key
        self._key: int | None = None

    @property
    def key(self) -> int:
        """Equal for states from which everything goes on in the same way."""
        if self._key is None:
            registers = tuple(c.digest if p.pc else 0 for c, p in zip(self.contexts, self.actors, strict=True))
            steady = tuple(p._replace(events=0) for p in self.actors)
            rest = (self.freed, self.notes, self.given, self.judged_key)
            self._key = hash((self.pages.tobytes(), registers, steady, *rest))
        return self._key


_CONTEXT_HEADER = 40  # bytes of struct uc_context before the registers: sizes, and pointers that differ each time


class Context:
    """A CPU's registers, and a digest of them that is made when it is first asked for."""

    __slots__ = ("_digest", "saved")

    def __init__(self, saved: Any) -> None:
        self.saved = saved
        self._digest: int | None = None

    @property
    def digest(self) -> int:
        """Equal for equal registers."""
        if self._digest is None:
            start = self.saved.context.value + _CONTEXT_HEADER
            self._digest = hash(ctypes.string_at(start, self.saved.size - _CONTEXT_HEADER))
        return self._digest


class Running:
    """What hooks know of the step in progress."""

    def __init__(
        self,
        events: int = 0,
        stopped_at: int = 0,
        *,
        free: bool = False,
        freed: frozenset[int] = frozenset(),
        notes: list[Note] | None = None,
    ) -> None:
        self.events, self.stopped_at, self.free, self.freed = events, stopped_at, free, freed
        self.notes: list[Note] = notes if notes is not None else []
        self.skip = 0
        self.waits = False  # it has stopped before WFE or YIELD
        self.disturbed: set[int] = set()  # granules that were written
