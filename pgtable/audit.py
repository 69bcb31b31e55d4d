"""Audit of a translation tree: rules, each with a verdict and the ranges that offend.

    for verdict in audit(listing(memory, regs), memory):
        print(verdict.status.value, verdict.rule, verdict.text)

Rules of this file:
- A rule says what must hold; its name is what `--rule` takes. What it means is in docs/audit.md.
- A rule that informs has no failure. One that the regime has no subject for is skipped and says so.
- Ranges that are as they must be for a known reason are kept apart (`expected`) and do not count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import NamedTuple

import numpy as np

from pgtable import audit_rules as rules
from pgtable.audit_places import NOWHERE, Place, Places, Subject, joined, nothing
from pgtable.audit_rules import Found
from pgtable.findings import size_text
from pgtable.listing import Listing
from pgtable.memory import TableMemory

__all__ = ["RULES", "STAGE2_RULES", "Excuse", "Place", "Places", "Rule", "Status", "Verdict", "audit", "judged"]


class Status(Enum):
    """What came of a rule; the value is how it is printed."""

    PASS = "pass"
    FAIL = "fail"
    INFO = "info"
    SKIP = "skip"


@dataclass(frozen=True)
class Verdict:
    """What came of a rule: `text` in one line; `places`: the ranges that offend (or inform), all of them.

    `expected`: ranges that a rule found and that are so for a reason, which is their text.
    """

    rule: str
    title: str
    status: Status
    text: str
    places: Places = field(default_factory=nothing)
    expected: Places = field(default_factory=nothing)


@dataclass(frozen=True)
class Rule:
    """`title`: what holds where it passes. `informs`: what it finds is no failure. `el0`: the regime must have EL0."""

    name: str
    title: str
    check: Callable[[Subject], Found]
    informs: bool = False
    el0: bool = False


class Excuse(NamedTuple):
    """VAs [va, va + size) may be what a rule finds, for a reason; also as the alias of what it finds."""

    rule: str
    va: int
    size: int
    reason: str


RULES = (
    Rule("wx", "no leaf is writable and executable at the regime's own level", rules.privileged_wx),
    Rule("wx-el0", "no leaf is writable and executable at EL0", rules.el0_wx, el0=True),
    Rule("el0-executes-upper", "EL0 executes nothing of the upper half", rules.el0_executes_upper, el0=True),
    Rule("el0-reaches-upper", "EL0 reads and writes nothing of the upper half", rules.el0_reaches_upper, el0=True),
    Rule("device-executable", "no Device memory is executable", rules.device_executable),
    Rule(
        "alias-attributes", "all mappings of a PA agree about type, cacheability, shareability", rules.alias_attributes
    ),
    Rule("alias-rwx", "no PA is written through one VA and executed through another", rules.alias_rwx),
    Rule("tables-el0-writable", "EL0 can write no translation table", rules.tables_el0_writable, el0=True),
    Rule("tables-wx", "no translation table is in a mapping that is writable and executable", rules.tables_wx),
    Rule("contiguous", "contiguous groups are whole, aligned and of one kind", rules.contiguous),
    Rule("reserved", "no reserved encoding, no reserved bit", rules.reserved),
    Rule("access-flag", "AF is set, or hardware sets it", rules.access_flag),
    Rule("shareability", "Normal cacheable memory is shareable", rules.shareability),
    Rule("global", "nG is the same for all leaves of a kind", rules.not_global),
    Rule("structure", "the tree has no loop, every table is in RAM, every address fits", rules.structure),
    Rule("shared-tables", "no table page is referred to twice", rules.shared_tables, informs=True),
    Rule("bbm", "nothing would need break-before-make to split", rules.break_before_make, informs=True),
)


# Of stage 2: what a hypervisor's tables must be.
STAGE2_RULES = (
    Rule("s2-tables-writable", "stage 2 lets the guest write none of its tables", rules.tables_guest_writable),
    Rule("s2-tables-readable", "stage 2 lets the guest read none of its tables", rules.tables_guest_readable, True),
    Rule("s2-device-executable", "no Device memory is executable", rules.device_executable),
    Rule("s2-alias-attributes", "all IPAs of a PA agree about type and shareability", rules.alias_attributes),
    Rule("s2-contiguous", "contiguous groups are whole, aligned and of one kind", rules.contiguous),
    Rule("s2-reserved", "no reserved encoding, no reserved bit", rules.reserved),
    Rule("s2-access-flag", "AF is set, or hardware sets it", rules.access_flag),
    Rule("s2-structure", "the tree has no loop, every table is in RAM, every address fits", rules.structure),
    Rule("s2-shared-tables", "no table page is referred to twice", rules.shared_tables, informs=True),
    Rule("s2-bbm", "nothing would need break-before-make to split", rules.break_before_make, informs=True),
)


def audit(listing: Listing, memory: TableMemory, names: Collection[str] = ()) -> list[Verdict]:
    """The verdict of every rule, or of those with the given names, about a listing of `memory`'s tables.

    A listing of stage 2 has rules of its own.
    """
    subject = Subject(listing, memory)
    every = STAGE2_RULES if listing.stage == 2 else RULES
    return [judged(rule, subject) for rule in every if not names or rule.name in names]


def judged(rule: Rule, subject: Subject, excuses: Sequence[Excuse] = ()) -> Verdict:
    """The verdict of one rule; what it finds inside an excuse's range does not count."""
    if rule.el0 and not subject.listing.regime.has_el0:
        return Verdict(rule.name, rule.title, Status.SKIP, f"{subject.listing.regime.value} has no EL0")
    found = rule.check(subject)
    if found.skip:
        return Verdict(rule.name, rule.title, Status.SKIP, found.skip)
    offending, expected = _apart(found.places, [excuse for excuse in excuses if excuse.rule == rule.name])
    if not len(offending):
        return Verdict(rule.name, rule.title, Status.PASS, rule.title, expected=expected)
    status = Status.INFO if rule.informs else Status.FAIL
    return Verdict(rule.name, rule.title, status, found.text or _count(offending), offending, expected)


def _apart(found: Places, excuses: Sequence[Excuse]) -> tuple[Places, Places]:
    """What is excused by no range, and what is, with the reason in place of what is wrong."""
    expected = [nothing()]
    for excuse in excuses:
        start, size = np.uint64(excuse.va), np.uint64(excuse.size)
        here = (found.va - start < size) & (found.va + found.size - start <= size)
        aliased = (found.alias - start < size) & (found.alias + found.size - start <= size)
        here |= aliased & (found.alias != np.uint64(NOWHERE))
        known = found.pick(here)
        expected.append(replace(known, why=np.zeros(len(known), np.int64), reasons=(excuse.reason,)))
        found = found.pick(~here)
    return found, joined(expected)


def _count(found: Places) -> str:
    """`3 ranges, 12K`."""
    n, size = len(found), found.bytes
    whole = size_text(size) if size and not size & (size - 1) else f"{size:#x} bytes"
    return f"{n} range{'s' * (n > 1)}, {whole}"
