"""What a TLB entry gives, and judging it: uses of entries that the tables do not justify any more.

Rules of this file:
- A use is stale by its outcome: another PA, other attributes, another fault than a walk of the tables gives now.
- While the CPU that changed the tables is still at work, another CPU may use what it has. Such a use becomes a finding
  when the writer returns, if it could still happen then and would still be wrong. The writer's own is one at once.
Sources: Arm ARM D8.17 (R_GPPYH, R_LXHLD), D8.17.1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from pgtable.access import Access
from pgtable.memory import Memory, NoMemory
from pgtable.params import WalkParams
from pgtable.tlb_events import Finding, Symbol, Tlbi, Write, named
from pgtable.tlb_store import Entry
from pgtable.tlbi import ELSEWHERE, canonical, misses
from pgtable.walk import Translation, Walk, walk

MISSING, STALE = "missing invalidation", "stale use"
CONFLICT, FREED, UNSEEN = "TLB conflict", "freed table used", "store not visible"
_LOGGED = 64  # TLBIs that messages look back on
_KNOWN = 64  # results that an entry keeps


class Written(NamedTuple):
    """The last store to a descriptor, and when."""

    event: Write
    serial: int


class Use(NamedTuple):
    """An access through an entry that the tables do not justify. `gave`: its outcome."""

    cpu: int
    va: int
    pc: int
    entry: Entry
    written: Written
    access: Access
    params: WalkParams
    gave: tuple[Any, ...]


class Judge:
    """Keeps who wrote what, and turns stale uses into `findings`. `holds(cpu, entry)`: the TLB still has it."""

    def __init__(self, memory: Memory, symbol: Symbol | None, holds: Callable[[int, Entry], bool]) -> None:
        self.findings: list[Finding] = []
        self._memory, self._symbol, self._holds = memory, symbol, holds
        self._written: dict[int, Written] = {}
        self._returned: dict[int, int] = {}  # CPU -> when
        self._log: tuple[tuple[int, Tlbi], ...] = ()
        self._uses: tuple[Use, ...] = ()

    def write(self, event: Write, serial: int) -> None:
        """A store to a descriptor."""
        self._written[event.pa] = Written(event, serial)

    def tlbi(self, event: Tlbi, serial: int) -> None:
        """A TLBI, for messages."""
        self._log = (*self._log[1 - _LOGGED :], (serial, event))

    def stale(
        self, cpu: int, va: int, pc: int, entry: Entry, access: Access, params: WalkParams, gave: tuple[Any, ...]
    ) -> None:
        """An access used `entry` and came to `gave`, and the tables say otherwise."""
        fetch, written = self._memory.fetch, self._written
        made = [written[pa] for _, pa, word in entry.steps if pa in written and fetch(pa) != word]
        if not made:
            self.note(STALE, cpu, pc, va, entry, cause="registers changed")
            return
        last = max(made, key=lambda one: one.serial)
        use = Use(cpu, va, pc, entry, last, access, params, gave)
        if cpu == last.event.cpu or self.has_returned(last.event.cpu, last.serial):
            self._report(use)
        else:
            self._uses = (*self._uses, use)

    def has_returned(self, cpu: int, serial: int) -> bool:
        """A writer has returned since."""
        return self._returned.get(cpu, -1) > serial

    def unseen(self, cpu: int, va: int, pc: int, found: Walk, write: Write, cause: str) -> None:
        """An access needs a store that it may not see yet."""
        names = named(self._symbol, pc), named(self._symbol, write.pc)
        at = write.level, write.pa, write.old, write.new, write.cpu, write.pc
        self.findings.append(Finding(UNSEEN, cause, cpu, pc, va, *at, *names))

    def returned(self, cpu: int, serial: int) -> None:
        """A writer returns: the stale uses of its changes that are still possible are findings."""
        self._returned[cpu] = serial
        self._resolve(lambda use: use.written.event.cpu == cpu)

    def finish(self) -> None:
        """Every writer returns."""
        self._resolve(lambda _: True)

    def _resolve(self, mine: Callable[[Use], bool]) -> None:
        for use in self._uses:
            if mine(use) and self._holds(use.cpu, use.entry) and self._differs(use):
                self._report(use)
        self._uses = tuple(use for use in self._uses if not mine(use))

    def _differs(self, use: Use) -> bool:
        """The tables still say otherwise: not so where the same mapping was made again."""
        return outcome(walk(self._memory.fetch, use.params, use.va, use.access)) != use.gave

    def _report(self, use: Use) -> None:
        tried = [tlbi for serial, tlbi in self._log if serial > use.written.serial]
        reasons = [(tlbi.op.name, misses(tlbi.op, use.entry.target)) for tlbi in tried]
        near = [f"{name}: {why or 'not complete'}" for name, why in reasons if why not in ELSEWHERE]
        rule = STALE if near else MISSING
        self.note(rule, use.cpu, use.pc, use.va, use.entry, use.written.event, near[-1] if near else "")

    def note(
        self, rule: str, cpu: int, pc: int, va: int, entry: Entry, write: Write | None = None, cause: str = ""
    ) -> None:
        """A finding about an entry; `write` is what made it wrong."""
        level, pa, word = entry.steps[-1]
        if write is not None:
            level, pa = write.level, write.pa
        by, at = (write.cpu, write.pc) if write else (cpu, pc)
        names = named(self._symbol, pc), named(self._symbol, at)
        old, new = entry.words.get(pa, word), self._now(pa, word)
        self.findings.append(Finding(rule, cause, cpu, pc, va, level, pa, old, new, by, at, *names))

    def _now(self, pa: int, word: int) -> int:
        try:
            return self._memory.fetch(pa)
        except NoMemory:
            return word

    def snapshot(self) -> tuple[Any, ...]:
        """The state, for `restore`."""
        return dict(self._written), dict(self._returned), self._log, self._uses, len(self.findings)

    def restore(self, state: tuple[Any, ...]) -> None:
        """Back to a state; findings since are dropped."""
        written, returned, self._log, self._uses, found = state
        self._written, self._returned = dict(written), dict(returned)
        del self.findings[found:]

    def key(self) -> tuple[Any, ...]:
        """Hashable, equal where the same uses wait for their writers."""
        return tuple((use.cpu, use.va, use.entry.key, use.written.event.cpu) for use in self._uses)


def outcome(found: Walk) -> tuple[Any, ...]:
    """What software can tell of an access: where it went and how, or which kind of fault it met."""
    result = found.result
    if isinstance(result, Translation):
        return result.pa, result.attr, result.sh, result.ns
    return (result.type,)


def replay(entry: Entry, va: int, access: Access, p: WalkParams) -> Walk:
    """The access through a leaf entry: the walk again over the words that it has. `p`: of the CPU now, for PAN."""
    old = entry.params
    if old is not p and access.pan is None and (old.pan, old.uao) != (p.pan, p.uao):
        access = replace(access, pan=p.pan, uao=p.uao)
    found = entry.known.get((va, access))
    if found is None:
        if len(entry.known) >= _KNOWN:
            entry.known.clear()
        found = entry.known[va, access] = _through(entry, va, access)
    return found


def _through(entry: Entry, va: int, access: Access) -> Walk:
    p = entry.params
    one = p.fmt.granule.level_size(entry.target.level)
    if entry.target.size == one:
        return walk(entry.words.__getitem__, p, va, access)
    inside = entry.va & -one | va & one - 1  # a contiguous run: the entry that was read stands for all
    found = walk(entry.words.__getitem__, p, inside, access)
    if isinstance(found.result, Translation):
        moved = found.result._replace(pa=found.result.pa + (canonical(va) & -one) - (entry.va & -one))
        return Walk(va, access, p, found.raw, moved, found.updates)
    return Walk(va, access, p, found.raw, found.result)


def conflict(leaves: list[Entry], walks: list[Walk]) -> bool:
    """Several entries for one address do not agree; or differ in size, which below FEAT_BBM level 3 is enough."""
    sizes = {entry.target.size for entry in leaves}
    if len(sizes) > 1 and leaves[0].params.features.bbm < 3:
        return True
    return any(outcome(one) != outcome(walks[0]) for one in walks)
