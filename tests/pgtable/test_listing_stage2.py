"""Stage 2 built, listed and audited; both stages listed, against QEMU's stored answers and the walk."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from emu.judge.corpus import EXC, load
from emu.judge.model import memory_of, registers_of
from pgtable import Access, AccessType, Fault, Format, Granule, PhysicalMemory, Registers, translate
from pgtable.audit import audit
from pgtable.build import MapError, TableBuilder
from pgtable.listing_stage2 import nested_listing, stage2_listing
from pgtable.nested import deciders
from pgtable.permissions import letters
from pgtable.registers import HCR_EL2, PAR_OK, VTCR_EL2
from pgtable.stage2 import Stage2Params, stage2_walk

CORPUS = Path(__file__).parents[1] / "judged" / "corpus"
RAM, POOL = 0x4000_0000, 0x8000_0000


def registers(tree: TableBuilder, **more: int) -> Registers:
    vtcr = VTCR_EL2.pack(PS=5, SH0=3, **tree.vtcr)
    return Registers(HCR_EL2=HCR_EL2.pack(VM=1, RW=1), VTCR_EL2=vtcr, VTTBR_EL2=tree.root, **more)


@pytest.mark.parametrize(
    ("granule", "bits", "level", "root"),
    [
        (Granule.K4, 32, None, (2, 4)),  # four tables in a row
        (Granule.K4, 40, None, (1, 2)),
        (Granule.K4, 40, 0, (0, 1)),
        (Granule.K4, 43, None, (1, 16)),
        (Granule.K4, 44, None, (0, 1)),  # 32 tables are too many
        (Granule.K16, 40, None, (2, 16)),
        (Granule.K16, 47, None, (1, 1)),
        (Granule.K64, 40, None, (2, 1)),
        (Granule.K64, 46, None, (2, 16)),
    ],
)
def test_a_tree_of_stage_2(granule: Granule, bits: int, level: int | None, root: tuple[int, int]) -> None:
    """Its root level and tables, and that the walk finds every page where it was mapped."""
    memory = PhysicalMemory((RAM, 1 << 20), (POOL, 4 << 20))
    tree = TableBuilder(
        memory, (POOL, 4 << 20), fmt=Format(granule, stage2=True), va_bits=bits, stage=2, start_level=level
    )
    pieces = [(0, 0x1_0000_0000, 4 << 16), ((1 << bits) - (1 << 25), 1 << 25, 1 << 25), (1 << bits - 1, 0, 1 << 16)]
    for ipa, pa, size in pieces:
        tree.map(ipa, pa, size)
    p = Stage2Params.of(registers(tree))
    assert (p.start_level, p.root_tables) == root
    assert p.why_off == ""
    rng = random.Random(1)
    for ipa, pa, size in pieces:
        for at in (0, size - 1, rng.randrange(size)):
            found = stage2_walk(memory.fetch, p, ipa + at, Access.read()).result
            assert not isinstance(found, Fault)
            assert found.pa == pa + at
    assert isinstance(stage2_walk(memory.fetch, p, 4 << 16, Access.read()).result, Fault)
    rows = stage2_listing(memory, registers(tree)).runs
    assert sorted(zip(rows.va.tolist(), rows.pa.tolist(), rows.size.tolist(), strict=True))[0][:2] == (0, 1 << 32)
    assert int(rows.size.sum()) == sum(size for _, _, size in pieces)


def test_what_the_builder_refuses() -> None:
    memory = PhysicalMemory((POOL, 1 << 20))
    with pytest.raises(MapError, match=r"stage=2: the format is of stage 1"):
        TableBuilder(memory, (POOL, 1 << 20), fmt=Format(), stage=2)
    with pytest.raises(MapError, match=r"start_level=2: 40 bits of IPA start at level 0 or 1"):
        TableBuilder(memory, (POOL, 1 << 20), va_bits=40, stage=2, start_level=2)
    with pytest.raises(MapError, match=r"start_level=1: a 48-bit tree of stage 1 starts at level 0"):
        TableBuilder(memory, (POOL, 1 << 20), start_level=1)


def test_the_listing_of_both_stages_has_the_pa_of_every_answer_of_qemu() -> None:
    """4,500 and more translations of AT S12* by QEMU: each is in a row, and no fault of a table is."""
    compared = 0
    for case in load(CORPUS / "at_clean.jsonl.xz"):
        if case.kind != "s1s2":
            continue
        with memory_of(case) as memory:
            found = nested_listing(memory, registers_of(case))
            for (va, op), par in zip(case.queries, case.answers[case.reference or ""], strict=True):
                if not op.startswith("S12") or not isinstance(par, int) or par & (EXC | 1):
                    continue
                p = found.stage1.params(va)
                va = va & (1 << p.ia_bits) - 1 | p.half_base  # without a tag
                row = found.both.at(va)
                assert row is not None, f"{case.id} {va:#x}"
                pa = int(found.rows.pa[row]) + va - int(found.rows.va[row])
                assert pa & -4096 == PAR_OK["PA"].get(par), f"{case.id} {va:#x}"
                compared += 1
    assert compared > 1000


def test_rows_of_both_stages_say_what_the_walk_says() -> None:
    for case in load(CORPUS / "at_clean.jsonl.xz"):
        if case.kind != "s1s2":
            continue
        regs = registers_of(case)
        with memory_of(case) as memory:
            found = nested_listing(memory, regs)
            rows = found.rows
            for i in range(0, len(rows.va), 7):
                va = int(rows.va[i]) + int(rows.size[i]) - 1
                walk = translate(memory, regs, va, Access(AccessType.AT_ANY, 1))
                if walk.ok:
                    said = (int(rows.pa[i]) + int(rows.size[i]) - 1, int(rows.attr[i]), int(rows.sh[i]))
                    assert said == (walk.pa, walk.result.attr, walk.result.sh), case.id  # type: ignore[union-attr]
                    assert not rows.fault[i]
                    assert found.both.ipa_of(va) == walk.ipa  # type: ignore[attr-defined]
                else:
                    assert rows.fault[i] or walk.fault.s1ptw or walk.fault.cause == "", case.id  # type: ignore[union-attr]


def test_what_stage_2_does_not_map_is_a_finding() -> None:
    memory = PhysicalMemory((RAM, 1 << 20), (POOL, 1 << 20))
    second = TableBuilder(memory, (POOL, 1 << 19), va_bits=40, stage=2)
    second.map(RAM, RAM, 1 << 16)
    first = TableBuilder(memory, (RAM, 1 << 16), va_bits=39)
    first.map(0, RAM + 0xE000, 0x4000)
    found = nested_listing(memory, registers(second, TTBR0_EL1=first.root, TCR_EL1=25, MAIR_EL1=0xFF))
    assert [(int(v), int(s)) for v, s in zip(found.rows.va, found.rows.size, strict=True)] == [(0, 0x2000)]
    (missing,) = [f for f in found.findings if f.kind == "not in stage 2"]
    assert (missing.va, missing.size) == (0x2000, 0x2000)
    assert "IPA 0x40010000-0x40012000" in missing.text


def test_the_audit_of_stage_2() -> None:
    memory = PhysicalMemory((POOL, 1 << 20))
    tree = TableBuilder(memory, (POOL, 1 << 19), va_bits=40, stage=2)
    tree.map(RAM, RAM, 4 << 20)
    regs = registers(tree)

    def failed() -> list[str]:
        return [v.rule for v in audit(stage2_listing(memory, regs), memory) if v.status.value == "fail"]

    assert failed() == []
    tree.map(POOL, POOL, 1 << 19, level=3, S2AP=1)
    assert failed() == [], "read-only tables"
    tree.protect(POOL, 0x1000, S2AP=3)
    assert failed() == ["s2-tables-writable"]
    tree.protect(POOL, 0x1000, S2AP=1, AF=0)
    assert failed() == ["s2-access-flag"]
    tree.protect(POOL, 0x1000, AF=1, MemAttr=1, XN=0)
    assert set(failed()) == {"s2-device-executable"}
    tree.protect(POOL, 0x1000, MemAttr=0xF, Contiguous=1)
    assert failed() == ["s2-contiguous"]


@pytest.mark.parametrize(
    ("fields", "access", "says"),
    [
        ({"S2AP": 1}, Access.write(), "S2AP = 0x1"),
        ({"XN": 2}, Access.fetch(), "XN = 0x2"),
        ({"XN": 1}, Access.fetch(el=1), "XN = 0x1"),
        ({"AF": 0}, Access.read(), "AF (bits 10) is 0"),
    ],
)
def test_a_fault_names_the_deciding_bit(fields: dict[str, int], access: Access, says: str) -> None:
    memory = PhysicalMemory((RAM, 1 << 20), (POOL, 1 << 20))
    tree = TableBuilder(memory, (POOL, 1 << 19), va_bits=40, stage=2)
    tree.map(RAM, RAM, 0x1000, **fields)
    found = translate(memory, registers(tree, SCTLR_EL1=0), RAM, access)
    assert says in " ".join(d.text for d in deciders(found))
    assert says in str(found)
    changed = memory.fetch(tree.slot(RAM).pa)
    for name, value in {"S2AP": 3, "XN": 0, "AF": 1}.items():
        changed = tree.fmt.leaf(3)[name].put(changed, value)
    memory.store(tree.slot(RAM).pa, changed)
    assert translate(memory, registers(tree, SCTLR_EL1=0), RAM, access).ok


def test_indirect_permissions_of_stage_2() -> None:
    """Every encoding of S2PIR_EL2, and of S2POR_EL1 over it: what EL1 and EL0 may do, typed from Arm's table.

    S2PIR_EL2 is judged by QEMU (kinds s2-pie, acc-s2-pie); S2POR_EL1 by nobody.
    """
    typed = {
        **{0: "------", 1: "------", 2: "r--r--", 3: "r--r--", 4: "-w--w-", 5: "------", 6: "r--r--", 7: "r--r--"},
        **{
            8: "r--r--",
            9: "r--r-x",
            10: "r-xr--",
            11: "r-xr-x",
            12: "rw-rw-",
            13: "rw-rwx",
            14: "rwxrw-",
            15: "rwxrwx",
        },
    }
    memory = PhysicalMemory((RAM, 1 << 20), (POOL, 1 << 20))
    tree = TableBuilder(memory, (POOL, 1 << 19), fmt=Format(stage2=True, pie=True, poe=True), va_bits=40, stage=2)
    for i in range(16):
        tree.map(RAM + (i << 12), RAM, 0x1000, PIIndex=i, POIndex=15 - i, Dirty=1)
    regs = registers(tree, S2PIR_EL2=0xFEDC_BA98_7654_3210, S2POR_EL1=0xFFFF_FFFF_FFFF_FFFF)
    regs = regs.replace(VTCR_EL2=regs.VTCR_EL2 | VTCR_EL2.pack(S2PIE=1))
    found = stage2_listing(memory, regs).runs
    assert {int(va) - RAM >> 12: letters(int(perms)) for va, perms in zip(found.va, found.perms, strict=True)} == typed
    regs = regs.replace(VTCR_EL2=regs.VTCR_EL2 | VTCR_EL2.pack(S2POE=1), S2PIR_EL2=(1 << 64) - 1)
    regs = regs.replace(S2POR_EL1=0x0123_4567_89AB_CDEF)  # field i is 15 - i; POIndex 15 - i: encoding i
    found = stage2_listing(memory, regs).runs
    assert {int(va) - RAM >> 12: letters(int(perms)) for va, perms in zip(found.va, found.perms, strict=True)} == typed
    refused = translate(memory, regs.replace(SCTLR_EL1=0), RAM, Access.read()).fault
    assert refused
    assert refused.overlay, "an overlay's refusal is reported as one"


def test_a_clean_page_with_indirect_permissions() -> None:
    """Dirty = 0 refuses a write where hardware does not manage it, and is set where it does."""
    memory = PhysicalMemory((RAM, 1 << 20), (POOL, 1 << 20))
    tree = TableBuilder(memory, (POOL, 1 << 19), fmt=Format(stage2=True, pie=True), va_bits=40, stage=2)
    tree.map(RAM, RAM, 0x1000, PIIndex=1, Dirty=0)
    regs = registers(tree, SCTLR_EL1=0, S2PIR_EL2=0xF0)
    regs = regs.replace(VTCR_EL2=regs.VTCR_EL2 | VTCR_EL2.pack(S2PIE=1))
    refused = translate(memory, regs, RAM, Access.write()).fault
    assert refused
    assert (refused.dirty_bit, refused.write, refused.stage) == (True, True, 2)
    assert translate(memory, regs, RAM, Access.read()).ok
    managed = regs.replace(VTCR_EL2=regs.VTCR_EL2 | VTCR_EL2.pack(HA=1, HD=1))
    (update,) = translate(memory, managed, RAM, Access.write()).updates
    assert update.old ^ update.new == 1 << 7


def test_haft_of_stage_2() -> None:
    """FEAT_HAFT marks the tables of stage 2 (not judged by an emulator)."""
    memory = PhysicalMemory((RAM, 1 << 20), (POOL, 1 << 20))
    tree = TableBuilder(memory, (POOL, 1 << 19), va_bits=40, stage=2, start_level=0)
    tree.map(RAM, RAM, 0x1000)
    regs = registers(tree, SCTLR_EL1=0)
    regs = regs.replace(VTCR_EL2=regs.VTCR_EL2 | VTCR_EL2.pack(HA=1, HAFT=1))
    found = translate(memory, regs, RAM, Access.read())
    assert [update.old ^ update.new for update in found.updates] == [1 << 10] * 3


def test_hardware_updates_with_big_endian_tables_end() -> None:
    """The swap gets words as memory holds them: in the CPU's order it would never find the old one."""
    memory = PhysicalMemory((RAM, 1 << 20), (POOL, 1 << 20))
    tree = TableBuilder(memory, (POOL, 1 << 19), va_bits=39)
    tree.map(0x1000, RAM, 0x1000, AF=0)
    words = memory.words(POOL, 1 << 12)
    words[:] = words.byteswap()
    regs = Registers(TTBR0_EL1=tree.root, TCR_EL1=25 | 1 << 39, SCTLR_EL1=0x1005 | 1 << 25, MAIR_EL1=0xFF)

    def swap(pa: int, old: int, new: int) -> bool:
        same = memory.fetch(pa) == old
        assert same
        memory.store(pa, new)
        return same

    assert translate(memory, regs, 0x1000, swap=swap).ok
    assert int(np.uint64(memory.fetch(POOL + 0x2008)).byteswap()) & 1 << 10


