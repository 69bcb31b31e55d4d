"""Thirteen one-page tables on which three widely used walkers disagree, each with the architecture's answer.

One 4K, 48-bit tree with one read/write/execute page (0x80000703), and one change per case. Judge: the Arm ARM, as the
answer beside each case. For the cases about an address drgn is asked too: it walks kernel tables on its own. Where
drgn is wrong the case says what it answers, and why that is wrong.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest

from pgtable import Access, PhysicalMemory, Translation, translate, translate_many
from pgtable.leaves import leaves
from pgtable.permissions import PR, PW, PX, UR, UW, UX
from tests.kernels import lack
from tests.pgtable.hand import PAGE_SHIFT, ROOT, TABLE_STEP, Tree, leaf, tree

READ, WRITE, FETCH = Access.read(), Access.write(), Access.fetch()
READ_EL0, WRITE_EL0, FETCH_EL0 = Access.read(0), Access.write(0), Access.fetch(0)
PAGE = 0x8000_0000
NO_ADDRESS = "a fault"
NOT_ASKED = "not about an address"


class Case(NamedTuple):
    """A table, what accesses do (True, or the fault type and level), the PA, the listing, and drgn's answer."""

    made: Tree
    answers: dict[Access, bool | tuple[str, int]]
    pa: int | None  # of the leaf, where the page is mapped at all
    perms: int | None  # of the listed leaf; None: nothing is listed
    drgn: int | str  # PA of the page, NO_ADDRESS or NOT_ASKED


def case(
    answers: dict[Access, bool | tuple[str, int]],
    word: int = leaf(PAGE),
    *,
    drgn: int | str = NOT_ASKED,
    pa: int | None = PAGE,
    perms: int | None = PR | PW | PX | UX,
    upper: bool = True,
    **more: Any,
) -> Case:
    return Case(tree(word, upper=upper, **more), answers, pa, perms, drgn)


PERMISSION, TRANSLATION = ("permission", 3), ("translation", 3)
CASES = {
    "the page itself": case({READ: True, WRITE: True, FETCH: True, READ_EL0: PERMISSION}, drgn=PAGE),
    "1 PXNTable at level 0": case(
        {READ: True, WRITE: True, FETCH: PERMISSION, FETCH_EL0: True},
        tables={0: {"PXNTable": 1}},
        perms=PR | PW | UX,
    ),
    "2 PXNTable at level 2": case(
        {READ: True, WRITE: True, FETCH: PERMISSION, FETCH_EL0: True},
        tables={2: {"PXNTable": 1}},
        perms=PR | PW | UX,
    ),
    "3 APTable 0b10 at level 0": case(
        {READ: True, WRITE: PERMISSION, FETCH: True},
        tables={0: {"APTable": 2}},
        perms=PR | PX | UX,
    ),
    "4 AP 0b01: EL1 cannot execute": case(
        {READ: True, WRITE: True, FETCH: PERMISSION, READ_EL0: True, WRITE_EL0: True, FETCH_EL0: True},
        leaf(PAGE, AP=1),
        perms=PR | PW | UR | UW | UX,
    ),
    "5 SCTLR.WXN on a writable page": case(
        {READ: True, WRITE: True, FETCH: PERMISSION, FETCH_EL0: True},
        sctlr_flags={"WXN": 1},
        perms=PR | PW | UX,
    ),
    "6 level 3, type 0b01": case(
        {READ: TRANSLATION, FETCH: TRANSLATION}, leaf(PAGE, low=1), pa=None, perms=None, drgn=NO_ADDRESS
    ),
    "7 level 3, type 0b10": case(
        {READ: TRANSLATION, FETCH: TRANSLATION}, leaf(PAGE, low=2), pa=None, perms=None, drgn=NO_ADDRESS
    ),
    # drgn takes bits [1:0] = 0b01 for a block at every level but the last; BlockDescSupported: not at level 0.
    "8 block at level 0 without LPA2": case(
        {READ: ("translation", 0)}, leaf(0x80_0000_0000, low=1), level=0, pa=None, perms=None, drgn=0x80_0000_0000
    ),
    # drgn answers for the kernel, which never leaves AF at 0: it does not look.
    "9 AF 0 without hardware update": case(
        {READ: ("access flag", 3), FETCH: ("access flag", 3)}, leaf(PAGE, AF=0), drgn=PAGE
    ),
    "10 EPD0: no walks": case(
        {READ: ("translation", 0), WRITE: ("translation", 0)}, upper=False, tcr_flags={"EPD0": 1}, perms=None
    ),
    "11 64K granule, LPA, PA[51:48] = 0xa": case(
        {READ: True, WRITE: True},
        leaf(PAGE) | 0xA << 12,
        granule="64K",
        ps=6,
        pa=0x000A_0000_8000_0000,
        drgn=0x000A_0000_8000_0000,
    ),
    "12 4K LPA2, 52-bit VA, PA[51:50] = 3": case(
        {READ: True, WRITE: True},
        leaf(PAGE, SH=3),
        ia=52,
        tcr_flags={"DS": 1},
        ps=6,
        pa=0x000C_0000_8000_0000,
        drgn=0x000C_0000_8000_0000,
    ),
    "13 DS 0 on a CPU with 52-bit PAs: SH is no address": case(
        {READ: True, WRITE: True}, leaf(PAGE, SH=3), ps=6, drgn=PAGE
    ),
}


