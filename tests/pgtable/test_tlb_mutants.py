"""Each rule of the TLB model and the checker broken once: a program's verdict, a scope or a change must tell.

A mutant is a text edit of one function (tests/mutation.py); nothing on disk changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pgtable.bbm import parse_program
from pgtable.tlb_changes import Changes
from pgtable.tlbi import OPERATIONS, decode, operand_for
from tests.mutation import Edit, broken
from tests.pgtable.programs import CASES, verdicts
from tests.pgtable.test_bbm import CHANGES
from tests.pgtable.test_tlbi import BLOCK, BOTH, IPA, PAGE, SCOPES, TABLE, USER

MUTANTS = {
    # scope
    "a table entry is global": Edit(
        "tlbi:misses", ("entry.asid not in (None, op.asid)", "entry.leaf and entry.asid not in (None, op.asid)")
    ),
    "last level only is not looked at": Edit("tlbi:misses", ("not entry.leaf and row.last", "False")),
    "TTL is not looked at": Edit("tlbi:misses", ("if op.level is not None and", "if False and")),
    "the ASID is not looked at": Edit(
        "tlbi:misses", ("return ASID if op.asid is not None and", "return ASID if False and")
    ),
    "the VMID is not looked at": Edit("tlbi:misses", ("op.vmid is not None and op.vmid != entry.vmid", "False")),
    "stage 2 entries go by VA": Edit("tlbi:misses", ("(entry.stage == 2) != (type is Type.IPAS2)", "False")),
    "a range ends one page late": Edit("tlbi:misses", ("entry.start < op.end)", "entry.start <= op.end)")),
    # completion
    "any DSB completes a TLBI": Edit("tlb_events:completes", ("dsb.all and ", "")),
    "a DSB of any domain completes a TLBI": Edit("tlb_events:completes", ("dsb.domain >= row.domain", "True")),
    "a DSB nXS completes every TLBI": Edit("tlb_events:completes", ("(row.nxs or not dsb.nxs)", "True")),
    # the checker
    "a TLBI needs no DSB before it": Edit("tlb_records:Records.tlbi", ("record.visible < need", "False")),
    "a local TLBI reaches every CPU": Edit(
        "tlb_records:Records.tlbi", ("1 << cpu if local else self._all", "self._all")
    ),
    "a TLBI is complete at once": Edit(
        "tlb_records:Records.tlbi", ("self.amend(record, cause=UNFINISHED)", "self.drop(record); continue")
    ),
    "another CPU's DSB completes a TLBI": Edit(
        "tlb_records:Records.dsb",
        ("self._issued.get(cpu)", "self._issued.get(0)"),
        ("self._issued[cpu] =", "self._issued[0] ="),
    ),
    "broken descriptors may be made again": Edit(
        "bbm:Checker.write", ('rule = MAKE if verdict.rule else ""', 'rule = ""')
    ),
    "returning is always all right": Edit("bbm:Checker.returned", ("if not record.told:", "if False:")),
    "freed tables are not looked at": Edit("bbm:Checker.table_free", ("self._page(event.pa, FREED, event)", "pass")),
    "tables may be linked again": Edit("bbm:Checker._tables", ("self._page(new, REUSED, event)", "pass")),
    "what was below a table is forgotten": Edit("bbm:Checker._unlink", ("unclean=True", "unclean=False")),
    "linked tables may be freed": Edit("bbm:Checker.table_free", ("and self._refers(link, event.pa)", "and False")),
    "a split may map anything": Edit(
        "bbm:Checker._resized", ('return self._children_differ(event) if now else ""', 'return ""')
    ),
    "nT needs no TLBI": Edit("bbm:Checker._resized", ("changes.bbm == 1 and record is not None", "False")),
    # registers
    "MAIR is not cached": Edit("tlb_registers:RegisterChanges.write", ("name in _CACHED", "False")),
    "ASIDs may be used again": Edit("tlb_registers:RegisterChanges._seen", ("before == base", "True")),
    # changes
    "sizes may change": Edit(
        "tlb_changes:Changes._resized", ("allowed = self.bbm >= 2", "allowed = True or self.bbm >= 2")
    ),
    "the Contiguous bit may change": Edit("tlb_changes:Changes._rule", ("not self.bbm", "False")),
    "Cacheability may change": Edit("tlb_changes:Changes._rule", ("if attr != new_attr:", "if False:")),
    "Shareability may change": Edit("tlb_changes:Changes._rule", ("if sh != new_sh:", "if False:")),
    "global entries may be made": Edit("tlb_changes:Changes._rule", ("return GLOBAL if", "return GLOBAL if False and")),
    "tables may be exchanged": Edit(
        "tlb_changes:Changes._table", ("p.table_address(old) != p.table_address(new)", "False")
    ),
    "pages may move": Edit("tlb_changes:Changes._moved", ("was == now", "True")),
    "rights that are taken away need no TLBI": Edit(
        "tlb_changes:Changes._weaker", ("self._granted(old) & ~self._granted(new)", "False")
    ),
    # the model
    "entries of other ASIDs serve": Edit("tlb_store:Stores.hits", ("t.asid in (None, p.asid)", "True")),
    "an invalidation takes what comes after it": Edit(
        "tlb:TlbModel._invalidate", ("hidden.isdisjoint(entry.words)", "True")
    ),
    "the CPU's own TLB needs no ISB": Edit("tlb:TlbModel._complete", ("if self.policy.isb:", "if False:")),
    "an invalidation stays on its CPU": Edit(
        "tlb:TlbModel._complete", ("issued.op.domain is not Domain.LOCAL", "False")
    ),
    "a local invalidation reaches every CPU": Edit(
        "tlb:TlbModel._complete", ("issued.op.domain is not Domain.LOCAL", "True")
    ),
    "table descriptors are not held": Edit("tlb:TlbModel.fill", ("if self.policy.tables:", "if False:")),
    "leaves below a table are not held": Edit(
        "tlb:TlbModel._speculate", ("p.kinds[event.level][event.old & 3] is Kind.TABLE", "False")
    ),
    "stale uses during the writer's work are findings": Edit(
        "tlb_stale:Judge._resolve", ("mine(use) and self._holds(use.cpu, use.entry)", "mine(use)")
    ),
    "stale uses of other CPUs are never findings": Edit(
        "tlb_stale:Judge.stale", ("cpu == last.event.cpu or", "cpu != last.event.cpu or")
    ),
    "entries that overlap are no conflict": Edit("tlb_stale:conflict", ("len(sizes) > 1 and", "False and")),
    "what became valid is seen at once": Edit("tlb_unseen:Unseen.write", ("elif event.new & 1:", "elif False:")),
    "an ISB does without a DSB": Edit("tlb_unseen:Unseen.isb", ("or not one.visible", "")),
    "freed tables may be walked": Edit("tlb:TlbModel._check_freed", ("if step:", "if False:")),
}

ENTRIES = {"PAGE": PAGE, "USER": USER, "TABLE": TABLE, "BLOCK": BLOCK, "IPA": IPA, "BOTH": BOTH}


def wrong() -> Iterator[str]:
    """What does not come out as typed."""
    from pgtable.tlbi import misses

    params = parse_program("").params
    for level, old, new, bbm, rule, unclean in CHANGES:
        if Changes(params, bbm)(level, old, new) != (rule, unclean):
            yield f"change {old:#x} -> {new:#x}"
    for text, address, asid, ttl, removed in SCOPES:
        name, *options = text.split()
        if "e2h" not in options and OPERATIONS[name].el == 1:
            operand = operand_for(name, address, asid=asid, ttl=ttl) if OPERATIONS[name].takes_operand else 0
            op = decode(name, operand, vmid=7 if "vmid" in options else 0)
            if " ".join(n for n, e in ENTRIES.items() if not misses(op, e)) != removed:
                yield f"scope of {text}"
    yield from (case.name for case in CASES if verdicts(case) != (case.tlb, case.bbm))


def test_nothing_is_wrong_without_a_mutant() -> None:
    assert list(wrong()) == []


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str) -> None:
    with broken([MUTANTS[name]], ("pgtable", "tests.pgtable"), prefix="pgtable."):
        assert next(wrong(), None) is not None