def test_a_secure_guest_has_two_ipa_spaces() -> None:
    """Secure IPAs go by VSTCR_EL2 and VSTTBR_EL2, Non-secure ones (stage 1's NS) by VTCR_EL2 and VTTBR_EL2."""
    memory = PhysicalMemory((RAM, 1 << 20), (POOL, 1 << 20))
    secure = TableBuilder(memory, (POOL, 1 << 18), va_bits=40, stage=2)
    plain = TableBuilder(memory, (POOL + (1 << 18), 1 << 18), va_bits=40, stage=2)
    secure.map(RAM, RAM, 1 << 16)
    plain.map(RAM, RAM + 0x1_0000, 0x1000)
    first = TableBuilder(memory, (RAM, 1 << 16), va_bits=39)
    first.map(0, RAM, 0x1000)
    first.map(0x1000, RAM, 0x1000, NS=1)
    regs = registers(plain, TTBR0_EL1=first.root, TCR_EL1=25, MAIR_EL1=0xFF)
    regs = regs.replace(SCR_EL3=regs.SCR_EL3 & ~1 | 1 << 18, VSTCR_EL2=regs.VTCR_EL2, VSTTBR_EL2=secure.root)
    found = [translate(memory, regs, va) for va in (0x8, 0x1008)]
    assert [walk.pa for walk in found] == [RAM + 8, RAM + 0x1_0008]
    assert [walk.result.ns for walk in found] == [False, False]  # type: ignore[union-attr]
    outside = translate(memory, regs.replace(VTTBR_EL2=secure.root + 0x8000), 0x1008)
    assert outside.hpfar >> 63 == 1  # type: ignore[attr-defined]
    moved = translate(memory, regs.replace(VTCR_EL2=regs.VTCR_EL2 | VTCR_EL2.pack(NSA=1)), 0x1008).result
    assert not isinstance(moved, Fault)
    assert moved.ns
    off = translate(memory, regs.replace(SCR_EL3=regs.SCR_EL3 & ~(1 << 18)), 0x8)
    assert off.pa == RAM + 8, "without EEL2 Secure state has no stage 2"
    assert replace(Stage2Params.of(regs), vmid=0).output_ns is False
