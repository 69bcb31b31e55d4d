"""The nested walk against the stage 2 kinds of the corpora: answers in the corpora's form, and what explains the rest.

`python -m tests.judged.stage2` counts all of them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from emu.judge import model
from emu.judge.corpus import DONE, EXC, TO_EL2, Answer, Case, load
from emu.judge.verdict import UPDATES_OF, same
from pgtable import Access, Fault, FaultType, PhysicalMemory, Registers
from pgtable.at import OPERATIONS, par_of
from pgtable.attributes import MemoryAttributes, is_device
from pgtable.nested import NestedWalk, translate_nested
from pgtable.registers import ESR, PAR_FAULT, PAR_OK
from pgtable.stage2 import Stage2Params
from pgtable.walk import Swap, _attr_index, branch_target

CORPUS = Path(__file__).parent / "corpus"
KINDS = ("s2-only", "s1s2", "s2")
# ESR of a data abort from stage 2: what tells of the instruction (ISV, SAS, SSE, SRT, SF, AR) is not the walk's.
_OF_INSTRUCTION = 0x7FF << 14
_AT_EL = 2  # the corpora's program runs AT at EL2


class Wrong(NamedTuple):
    """A query that the walk answers otherwise. `rule`: why, "" for an unexplained one."""

    case: str
    query: int
    va: int
    op: str
    judge: Answer
    mine: Answer
    rule: str


def cases(*names: str, every: int = 1) -> Iterator[Case]:
    """The stage 2 cases of some corpora, or each n-th."""
    for name in names:
        found = (case for case in load(CORPUS / f"{name}.jsonl.xz") if case.kind in KINDS)
        yield from (case for i, case in enumerate(found) if i % every == 0)


def answer(
    case: Case, memory: PhysicalMemory, regs: Registers, va: int, op: str, swap: Swap
) -> tuple[NestedWalk, Answer]:
    """What the walk says to a query, as the corpora have it."""
    if case.is_access:
        access = model.ACCESSES[op]
        va = branch_target(regs, va & -4, access.el) if op.startswith("EX") else va
        found = translate_nested(memory, regs, va, access, swap=swap)
        fault = found.fault
        if fault is None:
            return found, DONE
        return found, (fault.esr(access, target_el=2 if fault.stage == 2 else None), va, found.hpfar)
    kind, el, pan = OPERATIONS[op]
    access = Access(kind, el, pan=bool(regs.PAN) if pan else None)
    found = translate_nested(memory, regs, va, access, swap=swap, stage1_only=not op.startswith("S12"))
    if isinstance(found.result, Fault):
        if found.result.type is FaultType.EXTERNAL_ON_WALK:
            return found, EXC | found.result.esr(Access(kind, _AT_EL), target_el=_AT_EL)
        return found, found.result.par()
    return found, par_of(found.result)


def judged(many: Iterable[Case], counts: Counter[str] | None = None) -> Iterator[Wrong]:
    """The queries that are answered otherwise, words changed by hardware among them; `counts`: queries by kind."""
    for case in many:
        regs, after = model.registers_of(case), dict[int, int]()
        with model.memory_of(case) as memory:

            def swap(
                pa: int, old: int, new: int, memory: PhysicalMemory = memory, after: dict[int, int] = after
            ) -> bool:
                if memory.fetch(pa) != old:
                    return False
                memory.store(pa, new)
                after[pa] = new
                return True

            for i, ((va, op), want) in enumerate(zip(case.queries, case.answers[case.reference or ""], strict=True)):
                if want is None:
                    continue
                if counts is not None:
                    counts[case.kind] += 1
                found, mine = answer(case, memory, regs, va, op, swap)
                if not _same(case, mine, want):
                    yield Wrong(case.id, i, va, op, want, mine, _rule(found, want, mine))
            for pa in after.keys() - case.words.keys():
                memory.store(pa, 0)
        if UPDATES_OF in case.answers and dict(case.changed(UPDATES_OF)) != after:
            yield Wrong(case.id, -1, 0, "table words", None, None, "")


def _same(case: Case, mine: Answer, want: Answer) -> bool:
    if isinstance(want, tuple) and isinstance(mine, tuple) and want[0] & TO_EL2:
        esr = want[0] & ~TO_EL2 & ~_OF_INSTRUCTION
        hpfar = want[2] if mine[2] else 0  # UNKNOWN for a permission fault and an external abort
        return (esr, want[1], hpfar) == mine and ESR["EC"].get(esr) in (0x20, 0x24)
    return same(case, mine, want)


# what explains a difference: the traps of QEMU, numbered as in docs/judges.md


def _rule(found: NestedWalk, want: Answer, mine: Answer) -> str:
    if not isinstance(want, int) or not isinstance(mine, int) or (want | mine) & EXC:
        return ""
    if found.fault is not None:
        return _fault_rule(found, want)
    if want & 1:
        return "T1" if _clean_page_write(found, want) else ""
    return "" if (want ^ mine) & PAR_OK["PA"].mask else _attribute_rule(found)


def _clean_page_write(found: NestedWalk, want: int) -> bool:
    """T1 at stage 2: 11.1 refuses AT's write to a clean page that hardware would make dirty."""
    if found.stage2 is None or PAR_FAULT["FST"].get(want) & ~3 != 0x0C or not PAR_FAULT["S"].get(want):
        return False
    p2, word = found.stage2.params, found.stage2.raw[-1][2]
    leaf = p2.fmt.leaf(3)
    return bool(p2.hd and leaf["DBM"].get(word) and not leaf["S2AP"].get(word) & 2)


