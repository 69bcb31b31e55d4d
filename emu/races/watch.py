"""What actors do that others can notice: where switch points are, and what the checkers and the search are told.

How a switch point is found: loads and stores of table pages are seen by hooks on their PAs, which tell the PC;
barriers, TLB maintenance, exclusives, atomics and ordered accesses by decoding each block as it is translated. Only
those addresses (`sites`) get a hook on the instruction, which stops before it. What is found after the hooks were set
raises `Learned`: the search starts again, knowing more.

Rules of this file:
- A switch point has the number of the actor's event (what others can notice) that comes next. The number depends on
  what was executed only, not on what was hooked: schedules mean the same in every run.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from emu import engine
from emu.checkers import Checkers
from emu.cpus import is_store_exclusive
from emu.machine import Machine
from emu.races.actors import POISON, Actor, Event, Note
from emu.races.sites import decoded, lock_sites, site_kind
from emu.races.states import Running, State
from emu.trace import Event as Seen
from emu.trace import TableWrite
from pgtable.bits import Words
from pgtable.memory import PAGE
from pgtable.tlb_events import TableFree, Write
from pgtable.tlb_stale import CONFLICT, FREED, MISSING, STALE, UNSEEN

Ranges = Sequence[tuple[int, int]]  # (PA, bytes)
GRANULE = 16  # bytes that an exclusive reserves: the smallest that the architecture allows (CTR_EL0.ERG)
OF_TLB = (CONFLICT, FREED, MISSING, STALE, UNSEEN)  # rules of the TLB model, the others are break-before-make's


class Learned(Exception):  # noqa: N818  no error: the search starts again
    """A site, a page or a table was found that the search did not know of."""


class Watch:
    """The hooks on `machines`, of which `actors[i]` runs on `machines[i]`; the parameters are those of `Stepper`."""

    def __init__(
        self,
        machines: Sequence[Machine],
        actors: Sequence[Actor],
        tables: Ranges,
        *,
        interrupt: bool,
        checkers: Checkers | None,
        quiet: frozenset[str],
    ) -> None:
        self.machines, self.actors, self.interrupt = list(machines), list(actors), interrupt
        self.checkers, self.quiet = checkers, quiet
        self.memory = machines[0].memory
        self.tables: list[tuple[int, int]] = [r for r in tables if r[1]]
        self.trace: list[Event] | None = None
        self._cpus = list(dict.fromkeys(machines))
        self._running = 0
        self._now = Running()
        self._begin = self.memory.written()
        self._know_nothing()
        self._hook()

    def _know_nothing(self) -> None:
        self.sites: dict[int, str] = {}
        self._words: dict[int, int] = {}  # of the sites
        self._blocks: set[int] = set()
        self._page_numbers: set[int] = set()
        self._new: set[str] = set()
        self._exclusives: dict[int, int] = {}  # PC of a store-exclusive: the register of its address
        self._granules: set[int] = set()  # PAs that exclusives reserve
        self._granules_hooked: set[int] = set()
        self._guarded: set[int] = set()  # pages that were freed on some path
        self._learning = True
        self._hooked: set[int] = set()
        self._watching: list[tuple[Machine, int]] = []

    def _hook(self) -> None:
        for machine in self._cpus:
            machine.cpu.on_new_block(partial(self._new_block, machine))
            for pc, blocks in lock_sites(machine).items():
                machine.cpu.on_code(partial(self._at_lock, machine, blocks), pc, pc)
            for base, size in self.tables:
                self._watch(machine, base, size)

    # what is known

    def learn(self) -> None:
        """Sets hooks for what was found since. Where code ran that is new, each page written is noted (slower)."""
        everything = bool(self._new) or not self.sites
        for machine, handle in self._watching:
            machine.cpu.remove(handle)
        self._watching = []
        for machine in self._cpus:
            for site in set(self.sites) - self._hooked:
                machine.cpu.on_code(self._at_site, site, site)
            for granule in self._granules - self._granules_hooked:
                machine.cpu.on_write(self._disturbed, granule, granule + GRANULE - 1)
            for region in self.memory.regions if everything else ():
                handle = machine.cpu.on_write(self._written, region.base, region.base + region.size - 1)
                self._watching.append((machine, handle))
            machine.cpu.flush_code()
        self._hooked |= set(self.sites)
        self._granules_hooked |= self._granules
        self._learning = everything
        self._new.clear()
        self._set_pages()

    def table_words(self, state: State) -> Words:
        """The table pages of a state that any path writes: uint64 of shape (n, words of a page); see `table_pages`."""
        return state.pages[self._table_rows]

    @property
    def table_pages(self) -> list[int]:
        """The PAs of the 4 KiB pages whose words `table_words` gives."""
        return [self._numbers[row] * PAGE for row in self._table_rows.tolist()]

    def check_learned(self) -> None:
        """Raises Learned if the search so far has met what it did not know. For the end of a search."""
        if self._new:
            raise Learned
        known = self._numbers
        before = dict(zip(self._first_numbers, self._first_words, strict=True))
        for number, words in self._all_written():
            if number not in known and not np.array_equal(before.get(number, words[:0]), words):
                self._page_numbers.add(number)
                raise Learned

    def _all_written(self) -> list[tuple[int, Words]]:
        found = []
        for region, (numbers, words) in zip(self.memory.regions, self.memory.written().parts, strict=True):
            found += [(int(n) + region.base // PAGE, w) for n, w in zip(numbers, words, strict=True)]
        return found

    def _set_pages(self) -> None:
        """The pages that a state holds: those that any path is known to write."""
        self.memory.rewind(self._begin)
        written = self._all_written()
        self._first_numbers, self._first_words = [n for n, _ in written], [w for _, w in written]
        self._numbers = sorted(self._page_numbers)
        self._views = []
        for region in self.memory.regions:
            first, last = region.base // PAGE, (region.base + region.size) // PAGE
            inside = [n - first for n in self._numbers if first <= n < last]
            self._views.append((region.words.reshape(-1, PAGE // 8), np.array(inside, np.int64)))
        rows = [r for r, n in enumerate(self._numbers) if any(b <= n * PAGE < b + size for b, size in self.tables)]
        self._table_rows = np.array(rows, np.int64)

    def _new_block(self, machine: Machine, pc: int, size: int) -> bool:
        if pc in self._blocks:
            return True
        self._blocks.add(pc)
        if not self._learning:
            self._new.add("block")
        spins = False
        for k, word in enumerate(np.frombuffer(machine.read(pc, size // 4 * 4), "<u4").tolist()):
            kind = site_kind(word)
            if kind and pc + 4 * k not in self.sites:
                self.sites[pc + 4 * k], self._words[pc + 4 * k] = kind, word
                self._new.add("site")
                spins = spins or kind == "wait"
                if is_store_exclusive(word):
                    self._exclusives[pc + 4 * k] = word >> 5 & 31
        return not spins  # without its hook it would spin for ever

    def _written(self, pa: int, size: int, value: int) -> bool:
        for number in (pa // PAGE, (pa + size - 1) // PAGE):
            if number not in self._page_numbers:
                self._page_numbers.add(number)
                self._new.add("page")
        return True

    # what hooks see

    def _disturbed(self, pa: int, size: int, value: int) -> bool:
        self._now.disturbed.add(pa & -GRANULE)
        return True

    def _touched(self, machine: Machine, pa: int, size: int, value: int | None = None) -> bool:
        pc = machine.cpu.read(engine.PC)
        kind = self.sites.get(pc)
        if kind is None:
            self.sites[pc] = "memory"
            self._new.add("site")
        if kind in (None, "memory"):
            self._now.events += 1
        if self.checkers and value is not None:
            self._judge(TableWrite(pa, value & (1 << 8 * size) - 1, pc, size))
        if self.trace is not None:
            self._trace_access(pc, pa, size, value)
        return True

    def _trace_access(self, pc: int, pa: int, size: int, value: int | None) -> None:
        assert self.trace is not None
        old = self.memory.fetch(pa & -8)
        shift, mask = 8 * (pa & 7), (1 << 8 * size) - 1
        new = old if value is None else old & ~(mask << shift) | (value & mask) << shift
        kind = "read" if value is None else "write"
        self.trace.append(Event(self._name, self._now.events, kind, pc, "", pa & -8, old, new))

    def _at_site(self, pc: int) -> bool:
        now, kind = self._now, self.sites[pc]
        if kind in self.quiet:
            if self.checkers:
                self._judge_site(pc, kind)
            return True
        if kind == "wait" and now.skip != pc:
            now.waits = True
            return False
        if now.skip != pc and not now.free and now.events != now.stopped_at:
            return False
        now.skip = 0
        if kind not in ("memory", "wait"):
            now.events += 1
            if self.checkers and kind in ("barrier", "tlbi"):
                self._judge_site(pc, kind)
            if self.trace is not None:
                self.trace.append(Event(self._name, now.events, kind, pc, ""))
        return True

    def _at_lock(self, machine: Machine, blocks: int, pc: int) -> bool:
        """At the entry of a lock's function: the actor waits as long as somebody holds the lock."""
        if machine.word_at(machine.argument(0), 8) & blocks:
            self._now.waits = True
            return False
        return True

    def _judge_site(self, pc: int, kind: str) -> None:
        """Tells the checkers of a barrier or TLBI that is about to be executed."""
        seen = decoded(self._words[pc], pc, kind, self.machines[self._running])
        if seen:
            self._judge(seen)

    def _judge(self, seen: Seen) -> None:
        assert self.checkers
        event = self.checkers.saw(self._cpu, seen)
        if isinstance(event, Write):
            self.checkers.tree.linked(event)  # a new table is known from now on; its words are no switch points
        self._note_findings()

    def _note_findings(self) -> None:
        assert self.checkers
        for finding in self.checkers.taken():
            self._note("tlb" if finding.rule in OF_TLB else "bbm", str(finding))

    @property
    def _cpu(self) -> int:
        """The number of the running actor's CPU."""
        return 0 if self.interrupt else self._running

    @property
    def _name(self) -> str:
        return self.actors[self._running].name

    def _note(self, kind: str, text: str) -> None:
        note = Note(kind, self._name, text)
        if note not in self._now.notes:
            self._now.notes.append(note)

    def free(self, pa: int) -> None:
        """From a stub: the table page at `pa` is given back, and filled with a pattern. Its use is a finding."""
        page = self.machines[0].plan.page_size
        self._now.freed |= {pa & -page}
        if self.checkers:
            self.checkers.feed(TableFree(pa & -page, self._cpu))
            self._note_findings()
        self.memory.words(pa & -page, page // 8)[:] = POISON
        for at in range(pa & -page, (pa & -page) + page, PAGE):
            self._written(at, 8, 0)
        self._guard(pa & -page)

    def _guard(self, page: int) -> None:
        """Accesses to a page are looked at from now on; while it is freed they are findings."""
        if page in self._guarded:
            return
        self._guarded.add(page)
        for machine in self._cpus:
            last = page + machine.plan.page_size - 1
            machine.cpu.on_read(partial(self._touched_freed, machine), page, last)
            machine.cpu.on_write(partial(self._touched_freed, machine), page, last)
        self._new.add("table")

    def _touched_freed(self, machine: Machine, pa: int, size: int, value: int | None = None) -> bool:
        if pa & -machine.plan.page_size in self._now.freed:
            how, pc = "read" if value is None else "written", machine.cpu.read(engine.PC)
            self._note("freed-table", f"{machine.describe(pc)}: PA {pa:#x} is {how}, in a table page that was freed")
        return True

    def _watch(self, machine: Machine, base: int, size: int) -> None:
        machine.cpu.on_read(partial(self._touched, machine), base, base + size - 1)
        machine.cpu.on_write(partial(self._touched, machine), base, base + size - 1)
