"""emu.exceptions: what an instruction accesses, held against literal rows and against what Unicorn really touches."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from unicorn import unicorn_const as uc_const

from emu.exceptions import disassemble, touches
from emu.machine import Machine
from pgtable import AccessType

PC = 0x400000
REGISTERS = {n: 0x1000 * n for n in range(31)} | {2: 0xFFFF_FFFF_FFFF_FFF0, 31: 0x9000}


class Row(NamedTuple):
    """An instruction with X1 = 0x1000, X2 = -16, SP = 0x9000: `count` parts of `size` bytes from `va` on."""

    word: int
    text: str
    va: int
    size: int
    count: int
    kind: str


# fmt: off
ROWS = [Row(*row) for row in (
    (0xf9400020, "ldr x0, [x1]", 0x1000, 8, 1, "read"),
    (0xb9400420, "ldr w0, [x1, #4]", 0x1004, 4, 1, "read"),
    (0x39400020, "ldrb w0, [x1]", 0x1000, 1, 1, "read"),
    (0x79400420, "ldrh w0, [x1, #2]", 0x1002, 2, 1, "read"),
    (0x39800020, "ldrsb x0, [x1]", 0x1000, 1, 1, "read"),
    (0x39c00020, "ldrsb w0, [x1]", 0x1000, 1, 1, "read"),
    (0x79c00020, "ldrsh w0, [x1]", 0x1000, 2, 1, "read"),
    (0xb9800820, "ldrsw x0, [x1, #8]", 0x1008, 4, 1, "read"),
    (0xf8408c20, "ldr x0, [x1, #8]!", 0x1008, 8, 1, "read"),
    (0xf8408420, "ldr x0, [x1], #8", 0x1000, 8, 1, "read"),
    (0xf85f0c20, "ldr x0, [x1, #-0x10]!", 0xff0, 8, 1, "read"),
    (0xf85f8020, "ldur x0, [x1, #-8]", 0xff8, 8, 1, "read"),
    (0x385ff020, "ldurb w0, [x1, #-1]", 0xfff, 1, 1, "read"),
    (0xf9400be0, "ldr x0, [sp, #0x10]", 0x9010, 8, 1, "read"),
    (0xf8626820, "ldr x0, [x1, x2]", 0xff0, 8, 1, "read"),
    (0xf8627820, "ldr x0, [x1, x2, lsl #3]", 0xf80, 8, 1, "read"),
    (0xb8625820, "ldr w0, [x1, w2, uxtw #2]", 0x400000fc0, 4, 1, "read"),
    (0xf862c820, "ldr x0, [x1, w2, sxtw]", 0xff0, 8, 1, "read"),
    (0xf862d820, "ldr x0, [x1, w2, sxtw #3]", 0xf80, 8, 1, "read"),
    (0xf862f820, "ldr x0, [x1, x2, sxtx #3]", 0xf80, 8, 1, "read"),
    (0xf87f6820, "ldr x0, [x1, xzr]", 0x1000, 8, 1, "read"),
    (0x38624820, "ldrb w0, [x1, w2, uxtw]", 0x100000ff0, 1, 1, "read"),
    (0xf9000020, "str x0, [x1]", 0x1000, 8, 1, "write"),
    (0xb9000c3f, "str wzr, [x1, #0xc]", 0x100c, 4, 1, "write"),
    (0x38226820, "strb w0, [x1, x2]", 0xff0, 1, 1, "write"),
    (0x78002420, "strh w0, [x1], #2", 0x1000, 2, 1, "write"),
    (0xf8100020, "stur x0, [x1, #-0x100]", 0xf00, 8, 1, "write"),
    (0xa9bf7bfd, "stp x29, x30, [sp, #-0x10]!", 0x8ff0, 8, 2, "write"),
    (0xa8c17bfd, "ldp x29, x30, [sp], #0x10", 0x9000, 8, 2, "read"),
    (0x29410420, "ldp w0, w1, [x1, #8]", 0x1008, 4, 2, "read"),
    (0x29000420, "stp w0, w1, [x1]", 0x1000, 4, 2, "write"),
    (0x69400c20, "ldpsw x0, x3, [x1]", 0x1000, 4, 2, "read"),
    (0xa8400c20, "ldnp x0, x3, [x1]", 0x1000, 8, 2, "read"),
    (0xa8000c20, "stnp x0, x3, [x1]", 0x1000, 8, 2, "write"),
    (0xad400420, "ldp q0, q1, [x1]", 0x1000, 16, 2, "read"),
    (0x6d010420, "stp d0, d1, [x1, #0x10]", 0x1010, 8, 2, "write"),
    (0x3dc00020, "ldr q0, [x1]", 0x1000, 16, 1, "read"),
    (0x3d800820, "str q0, [x1, #0x20]", 0x1020, 16, 1, "write"),
    (0xfd400020, "ldr d0, [x1]", 0x1000, 8, 1, "read"),
    (0xbd400020, "ldr s0, [x1]", 0x1000, 4, 1, "read"),
    (0x7d400020, "ldr h0, [x1]", 0x1000, 2, 1, "read"),
    (0x3d400020, "ldr b0, [x1]", 0x1000, 1, 1, "read"),
    (0xf8400820, "ldtr x0, [x1]", 0x1000, 8, 1, "unprivileged read"),
    (0x38400820, "ldtrb w0, [x1]", 0x1000, 1, 1, "unprivileged read"),
    (0xb8800820, "ldtrsw x0, [x1]", 0x1000, 4, 1, "unprivileged read"),
    (0xb8000820, "sttr w0, [x1]", 0x1000, 4, 1, "unprivileged write"),
    (0x78000820, "sttrh w0, [x1]", 0x1000, 2, 1, "unprivileged write"),
    (0xc85f7c20, "ldxr x0, [x1]", 0x1000, 8, 1, "read"),
    (0x885ffc20, "ldaxr w0, [x1]", 0x1000, 4, 1, "read"),
    (0x085f7c20, "ldxrb w0, [x1]", 0x1000, 1, 1, "read"),
    (0xc87f0c20, "ldxp x0, x3, [x1]", 0x1000, 8, 2, "read"),
    (0x887f8c20, "ldaxp w0, w3, [x1]", 0x1000, 4, 2, "read"),
    (0xc8037c20, "stxr w3, x0, [x1]", 0x1000, 8, 1, "write"),
    (0x8803fc20, "stlxr w3, w0, [x1]", 0x1000, 4, 1, "write"),
    (0x0803fc20, "stlxrb w3, w0, [x1]", 0x1000, 1, 1, "write"),
    (0xc8230820, "stxp w3, x0, x2, [x1]", 0x1000, 8, 2, "write"),
    (0x88238820, "stlxp w3, w0, w2, [x1]", 0x1000, 4, 2, "write"),
    (0xc8dffc20, "ldar x0, [x1]", 0x1000, 8, 1, "read"),
    (0x08dffc20, "ldarb w0, [x1]", 0x1000, 1, 1, "read"),
    (0xb8bfc020, "ldapr w0, [x1]", 0x1000, 4, 1, "read"),
    (0xc8df7c20, "ldlar x0, [x1]", 0x1000, 8, 1, "read"),
    (0xc89ffc20, "stlr x0, [x1]", 0x1000, 8, 1, "write"),
    (0x489ffc20, "stlrh w0, [x1]", 0x1000, 2, 1, "write"),
    (0xd9408020, "ldapur x0, [x1, #8]", 0x1008, 8, 1, "read"),
    (0x99004020, "stlur w0, [x1, #4]", 0x1004, 4, 1, "write"),
    (0xc8a07c22, "cas x0, x2, [x1]", 0x1000, 8, 1, "atomic"),
    (0x88e0fc22, "casal w0, w2, [x1]", 0x1000, 4, 1, "atomic"),
    (0x08e07c22, "casab w0, w2, [x1]", 0x1000, 1, 1, "atomic"),
    (0x48227c24, "casp x2, x3, x4, x5, [x1]", 0x1000, 8, 2, "atomic"),
    (0x08227c24, "casp w2, w3, w4, w5, [x1]", 0x1000, 4, 2, "atomic"),
    (0xf8208022, "swp x0, x2, [x1]", 0x1000, 8, 1, "atomic"),
    (0x38e08022, "swpalb w0, w2, [x1]", 0x1000, 1, 1, "atomic"),
    (0xb8200022, "ldadd w0, w2, [x1]", 0x1000, 4, 1, "atomic"),
    (0xf8e00022, "ldaddal x0, x2, [x1]", 0x1000, 8, 1, "atomic"),
    (0x78201022, "ldclrh w0, w2, [x1]", 0x1000, 2, 1, "atomic"),
    (0xf8202022, "ldeor x0, x2, [x1]", 0x1000, 8, 1, "atomic"),
    (0x38204022, "ldsmaxb w0, w2, [x1]", 0x1000, 1, 1, "atomic"),
    (0xf820003f, "stadd x0, [x1]", 0x1000, 8, 1, "atomic"),
    (0x3820303f, "stsetb w0, [x1]", 0x1000, 1, 1, "atomic"),
    (0xf8207022, "ldumin x0, x2, [x1]", 0x1000, 8, 1, "atomic"),
    (0xd50b7421, "dc zva, x1", 0x1000, 64, 1, "write"),
    (0xd50b7a21, "dc cvac, x1", 0, 0, 0, ""),
    (0xd50b7e21, "dc civac, x1", 0, 0, 0, ""),
    (0xd50b7521, "ic ivau, x1", 0, 0, 0, ""),
    (0xf9800020, "prfm pldl1keep, [x1]", 0, 0, 0, ""),
    (0xf8a26820, "prfm pldl1keep, [x1, x2]", 0, 0, 0, ""),
    (0xf89f8020, "prfum pldl1keep, [x1, #-8]", 0, 0, 0, ""),
    (0x58000040, "ldr x0, #0x400008", 0x400008, 8, 1, "read"),
    (0x98000040, "ldrsw x0, #0x400008", 0x400008, 4, 1, "read"),
    (0x18ffffe0, "ldr w0, #0x3ffffc", 0x3ffffc, 4, 1, "read"),
    (0x9c000080, "ldr q0, #0x400010", 0x400010, 16, 1, "read"),
    (0xd8000040, "prfm pldl1keep, #0x400008", 0, 0, 0, ""),
    (0x4c407020, "ld1 {v0.16b}, [x1]", 0x1000, 16, 1, "read"),
    (0x0c407020, "ld1 {v0.8b}, [x1]", 0x1000, 8, 1, "read"),
    (0x4c40a820, "ld1 {v0.4s, v1.4s}, [x1]", 0x1000, 16, 2, "read"),
    (0x4cdf2020, "ld1 {v0.16b, v1.16b, v2.16b, v3.16b}, [x1], #64", 0x1000, 16, 4, "read"),
    (0x4c827c20, "st1 {v0.2d}, [x1], x2", 0x1000, 16, 1, "write"),
    (0x4c9fa420, "st1 {v0.8h, v1.8h}, [x1], #32", 0x1000, 16, 2, "write"),
    (0x0d400c20, "ld1 {v0.b}[3], [x1]", 0x1000, 1, 1, "read"),
    (0x0d009020, "st1 {v0.s}[1], [x1]", 0x1000, 4, 1, "write"),
    (0x4ddf8420, "ld1 {v0.d}[1], [x1], #8", 0x1000, 8, 1, "read"),
    (0x4d40c820, "ld1r {v0.4s}, [x1]", 0x1000, 4, 1, "read"),
    (0x4c408820, "ld2 {v0.4s, v1.4s}, [x1]", 0x1000, 16, 2, "read"),
    (0x0d60c020, "ld2r {v0.8b, v1.8b}, [x1]", 0x1000, 1, 2, "read"),
    (0x0d205020, "st2 {v0.h, v1.h}[2], [x1]", 0x1000, 2, 2, "write"),
    (0x0c402c20, "ld1 {v0.1d, v1.1d, v2.1d, v3.1d}, [x1]", 0x1000, 8, 4, "read"),
    (0x4c400c20, "ld4 {v0.2d, v1.2d, v2.2d, v3.2d}, [x1]", 0x1000, 16, 4, "read"),
    (0x0c004020, "st3 {v0.8b, v1.8b, v2.8b}, [x1]", 0x1000, 8, 3, "write"),
    (0xf8201420, "ldraa x0, [x1, #8]", 0x1008, 8, 1, "read"),
    (0x8b020020, "add x0, x1, x2", 0, 0, 0, ""),
    (0xd503201f, "nop", 0, 0, 0, ""),
    (0xd5382040, "mrs x0, tcr_el1", 0, 0, 0, ""),
    (0xd61f0020, "br x1", 0, 0, 0, ""),
)]
# fmt: on
IDS = [row.text for row in ROWS]


@pytest.mark.parametrize("row", ROWS, ids=IDS)
def test_an_instruction_touches_what_the_manual_says(row: Row) -> None:
    assert disassemble(row.word, PC) == row.text
    parts = touches(row.word, PC, REGISTERS.__getitem__, 1)
    assert [(p.va, p.size) for p in parts] == [(row.va + i * row.size, row.size) for i in range(row.count)]
    names = {"EL1 " + row.kind} if row.count else set()
    assert {str(p.access) for p in parts} == names


def test_an_unprivileged_access_at_el0_is_an_ordinary_one() -> None:
    (part,) = touches(0xF8400820, PC, REGISTERS.__getitem__, 0)
    assert str(part.access) == "EL0 read"


def test_addresses_wrap_at_64_bits() -> None:
    (first, last) = touches(0xA9401460, PC, lambda n: (1 << 64) - 8, 1)  # ldp x0, x5, [x3]
    assert (first.va, last.va) == ((1 << 64) - 8, 0)


# Unicorn as the judge: the bytes that it reads and writes. Unprivileged forms would need pages of EL0, and a cache
# line is zeroed without a hook.
RUN = [row for row in ROWS if row.count and "tr" not in row.text.split()[0] and "zva" not in row.text]


@pytest.mark.parametrize("row", RUN, ids=[row.text for row in RUN])
def test_unicorn_touches_the_same_bytes(row: Row) -> None:
    machine = Machine.bare()
    page = machine.plan.page_size
    middle = machine.plan.spare + 2 * page
    args = [middle] * 31
    args[2] = (1 << 64) - 16
    if "w2, uxtw" in row.text:
        args[2] = 0x20
    seen: dict[str, set[int]] = {"read": set(), "write": set()}

    def hook(uc: Any, access: int, pa: int, size: int, value: int, _: Any) -> None:
        kind = "write" if access == uc_const.UC_MEM_WRITE else "read"
        seen[kind] |= set(range(pa, pa + size))

    machine.cpu.uc.hook_add(uc_const.UC_HOOK_MEM_READ | uc_const.UC_HOOK_MEM_WRITE, hook)
    # A store exclusive stores only after its load exclusive: the same word with L = 1 and Rs = 31.
    exclusive = row.text.startswith(("stx", "stlx"))
    machine.run([row.word | 1 << 22 | 31 << 16, row.word] if exclusive else [row.word], *args).ok()

    values = {**dict(enumerate(args)), 31: machine.plan.stack}
    pc = machine.plan.code + 4 * exclusive
    parts = touches(row.word, pc, values.__getitem__, 1)
    bytes_of = {machine.translate(p.va + i).pa for p in parts for i in range(p.size)}
    kinds = {AccessType.READ: ["read"], AccessType.WRITE: ["write"], AccessType.ATOMIC: ["read", "write"]}
    for kind in kinds[parts[0].access.type]:
        assert seen[kind] == bytes_of