def _fault_rule(found: NestedWalk, want: int) -> str:
    """T5 and T6 at stage 2: high address bits are ignored. T9: PTW's fault has level 0."""
    fault, p2 = found.result, _params(found)
    assert isinstance(fault, Fault)
    if fault.cause == "PTW" and want & 1 and PAR_FAULT["FST"].get(want) == 0x0C:
        return "T9"
    reserved = 0xF << 12 if p2.fmt.granule.page_shift == 16 else 3 << 8
    last = (found.stage2 or found.tables[-1]).raw[-1:]
    if fault.type is FaultType.ADDRESS_SIZE and fault.stage == 2 and not want & 1 and p2.ps_bits < 52:
        return "T5" if last and last[0][2] & reserved else ""
    return ""


def _attribute_rule(found: NestedWalk) -> str:
    first, p = found.stage1, found.stage1.params
    s1 = first.result
    assert not isinstance(s1, Fault)
    byte = p.mair[_attr_index(p, s1.word)] if s1.level is not None else s1.attr
    if s1.level is not None and not p.data_cacheable and not is_device(byte):
        return "T7"  # SCTLR.C = 0
    if MemoryAttributes.of(byte).type == "reserved" or s1.sh == 1:
        return "T8"
    if found.stage2 is None:
        return ""
    return _stage2_attribute_rule(found, byte)


def _stage2_attribute_rule(found: NestedWalk, byte: int) -> str:
    p2, leaf = _params(found), _params(found).fmt.leaf(3)
    assert found.stage2 is not None
    word = found.stage2.raw[-1][2]
    memattr = leaf["MemAttr"].get(word)
    if (not p2.fmt.lpa2 and leaf["SH"].get(word) == 1) or (p2.fmt.lpa2 and p2.sh == 1):
        return "T8"
    if memattr in ((4, *range(8, 16)) if p2.fwb else (4, 8, 12)):
        return "T8"  # a reserved MemAttr: any type is right
    device1, device2 = is_device(byte), (memattr < 4)
    if p2.fwb:
        return "T10" if device1 and device2 else ""
    if device1 != device2:
        return "T11"
    transient = any(nibble and not nibble & 8 and nibble != 4 for nibble in (byte >> 4, byte & 15))
    return "T12" if transient and 2 in (memattr >> 2, memattr & 3) else ""


def _params(found: NestedWalk) -> Stage2Params:
    return (found.stage2 or found.tables[-1]).params


def main() -> None:
    """Prints the counts of every corpus."""
    for name in ("at_clean", "access", "at_edge"):
        counts = Counter[str]()
        wrong = list(judged(cases(name), counts))
        rules = Counter(w.rule or "unexplained" for w in wrong)
        print(f"{name}: {dict(counts)}, {len(wrong)} differ: {dict(rules)}")
        for w in [w for w in wrong if not w.rule][:20]:
            print(
                "  ", w.case, w.query, w.op, hex(w.va), [hex(a) if isinstance(a, int) else a for a in (w.judge, w.mine)]
            )


if __name__ == "__main__":
    main()