def physical(made: Tree) -> PhysicalMemory:
    memory = PhysicalMemory((ROOT, 8 * TABLE_STEP))
    for pa, word in made.memory.items():
        memory.store(pa, word)
    return memory


def test_there_are_thirteen_and_the_page_itself() -> None:
    assert [name.split()[0] for name in CASES] == ["the", *map(str, range(1, 14))]
    assert CASES["the page itself"].made.memory[CASES["the page itself"].made.slots[3]] == 0x8000_0703


@pytest.mark.parametrize("name", CASES)
def test_the_walk_gives_the_architectures_answer(name: str) -> None:
    made, answers, pa, _, _ = CASES[name]
    for access, answer in answers.items():
        found = translate(made.memory, made.regs, made.va, access)
        if answer is True:
            assert isinstance(found.result, Translation), (str(access), found)
            assert pa is not None
            size = 1 << PAGE_SHIFT["64K" if "64K" in name else "4K"]
            assert found.pa == pa | made.va & size - 1, str(access)
        else:
            assert found.fault is not None, str(access)
            assert (found.fault.type.value, found.fault.level) == answer, str(access)
        assert f"{made.va:#018x}" in str(found)


@pytest.mark.parametrize("name", CASES)
def test_the_array_walk_gives_the_architectures_answer(name: str) -> None:
    made, answers, pa, _, _ = CASES[name]
    for access, answer in answers.items():
        many = translate_many(physical(made), made.regs, [made.va] * 3, access)
        assert many.ok.tolist() == [answer is True] * 3, str(access)
        if answer is True:
            assert pa is not None
            assert int(many.pa[0]) >> 16 == pa >> 16


@pytest.mark.parametrize("name", CASES)
def test_the_listing_has_the_page_or_nothing(name: str) -> None:
    made, _, pa, perms, _ = CASES[name]
    found = leaves(physical(made), made.regs)
    if perms is None:
        assert len(found.va) == 0
    else:
        assert [hex(x) for x in found.pa.tolist()] == [hex(pa or 0)]
        page = (1 << PAGE_SHIFT["64K" if "64K" in name else "4K"]) - 1
        assert found.va.tolist() == [made.va & ~page]
        data = PR | PW | PX | UR | UW | UX
        assert [p & data for p in found.perms.tolist()] == [perms]


# drgn.


def asked_of_drgn(made: Tree, granule: str, ia: int) -> int | str:
    try:
        import drgn
        from drgn.helpers.linux import mm
    except ImportError:
        lack("drgn", "drgn is not installed: `pip install drgn` (a wheel; it is in the dev extra)")
    top = 0xFFFF_8000_8000_0000
    size = 1 << PAGE_SHIFT[granule]
    lines = ["OSRELEASE=6.12.0", f"PAGESIZE={size}", f"SYMBOL(swapper_pg_dir)={top:x}", "KERNELOFFSET=0"]
    lines += [f"NUMBER(VA_BITS)={ia}", f"NUMBER(TCR_EL1_T1SZ)={64 - ia:#x}", f"NUMBER(kimage_voffset)={top - ROOT:#x}"]
    program = drgn.Program(drgn.Platform(drgn.Architecture.AARCH64))
    program.set_linux_kernel_custom("\n".join([*lines, f"NUMBER(PHYS_OFFSET)={ROOT:#x}", ""]), False)

    def read(pa: int, n: int, _offset: int, _physical: bool) -> bytes:
        words = b"".join(made.memory.fetch(at).to_bytes(8, "little") for at in range(pa & ~7, pa + n, 8))
        return words[pa & 7 : (pa & 7) + n]

    program.add_memory_segment(ROOT, 8 * TABLE_STEP, read, physical=True)
    try:
        return int(mm._linux_helper_follow_phys(program, top, made.va))
    except drgn.FaultError:
        return NO_ADDRESS


@pytest.mark.parametrize("name", [name for name, row in CASES.items() if row.drgn != NOT_ASKED])
def test_drgn_gives_the_address_that_the_case_records_for_it(name: str) -> None:
    made, _, _, _, want = CASES[name]
    granule, ia = "64K" if "64K" in name else "4K", 52 if "52-bit VA" in name else 48
    found = asked_of_drgn(made, granule, ia)
    if isinstance(found, int):
        block = 1 << 39 if "block" in name else 1 << PAGE_SHIFT[granule]
        assert made.va & block - 1 == found & block - 1
        found &= -block
    assert found == want
