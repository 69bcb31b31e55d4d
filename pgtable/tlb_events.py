"""What happens to translation tables and TLBs, as events; and what the checkers report.

Rules of this file:
- An event is what a CPU did, in the order in which the CPUs' steps are interleaved (sequentially consistent). `pc` is
  for messages only.
- A write is told with the word before it, so that a checker needs no memory of its own.
Sources: Arm ARM C6.2 (DSB), D8.17.8 (which DSB completes what).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pgtable.access import Access
from pgtable.tlbi import Domain, Invalidation

Symbol = Callable[[int], "str | None"]  # a PC -> the function it is in


class Write(NamedTuple):
    """A store to a descriptor: at PA `pa`, of `level`, translating from `va` on.

    `va`: None in a page that no tree reaches (a table before it is linked); no checker minds such a write. `asid`: of
    the tree, None for the current one of the CPU.
    """

    cpu: int
    pc: int
    pa: int
    level: int
    va: int | None
    old: int
    new: int
    asid: int | None = None


class Tlbi(NamedTuple):
    """A TLBI, decoded (tlbi.decode)."""

    cpu: int
    op: Invalidation
    pc: int = 0


class Dsb(NamedTuple):
    """A DSB; `domain` is its option: "sy", "ish", "ishst", "nsh" ... or "ishnxs"."""

    cpu: int
    domain: str
    pc: int = 0


class Isb(NamedTuple):
    """An ISB, or another context synchronization event (exception entry, ERET)."""

    cpu: int
    pc: int = 0


class SysregWrite(NamedTuple):
    """An MSR of a register that translation reads, by the Arm ARM's name."""

    cpu: int
    name: str
    value: int
    pc: int = 0


class TableFree(NamedTuple):
    """The table page at `pa` goes back to the allocator."""

    pa: int
    cpu: int = 0
    pc: int = 0


class TableReuse(NamedTuple):
    """The page at `pa` that was a table is used for something else."""

    pa: int
    cpu: int = 0
    pc: int = 0


class Return(NamedTuple):
    """The function that changed the tables returns: whatever it had to do about TLBs is done."""

    cpu: int
    pc: int = 0


class Use(NamedTuple):
    """A memory access through the MMU."""

    cpu: int
    va: int
    access: Access
    pc: int = 0


Event = Write | Tlbi | Dsb | Isb | SysregWrite | TableFree | TableReuse | Return | Use


class Strength(NamedTuple):
    """What a DSB waits for. `stores`: earlier stores are visible. `all`: and TLBIs are complete (loads and stores)."""

    domain: Domain
    stores: bool
    all: bool
    nxs: bool


def _strengths() -> dict[str, Strength]:
    made = {}
    for prefix, domain in (("nsh", Domain.LOCAL), ("ish", Domain.INNER), ("osh", Domain.OUTER)):
        made[prefix] = Strength(domain, True, True, False)
        made[f"{prefix}st"] = Strength(domain, True, False, False)
        made[f"{prefix}ld"] = Strength(domain, False, False, False)
        made[f"{prefix}nxs"] = Strength(domain, True, True, True)
    for suffix, like in (("sy", "osh"), ("st", "oshst"), ("ld", "oshld"), ("synxs", "oshnxs")):
        made[suffix] = made[like]
    return made


STRENGTHS: dict[str, Strength] = _strengths()


def completes(dsb: Strength, op: Invalidation) -> bool:
    """A DSB of this strength, by the CPU that executed `op`, waits until `op` is complete."""
    row = op.operation
    return dsb.all and dsb.domain >= row.domain and (row.nxs or not dsb.nxs)


class Finding(NamedTuple):
    """Something wrong. `rule`: which rule, `cause`: what was missing or insufficient, in a word.

    `pc`: where it showed (a write, a return, an access), by `cpu`. `write_pc`: where the descriptor at PA `pa`, `level`
    and `va` was changed from `old` to `new`, by `write_cpu`. `symbol`, `write_symbol`: the functions of the two PCs.
    """

    rule: str
    cause: str
    cpu: int
    pc: int
    va: int
    level: int
    pa: int
    old: int
    new: int
    write_cpu: int
    write_pc: int
    symbol: str = ""
    write_symbol: str = ""

    def __str__(self) -> str:
        where = f"{self.va:#018x} L{self.level} [{self.pa:#x}] {self.old:#018x} -> {self.new:#018x}"
        at = f"cpu{self.cpu} at {self.symbol or hex(self.pc)}"
        wrote = f", written by cpu{self.write_cpu} at {self.write_symbol or hex(self.write_pc)}"
        same = (self.cpu, self.pc) == (self.write_cpu, self.write_pc)
        return f"{self.rule}{f' ({self.cause})' if self.cause else ''}: {where}; {at}{'' if same else wrote}"


def named(symbol: Symbol | None, pc: int) -> str:
    """The function that `pc` is in, "" if nobody knows."""
    return (symbol(pc) or "") if symbol else ""
