"""Programs with one wrong thing each, and the verdicts of the TLB model and of the break-before-make checker.

    python -m tests.pgtable.programs            prints the table of docs/tlb.md
    python -m tests.pgtable.programs --write    puts it there

Rules of this file:
- `good_` programs have nothing wrong, `bad_` ones one thing, which the comment at the top says.
- The verdicts are typed here, not computed: the words before the colon of what the checkers say, "-" for nothing.
- V is 0xffff000000001000, whose page descriptor is at PA 0x40003008 (the tables that a program has by default).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from pgtable import bbm, tlb
from pgtable.bbm import parse_program
from pgtable.tlb_events import Finding


class Case(NamedTuple):
    """A program: its text, what is wrong with it, and the two verdicts expected."""

    name: str
    about: str
    text: str
    tlb: str = "-"
    bbm: str = "-"


# Pieces that most programs share. RW, RO, NG: pages at PA 0x50000000.
RW, RO, NG = "0x60000050000703", "0x60000050000783", "0x60000050000f03"
V = "0xffff000000001000"
UNMAP = f"cpu0 write 0x40003008 L3 {RW} -> 0\n"
MAP = f"cpu0 write 0x40003008 L3 0 -> {RW}\n"
FLUSH = f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu0 dsb ish\ncpu0 isb\n"
RETURN = "cpu0 return\n"
READS = f"cpu0 read {V}\ncpu1 read {V}\n"
END = RETURN + READS

BLOCK, NT_BLOCK = "0x60000050000701", "0x60000050010701"
LINK = "0x40003003"
L2, SECOND = "0x40002000", "0x40004000"
UNLINK = f"cpu0 write {L2} L2 {LINK} -> 0\n"
FLUSH_TABLE = "cpu0 dsb ishst\ncpu0 tlbi vaae1is 0xffff000000000000\ncpu0 dsb ish\ncpu0 isb\n"


def _pages(pa: int, count: int, attributes: int) -> str:
    """`count` pages in a row, in the table at `pa`."""
    return "".join(f"word {pa + 8 * i:#x} = {0x5000_0000 + 0x1000 * i | attributes:#x}\n" for i in range(count))


SPLIT_TABLE = _pages(0x4000_4000, 512, 0x60000000000703)
SPLIT = f"cpu0 write 0x40002008 L2 {BLOCK} -> 0x40004003\n"
JOIN = f"word 0x40002008 = 0x40004003\ncpu0 write 0x40002008 L2 0x40004003 -> {BLOCK}\n"
B = "0xffff000000200000"
FLUSH_BLOCK = f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {B}\ncpu0 dsb ish\ncpu0 isb\n"
END_BLOCK = f"cpu0 return\ncpu0 read {B}\ncpu1 read {B}\n"

CASES = (
    # Taking a page away.
    Case("good_unmap", "invalid, DSB, TLBI, DSB, ISB", UNMAP + FLUSH + END),
    Case(
        "bad_unmap_no_tlbi", "no TLBI", UNMAP + "cpu0 dsb ishst\ncpu0 isb\n" + END,
        "missing invalidation", "unclean at return (no TLBI)",
    ),
    Case(
        "bad_unmap_no_dsb_before", "no DSB between the store and the TLBI",
        UNMAP + f"cpu0 tlbi vaale1is {V}\ncpu0 dsb ish\ncpu0 isb\n" + END,
        "stale use", "unclean at return (TLBI before DSB)",
    ),
    Case(
        "bad_unmap_no_dsb_after", "no DSB after the TLBI",
        UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu0 isb\n" + END,
        "stale use", "unclean at return (no DSB after the TLBI)",
    ),
    Case(
        "bad_unmap_stores_only_dsb", "the DSB after the TLBI waits for stores only",
        UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu0 dsb ishst\ncpu0 isb\n" + END,
        "stale use", "unclean at return (no DSB after the TLBI)",
    ),
    Case(
        "bad_unmap_narrow_dsb", "the DSB after the broadcast TLBI is not shareable",
        UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu0 dsb nsh\ncpu0 isb\n" + END,
        "stale use", "unclean at return (no DSB after the TLBI)",
    ),
    Case(
        "bad_unmap_dsb_by_other_cpu", "another CPU executes the DSB after the TLBI",
        UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu1 dsb ish\ncpu0 isb\n" + END,
        "stale use", "unclean at return (no DSB after the TLBI)",
    ),
    Case(
        "bad_unmap_nxs_dsb", "a DSB nXS does not complete a TLBI without nXS",
        UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu0 dsb ishnxs\ncpu0 isb\n" + END,
        "stale use", "unclean at return (no DSB after the TLBI)",
    ),
    Case(
        "bad_unmap_tlbi_first", "the TLBI is before the store",
        f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu0 dsb ish\ncpu0 isb\n" + UNMAP + "cpu0 dsb ish\n" + END,
        "missing invalidation", "unclean at return (no TLBI)",
    ),
    Case(
        "bad_unmap_local_tlbi", "the TLBI is not broadcast",
        UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1 {V}\ncpu0 dsb ish\ncpu0 isb\n" + END,
        "stale use", "unclean at return (TLBI not broadcast)",
    ),
    Case(
        "good_unmap_one_cpu", "the same with one CPU",
        "cpus 1\n" + UNMAP
        + f"cpu0 dsb nshst\ncpu0 tlbi vaale1 {V}\ncpu0 dsb nsh\ncpu0 isb\ncpu0 return\ncpu0 read {V}\n",
    ),
    Case(
        "bad_unmap_other_address", "the TLBI is of the next page",
        UNMAP + "cpu0 dsb ishst\ncpu0 tlbi vaale1is 0xffff000000002000\ncpu0 dsb ish\ncpu0 isb\n" + END,
        "missing invalidation", "unclean at return (no TLBI)",
    ),
    Case(
        "bad_unmap_wrong_ttl", "TTL says that the leaf is a level 2 block",
        UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V} ttl 6\ncpu0 dsb ish\ncpu0 isb\n" + END,
        "stale use", "unclean at return (TLBI of another level than TTL says)",
    ),
    Case(
        "bad_unmap_stage2_tlbi", "the TLBI is of stage 2",
        UNMAP + "cpu0 dsb ishst\ncpu0 tlbi ipas2e1is 0x1000\ncpu0 dsb ish\ncpu0 isb\n" + END,
        "missing invalidation", "unclean at return (no TLBI)",
    ),
    Case(
        "bad_unmap_no_isb", "the CPU goes on without an ISB",
        UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu0 dsb ish\ncpu0 read {V}\n" + RETURN,
        "stale use",
    ),
    Case("good_unmap_all", "by VMALLE1IS", UNMAP + FLUSH.replace(f"vaale1is {V}", "vmalle1is") + END),
    Case(
        "good_unmap_window", "another CPU reads before the TLBI: it may still get there",
        UNMAP + f"cpu1 read {V}\n" + FLUSH + END,
    ),
    # ASIDs.
    Case(
        "good_unmap_asid", "not global, by its ASID",
        "asid 5\n" + UNMAP.replace(RW, NG) + FLUSH.replace(f"vaale1is {V}", f"vale1is {V} asid 5") + END,
    ),
    Case(
        "bad_unmap_wrong_asid", "not global, by another ASID",
        "asid 5\n" + UNMAP.replace(RW, NG) + FLUSH.replace(f"vaale1is {V}", f"vale1is {V} asid 6") + END,
        "stale use", "unclean at return (TLBI of another ASID)",
    ),
    Case(
        "good_unmap_global_any_asid", "a global page goes with any ASID",
        "asid 5\n" + UNMAP + FLUSH.replace(f"vaale1is {V}", f"vale1is {V} asid 6") + END,
    ),
    Case(
        "bad_asid_reuse", "another table under the same ASID, no TLBI",
        "half lower\nasid 5\nword 0x40003008 = " + NG + "\nword 0x40008000 = 0x40009003\n"
        "cpu0 read 0x1000\ncpu0 msr TTBR0_EL1 0x5000040008000\ncpu0 isb\ncpu0 read 0x1000\ncpu0 return\n",
        "stale use", "ASID reuse (ASID 0x5: no TLBI)",
    ),
    Case(
        "good_asid_switch", "another table under another ASID",
        "half lower\nasid 5\nword 0x40003008 = " + NG + "\nword 0x40008000 = 0x40009003\n"
        "cpu0 read 0x1000\ncpu0 msr TTBR0_EL1 0x6000040008000\ncpu0 isb\ncpu0 read 0x1000\ncpu0 return\n",
    ),
    Case(
        "bad_mair_no_tlbi", "MAIR changed, no TLBI",
        f"word 0x40003008 = {RW}\ncpu0 read {V}\ncpu0 msr MAIR_EL1 0x4004444\ncpu0 isb\ncpu0 read {V}\ncpu0 return\n",
        "stale use", "register change (MAIR_EL1: no TLBI)",
    ),
    # Putting a page there.
    Case("good_map", "valid, DSB, ISB", MAP + "cpu0 dsb ishst\ncpu0 isb\n" + END),
    Case("bad_map_no_dsb", "valid, no DSB: an access may still fault", MAP + "cpu0 isb\n" + END, "store not visible"),
    Case("bad_map_no_isb", "valid, no ISB", MAP + f"cpu0 dsb ishst\ncpu0 read {V}\n" + RETURN, "store not visible"),
    Case(
        "good_map_window", "another CPU reads before the DSB: it may still fault",
        MAP + f"cpu1 read {V}\ncpu0 dsb ishst\ncpu0 isb\n" + END,
    ),
    # Changing a page.
    Case(
        "good_remap", "another page: break, make",
        UNMAP + FLUSH + "cpu0 write 0x40003008 L3 0 -> 0x60000050001703\ncpu0 dsb ishst\ncpu0 isb\n" + END,
    ),
    Case(
        "bad_remap_no_break", "another page, written over the old",
        f"cpu0 write 0x40003008 L3 {RW} -> 0x60000050001703\n" + FLUSH + END, "-", "output address",
    ),
    Case(
        "bad_remap_no_tlbi", "break, make, no TLBI between",
        UNMAP + "cpu0 dsb ishst\ncpu0 write 0x40003008 L3 0 -> 0x60000050001703\n" + FLUSH + END,
        "-", "make before clean (no TLBI)",
    ),
    Case(
        "bad_remap_no_dsb_after", "break, TLBI, make, no DSB between",
        UNMAP + f"cpu0 dsb ishst\ncpu0 tlbi vaale1is {V}\ncpu0 write 0x40003008 L3 0 -> 0x60000050001703\n"
        + FLUSH + END,
        "-", "make before clean (no DSB after the TLBI)",
    ),
    Case(
        "good_protect", "read-only, written over the old, TLBI",
        f"cpu0 write 0x40003008 L3 {RW} -> {RO}\n" + FLUSH + f"cpu0 return\ncpu0 store {V}\ncpu1 store {V}\n",
    ),
    Case(
        "bad_protect_no_tlbi", "read-only, no TLBI",
        f"cpu0 write 0x40003008 L3 {RW} -> {RO}\ncpu0 dsb ishst\ncpu0 return\ncpu0 store {V}\ncpu1 store {V}\n",
        "missing invalidation", "unclean at return (no TLBI)",
    ),
    Case(
        "good_relax_no_tlbi", "read/write, no TLBI: reads do not mind",
        f"cpu0 write 0x40003008 L3 {RO} -> {RW}\ncpu0 dsb ishst\n" + END,
    ),
    Case(
        "bad_relax_spurious", "read/write, no TLBI: a store still faults",
        f"cpu0 write 0x40003008 L3 {RO} -> {RW}\ncpu0 dsb ishst\ncpu0 isb\ncpu0 return\ncpu0 store {V}\n",
        "missing invalidation",
    ),
    Case(
        "bad_memory_type", "Normal to Device, written over the old",
        f"cpu0 write 0x40003008 L3 {RW} -> 0x6000005000070f\n" + FLUSH + END, "-", "memory type",
    ),
    Case(
        "bad_cacheability", "write-back to non-cacheable, written over the old",
        f"cpu0 write 0x40003008 L3 {RW} -> 0x6000005000070b\n" + FLUSH + END, "-", "cacheability",
    ),
    Case(
        "good_same_attribute", "another AttrIndx with the same attributes",
        f"cpu0 write 0x40003008 L3 {RW} -> 0x60000050000707\n" + END,
    ),
    Case(
        "bad_shareability", "inner to non-shareable, written over the old",
        f"cpu0 write 0x40003008 L3 {RW} -> 0x60000050000403\n" + FLUSH + END, "-", "shareability",
    ),
    Case(
        "bad_global", "not global to global, written over the old",
        f"cpu0 write 0x40003008 L3 {NG} -> {RW}\n" + FLUSH + END, "-", "global over non-global",
    ),
    Case(
        "good_access_flag", "the access flag is cleared, no TLBI",
        f"cpu0 write 0x40003008 L3 {RW} -> 0x60000050000303\n" + RETURN,
    ),
    # Sizes.
    Case(
        "bad_split_level0", "a block becomes a table, FEAT_BBM level 0",
        SPLIT_TABLE + SPLIT + FLUSH_BLOCK + END_BLOCK, "-", "block size",
    ),
    Case(
        "good_split_level2", "the same with FEAT_BBM level 2",
        "bbm 2\n" + SPLIT_TABLE + SPLIT + FLUSH_BLOCK + END_BLOCK,
    ),
    Case(
        "bad_split_level2_no_tlbi", "FEAT_BBM level 2, but no TLBI after it",
        "bbm 2\n" + SPLIT_TABLE + SPLIT + "cpu0 dsb ishst\ncpu0 isb\n" + END_BLOCK,
        "-", "unclean at return (no TLBI)",
    ),
    Case(
        "good_split_level3", "FEAT_BBM level 3 needs no TLBI",
        "bbm 3\n" + SPLIT_TABLE + SPLIT + "cpu0 dsb ishst\ncpu0 isb\n" + END_BLOCK,
    ),
    Case(
        "bad_split_moves", "FEAT_BBM level 2, but the table maps another page",
        "bbm 2\n" + SPLIT_TABLE + "word 0x40004000 = 0x60000050100703\n" + SPLIT + FLUSH_BLOCK + END_BLOCK,
        "-", "output address",
    ),
    Case(
        "good_split_nT", "FEAT_BBM level 1: nT first, TLBI, then the table",
        "bbm 1\n" + SPLIT_TABLE + f"cpu0 write 0x40002008 L2 {BLOCK} -> {NT_BLOCK}\n" + FLUSH_BLOCK
        + SPLIT.replace(BLOCK, NT_BLOCK) + FLUSH_BLOCK + END_BLOCK,
    ),
    Case(
        "bad_split_nT_no_tlbi", "FEAT_BBM level 1: no TLBI between nT and the table",
        "bbm 1\n" + SPLIT_TABLE + f"cpu0 write 0x40002008 L2 {BLOCK} -> {NT_BLOCK}\ncpu0 dsb ishst\n"
        + SPLIT.replace(BLOCK, NT_BLOCK) + FLUSH_BLOCK + END_BLOCK,
        "-", "nT not invalidated",
    ),
    Case(
        "good_join_level2", "a table becomes a block, FEAT_BBM level 2, a range TLBI of all of it",
        "bbm 2\n" + SPLIT_TABLE + JOIN + f"cpu0 dsb ishst\ncpu0 tlbi rvaae1is {B} pages 512\ncpu0 dsb ish\ncpu0 isb\n"
        + END_BLOCK + "cpu1 read 0xffff000000201000\n",
    ),
    Case(
        "bad_join_level2_one_page", "the same, the TLBI is of the first page: two entries for the others",
        "bbm 2\n" + SPLIT_TABLE + JOIN + f"cpu0 dsb ishst\ncpu0 tlbi vaae1is {B}\ncpu0 dsb ish\ncpu0 isb\n"
        + END_BLOCK + "cpu1 read 0xffff000000201000\n",
        "TLB conflict", "unclean at return (no TLBI)",
    ),
    Case(
        "bad_contiguous_level0", "the Contiguous bit goes, FEAT_BBM level 0",
        f"cpu0 write 0x40003008 L3 0x70000050000703 -> {RW}\n" + FLUSH + END, "-", "contiguous",
    ),
    Case(
        "good_contiguous_level1", "the same with FEAT_BBM level 1",
        f"bbm 1\ncpu0 write 0x40003008 L3 0x70000050000703 -> {RW}\n" + FLUSH + END,
    ),
    # Ranges.
    Case(
        "good_range", "four pages, a range TLBI of four",
        "".join(f"cpu0 write {0x40003000 + 8 * i:#x} L3 {0x60000050000703 + 0x1000 * i:#x} -> 0\n" for i in range(4))
        + "cpu0 dsb ishst\ncpu0 tlbi rvaale1is 0xffff000000000000 pages 4\ncpu0 dsb ish\ncpu0 isb\n"
        + "cpu0 return\ncpu1 read 0xffff000000003000\n",
    ),
    Case(
        "bad_range_short", "four pages, a range TLBI of two",
        "".join(f"cpu0 write {0x40003000 + 8 * i:#x} L3 {0x60000050000703 + 0x1000 * i:#x} -> 0\n" for i in range(4))
        + "cpu0 dsb ishst\ncpu0 tlbi rvaale1is 0xffff000000000000 pages 2\ncpu0 dsb ish\ncpu0 isb\n"
        + "cpu0 return\ncpu1 read 0xffff000000003000\n",
        "missing invalidation", "unclean at return (no TLBI)",
    ),
    # Tables.
    Case(
        "good_free_table", "a table is unlinked, invalidated, freed",
        UNLINK + FLUSH_TABLE + "cpu0 free 0x40003000\n" + END,
    ),
    Case(
        "bad_free_table_early", "a table is freed before the TLBI",
        UNLINK + "cpu0 dsb ishst\ncpu0 free 0x40003000\n" + FLUSH_TABLE + END, "-",
        "table freed before invalidation (no TLBI)",
    ),
    Case(
        "bad_free_table_leaf_only", "the TLBI is of leaves only",
        UNLINK + FLUSH_TABLE.replace("vaae1is", "vaale1is") + "cpu0 free 0x40003000\n" + END,
        "freed table used", "table freed before invalidation (leaf-only TLBI of a table)",
    ),
    Case(
        "bad_free_table_linked", "a table is freed that is still linked",
        f"cpu0 write 0x40002008 L2 0 -> 0x40004003\ncpu0 dsb ishst\ncpu0 free 0x40004000\ncpu0 return\ncpu1 read {B}\n",
        "freed table used", "linked table freed",
    ),
    Case(
        "bad_reuse_table", "a table is linked elsewhere before the TLBI",
        f"word 0x40003008 = {RW}\n" + UNLINK + "cpu0 dsb ishst\ncpu0 write 0x40002008 L2 0 -> 0x40003003\n"
        + FLUSH_TABLE + f"cpu0 tlbi vaae1is {V}\ncpu0 dsb ish\n" + RETURN,
        "-", "table reused before invalidation (no TLBI)",
    ),
    Case(
        "bad_table_swap", "another table, written over the old",
        f"cpu0 write {L2} L2 {LINK} -> 0x40004003\n" + FLUSH_TABLE + END, "-", "table address",
    ),
    Case(
        "bad_unlink_children", "a table with four pages is unlinked, the TLBI is of one",
        _pages(0x4000_3000, 4, 0x60000000000703) + UNLINK + FLUSH_TABLE + "cpu0 return\ncpu1 read 0xffff000000003000\n",
        "missing invalidation", "unclean at return (no TLBI)",
    ),
)  # fmt: skip


def verdict(findings: list[Finding], *, cause: bool) -> str:
    """The rules of the findings, each once; with their causes, where asked for."""
    words = [f"{f.rule} ({f.cause})" if cause and f.cause else f.rule for f in findings]
    return ", ".join(dict.fromkeys(words)) or "-"


def verdicts(case: Case) -> tuple[str, str]:
    """What the TLB model and the checker say."""
    program = parse_program(case.text)
    return verdict(tlb.run(program), cause=False), verdict(bbm.run(program), cause=True)


def table() -> str:
    """The table of docs/tlb.md, computed."""
    lines = ["| program | what | TLB model | break-before-make checker |", "|---|---|---|---|"]
    lines += [f"| {case.name} | {case.about} | {' | '.join(verdicts(case))} |" for case in CASES]
    return "\n".join(lines) + "\n"


DOC = Path(__file__).resolve().parents[2] / "docs" / "tlb.md"
BEGIN, FINISH = "<!-- programs -->\n", "<!-- end of programs -->\n"


def with_table(text: str) -> str:
    """The page with the table put between its marks."""
    head, _, rest = text.partition(BEGIN)
    return head + BEGIN + table() + FINISH + rest.partition(FINISH)[2]


if __name__ == "__main__":
    if "--write" in sys.argv:
        DOC.write_text(with_table(DOC.read_text()))
    else:
        print(table(), end="")
