"""The rules of an audit: one clean tree, one thing broken in it for each rule, and the ranges against dumb models."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

from pgtable import PhysicalMemory, Registers
from pgtable.audit import RULES, Excuse, Status, Verdict, audit, judged
from pgtable.audit_places import Subject
from pgtable.build import TableBuilder
from pgtable.descriptors import Format
from pgtable.features import CPUS
from pgtable.listing import listing
from pgtable.params import Regime
from tests.pgtable.hand import MAIR, ROOT, hcr, sctlr, table, tcr, tree
from tests.pgtable.test_leaves import SHAPES, random_tree

RAM = 0x4000_0000
PAGE, MB = 0x1000, 1 << 20
UPPER = 0xFFFF_0000_0000_0000
USER_CODE, USER_DATA = 0x40_0000, 0x60_0000
TEXT, DATA, DEVICE, GROUP, BLOCK = (UPPER + n * 0x80_0000 for n in range(1, 6))
TEXT_PA, DATA_PA, CODE_PA, USER_PA, GROUP_PA, BLOCK_PA = (RAM + (8 + 4 * n) * MB for n in range(6))
RESERVED = MAIR | 0x0F << 56  # attribute 7: outer Device, inner Normal


class World(NamedTuple):
    """A small system: both halves, code and data at both levels, a device, a contiguous group, a block."""

    memory: PhysicalMemory
    lower: TableBuilder
    upper: TableBuilder
    regs: Registers

    def flip(self, va: int, mask: int, level: int | None = None) -> None:
        """Flips bits of the descriptor of `va`: its leaf, or that of a level."""
        slot = (self.upper if va >> 63 else self.lower).slot(va, level)
        self.memory.store(slot.pa, self.memory.fetch(slot.pa) ^ mask)

    def verdicts(self, regime: Regime | None = None) -> list[Verdict]:
        return audit(listing(self.memory, self.regs, regime=regime), self.memory)


def world(**tcr_flags: Any) -> World:
    memory = PhysicalMemory((RAM, 64 * MB))
    lower = TableBuilder(memory, (RAM + 1 * MB, 1 * MB))
    upper = TableBuilder(memory, (RAM + 2 * MB, 1 * MB), upper=True)
    lower.map(USER_CODE, CODE_PA, 4 * PAGE, level=3, AP=3, UXN=0, nG=1)
    lower.map(USER_DATA, USER_PA, 4 * PAGE, level=3, AP=1, nG=1)
    upper.map(TEXT, TEXT_PA, 8 * PAGE, level=3, AP=2, PXN=0)
    upper.map(DATA, DATA_PA, 8 * PAGE, level=3)
    upper.map(DEVICE, 0x900_0000, PAGE, level=3, AttrIndx=1)
    upper.map(GROUP, GROUP_PA, 32 * PAGE, level=3, contiguous=True, DBM=1)
    upper.map(BLOCK, BLOCK_PA, 2 * MB)
    regs = Registers(
        CPUS["max"],
        TCR_EL1=tcr(**tcr_flags),
        TTBR0_EL1=lower.root,
        TTBR1_EL1=upper.root,
        MAIR_EL1=RESERVED,
        SCTLR_EL1=sctlr(),
    )
    return World(memory, lower, upper, regs)


def failed(verdicts: list[Verdict]) -> dict[str, list[tuple[int, int]]]:
    """The ranges (VA, size) of each rule that failed."""
    return {v.rule: [(p.va, p.size) for p in v.places] for v in verdicts if v.status is Status.FAIL}


def test_a_clean_tree_passes_every_rule_and_one_informs() -> None:
    verdicts = world().verdicts()
    assert [v.rule for v in verdicts] == [rule.name for rule in RULES]
    assert {v.status for v in verdicts if v.rule != "bbm"} == {Status.PASS}
    (bbm,) = [v for v in verdicts if v.rule == "bbm"]
    assert bbm.status is Status.INFO
    assert bbm.text.startswith("1 block mappings and 2 contiguous groups would need break-before-make")
    assert [(p.va, p.size, p.text) for p in bbm.places] == [
        (GROUP, 32 * PAGE, "4K pages, contiguous"),
        (BLOCK, 2 * MB, "2M blocks"),
    ]


AP1, AP2, SH0, SH1, AF, NG, DBM, CONTIGUOUS, PXN, UXN = (1 << n for n in (6, 7, 8, 9, 10, 11, 51, 52, 53, 54))


def flipped(va: int, mask: int, level: int | None = None) -> Callable[[World], None]:
    return lambda w: w.flip(va, mask, level)


def mapped(va: int, pa: int, size: int = PAGE, **fields: Any) -> Callable[[World], None]:
    return lambda w: (w.upper if va >> 63 else w.lower).map(va, pa, size, level=3, **fields)


def replaced(va: int, level: int, change: Callable[[World, int], int]) -> Callable[[World], None]:
    """The descriptor of `va` at a level replaced by what `change` makes of it."""

    def apply(w: World) -> None:
        slot = (w.upper if va >> 63 else w.lower).slot(va, level)
        w.memory.store(slot.pa, change(w, w.memory.fetch(slot.pa)))

    return apply


ALIAS = UPPER + 0x1000_0000
USER_ALIAS = 0x1000_0000

# What is broken, and the ranges of every rule that then fails.
BROKEN: dict[str, tuple[Callable[[World], None], dict[str, list[tuple[int, int]]]]] = {
    "data executable": (flipped(DATA + PAGE, PXN), {"wx": [(DATA + PAGE, PAGE)]}),
    "user data executable": (flipped(USER_DATA, UXN), {"wx-el0": [(USER_DATA, PAGE)]}),
    "EL0 executes kernel data": (flipped(DATA, UXN), {"el0-executes-upper": [(DATA, PAGE)]}),
    "EL0 executes kernel text": (flipped(TEXT, UXN), {"el0-executes-upper": [(TEXT, PAGE)]}),
    "EL0 writes kernel data": (flipped(DATA, AP1), {"el0-reaches-upper": [(DATA, PAGE)]}),
    "EL0 reads kernel text": (flipped(TEXT + PAGE, AP1), {"el0-reaches-upper": [(TEXT + PAGE, PAGE)]}),
    "device executable": (flipped(DEVICE, PXN | AP2), {"device-executable": [(DEVICE, PAGE)]}),
    "non-cacheable alias": (
        mapped(ALIAS, DATA_PA + 2 * PAGE, 2 * PAGE, AttrIndx=2),
        {"alias-attributes": [(DATA + 2 * PAGE, 2 * PAGE)]},
    ),
    "alias of other shareability": (
        mapped(USER_ALIAS, USER_PA, SH=2, AP=1, nG=1),
        {"alias-attributes": [(USER_DATA, PAGE)]},
    ),
    "device alias": (mapped(ALIAS, DATA_PA, AttrIndx=1), {"alias-attributes": [(DATA, PAGE)]}),
    "text writable by an alias": (mapped(ALIAS, TEXT_PA + PAGE, 2 * PAGE), {"alias-rwx": [(TEXT + PAGE, 2 * PAGE)]}),
    "text writable by EL0": (mapped(USER_ALIAS, TEXT_PA, AP=1, nG=1), {"alias-rwx": [(TEXT, PAGE)]}),
    "user code writable by EL0": (mapped(USER_ALIAS, CODE_PA, AP=1, nG=1), {"alias-rwx": [(USER_CODE, PAGE)]}),
    "writable code's second mapping": (
        mapped(ALIAS, TEXT_PA, PXN=0),
        {"wx": [(ALIAS, PAGE)], "alias-rwx": [(TEXT, PAGE)]},
    ),
    "EL0 writes a table": (
        mapped(USER_ALIAS, RAM + 1 * MB, 4 * PAGE, AP=1, nG=1),
        {"tables-el0-writable": [(USER_ALIAS, 4 * PAGE)]},
    ),
    "a table is writable code": (
        mapped(ALIAS, RAM + 2 * MB, PAGE, PXN=0),
        {"wx": [(ALIAS, PAGE)], "tables-wx": [(ALIAS, PAGE)]},
    ),
    "a group misses an entry": (flipped(GROUP + 3 * PAGE, CONTIGUOUS), {"contiguous": [(GROUP, 16 * PAGE)]}),
    "a group misses a page": (flipped(GROUP + 20 * PAGE, 1), {"contiguous": [(GROUP + 16 * PAGE, 16 * PAGE)]}),
    "a group's attributes differ": (flipped(GROUP + 5 * PAGE, 1 << 55), {"contiguous": [(GROUP, 16 * PAGE)]}),
    "a group's address jumps": (flipped(GROUP + 16 * PAGE, 1 << 12), {"contiguous": [(GROUP + 16 * PAGE, 16 * PAGE)]}),
    "two pages of a group are one": (
        flipped(GROUP + 21 * PAGE, 1 << 12),
        {"contiguous": [(GROUP + 16 * PAGE, 16 * PAGE)]},
    ),
    "single pages are flagged": (flipped(DATA, CONTIGUOUS), {"contiguous": [(DATA, 16 * PAGE)]}),
    "a page's RES0 bit": (flipped(DATA, 1 << 48), {"reserved": [(DATA, PAGE)]}),
    "a block's RES0 bit": (flipped(BLOCK, 1 << 13), {"reserved": [(BLOCK, 2 * MB)]}),
    "a table's RES0 bit": (flipped(TEXT, 1 << 49, 2), {"reserved": [(TEXT, 2 * MB)]}),
    "a page of type 0b01": (flipped(DATA + PAGE, 2), {"reserved": [(DATA + PAGE, PAGE)]}),
    "a reserved memory type": (flipped(DATA, 7 << 2), {"reserved": [(DATA, PAGE)]}),
    "AF is 0": (flipped(DATA + PAGE, AF), {"access-flag": [(DATA + PAGE, PAGE)]}),
    "not shareable": (flipped(DATA, SH0 | SH1), {"shareability": [(DATA, PAGE)]}),
    "reserved shareability": (flipped(DATA, SH1), {"shareability": [(DATA, PAGE)]}),
    "a kernel page is not global": (flipped(TEXT, NG), {"global": [(TEXT, PAGE)]}),
    "a user page is global": (flipped(USER_CODE, NG), {"global": [(USER_CODE, PAGE)]}),
    "a table outside RAM": (
        replaced(TEXT, 2, lambda w, _: table(0x9_0000_0000)),
        {"structure": [(TEXT, 2 * MB)]},
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_one_thing_broken_fails_its_rule_with_its_range_and_no_other(name: str) -> None:
    change, expected = BROKEN[name]
    made = world()
    change(made)
    assert failed(made.verdicts()) == expected


@pytest.mark.parametrize("name", BROKEN)
def test_the_same_in_big_endian_tables(name: str) -> None:
    change, expected = BROKEN[name]
    made = world()
    change(made)
    tables = made.memory.words(RAM + MB, 2 * MB // 8)
    tables[:] = tables.byteswap()
    big = made._replace(regs=made.regs.replace(SCTLR_EL1=sctlr(EE=1)))
    assert failed(big.verdicts()) == expected


def test_every_rule_that_can_fail_is_broken_above() -> None:
    assert {rule.name for rule in RULES if not rule.informs} == {n for _, found in BROKEN.values() for n in found}


def test_a_place_says_pa_alias_and_why() -> None:
    made = world()
    mapped(ALIAS, TEXT_PA + PAGE, 2 * PAGE)(made)
    (verdict,) = [v for v in made.verdicts() if v.status is Status.FAIL]
    assert verdict.text == "1 range, 8K"
    assert list(verdict.places) == [
        (TEXT + PAGE, 2 * PAGE, TEXT_PA + PAGE, ALIAS, "EL1 r-x EL0 ---, and EL1 rw- EL0 --- at the alias")
    ]


# what is no failure


def test_what_looks_odd_and_is_right() -> None:
    made = world(HA=1, HD=1)
    made.flip(DATA, AF)  # hardware sets it
    made.flip(GROUP + 2 * PAGE, AF)  # and these two may differ inside a group
    made.flip(GROUP + 3 * PAGE, AP2)
    made.upper.map(ALIAS, TEXT_PA, 4 * PAGE, level=3, AP=2)  # read-only alias of text
    made.upper.map(ALIAS + MB, DATA_PA, 4 * PAGE, level=3, AttrIndx=0)  # writable alias of data
    made.upper.map(ALIAS + 2 * MB, CODE_PA, 4 * PAGE, level=3)  # what EL0 executes is writable in a linear map
    made.upper.map(ALIAS + 3 * MB, 0xA00_0000, PAGE, level=3, AttrIndx=2, SH=0)  # non-cacheable: SH does not count
    made.upper.map(ALIAS + 5 * MB, 0x900_0000, PAGE, level=3, AttrIndx=1, SH=0)  # nor for a device
    made.upper.map(ALIAS + 4 * MB, RAM + 1 * MB, 4 * PAGE, level=3)  # tables are written by EL1
    assert failed(made.verdicts()) == {}


def test_clean_dirty_state_differs_only_where_hardware_could_have_changed_it() -> None:
    made = world()
    made.upper.map(ALIAS, GROUP_PA, 16 * PAGE, level=3, contiguous=True)
    made.flip(ALIAS + PAGE, AP2)
    assert failed(made.verdicts()) == {"contiguous": [(ALIAS, 16 * PAGE)]}


def test_a_misaligned_group_is_found_on_cpus_of_both_kinds() -> None:
    for contiguous_output in (False, True):
        made = world()
        made.upper.map(ALIAS, RAM + 40 * MB + PAGE, 16 * PAGE, level=3, Contiguous=1)
        regs = Registers(CPUS["max"].replace(contiguous_output=contiguous_output), **dict(made.regs.as_dict()))
        found = failed(made._replace(regs=regs).verdicts())
        assert found["contiguous"] == [(ALIAS, 16 * PAGE)]


def test_loops_addresses_that_are_too_large_and_shared_tables() -> None:
    made = world()
    root = made.upper.root
    made.memory.store(root + 8 * 511, table(root))
    found = {v.rule: v for v in made.verdicts()}
    assert found["structure"].status is Status.FAIL
    assert any("is also its own level 0 table" in place.text for place in found["structure"].places)

    made = world()
    small = made._replace(regs=made.regs.replace(TCR_EL1=made.regs.TCR_EL1 & ~(7 << 32) | 2 << 32))
    small.upper.map(ALIAS, 1 << 44, PAGE, level=3)
    assert failed(small.verdicts()) == {"structure": [(ALIAS, PAGE)]}

    made = world()
    slot = made.lower.slot(USER_CODE, 1)
    made.memory.store(slot.pa + 8, made.memory.fetch(slot.pa))
    found = {v.rule: v for v in made.verdicts()}
    assert failed(list(found.values())) == {}
    assert found["shared-tables"].status is Status.INFO
    texts = [place.text[: len("2 descriptors refer to the level N")] for place in found["shared-tables"].places]
    assert texts == [f"2 descriptors refer to the level {level}" for level in (2, 3, 3)]


@pytest.mark.parametrize("regime", [Regime.EL2, Regime.EL3])
def test_a_regime_with_one_level(regime: Regime) -> None:
    memory = PhysicalMemory((RAM, 16 * MB))
    builder = TableBuilder(memory, (RAM, MB), fmt=Format(el0=False))
    builder.map(USER_CODE, RAM + 8 * MB, 4 * PAGE, level=3, XN=1, PXN=0)
    el = regime.el
    names = {
        f"TCR_EL{el}": tcr(one=True),
        f"TTBR0_EL{el}": builder.root,
        f"MAIR_EL{el}": MAIR,
        f"SCTLR_EL{el}": sctlr(),
    }
    regs = Registers(CPUS["max"], HCR_EL2=hcr(), **names)
    verdicts = audit(listing(memory, regs, regime=regime), memory)
    assert failed(verdicts) == {}
    assert {v.rule for v in verdicts if v.status is Status.SKIP} == {rule.name for rule in RULES if rule.el0}
    slot = builder.slot(USER_CODE).pa
    memory.store(slot, memory.fetch(slot) ^ (NG | UXN))
    found = audit(listing(memory, regs, regime=regime), memory)
    assert failed(found) == {"wx": [(USER_CODE, PAGE)], "global": [(USER_CODE, PAGE)]}


def test_rules_by_name_and_what_is_excused() -> None:
    made = world()
    made.flip(DATA + PAGE, PXN)
    found = listing(made.memory, made.regs)
    assert [v.rule for v in audit(found, made.memory, ["wx", "bbm"])] == ["wx", "bbm"]
    subject = Subject(found, made.memory)
    wx = next(rule for rule in RULES if rule.name == "wx")
    verdict = judged(wx, subject, [Excuse("wx", DATA + PAGE, PAGE, "on purpose")])
    assert verdict.status is Status.PASS
    assert [(p.va, p.text) for p in verdict.expected] == [(DATA + PAGE, "on purpose")]
    for excuse in (Excuse("wx", DATA, PAGE, ""), Excuse("wx", DATA + PAGE, PAGE // 2, ""), Excuse("bbm", DATA, MB, "")):
        assert judged(wx, subject, [excuse]).status is Status.FAIL


# against dumb models, page by page


def test_aliases_are_what_a_model_page_by_page_says(rng: random.Random) -> None:
    """Random overlapping mappings: the PAs that offend, one page at a time."""
    for _ in range(30):
        made = world()
        pages: dict[int, list[tuple[int, bool, bool, int]]] = {}
        base = RAM + 40 * MB
        for number in range(rng.randrange(2, 12)):
            first, count = rng.randrange(40), rng.randrange(1, 20)
            ap, pxn, kind = rng.choice((0, 2)), rng.randrange(2), rng.choice((0, 0, 0, 2, 4))
            va = ALIAS + number * MB
            made.upper.map(va, base + first * PAGE, count * PAGE, level=3, AP=ap, PXN=pxn, AttrIndx=kind)
            for page in range(first, first + count):
                pages.setdefault(page, []).append((number, ap == 0, pxn == 0, kind))
        found = {v.rule: v.places for v in made.verdicts()}
        mixed = {page for page, rows in pages.items() if len({row[3] for row in rows}) > 1}
        rwx = {
            page
            for page, rows in pages.items()
            if any(w[1] and x[2] and w[0] != x[0] and not (w[2] and x[1]) for w in rows for x in rows)
        }
        for rule, wanted in (("alias-attributes", mixed), ("alias-rwx", rwx)):
            got = {
                (place.pa + offset - base) // PAGE
                for place in found[rule]
                if place.pa is not None
                for offset in range(0, place.size, PAGE)
            }
            assert got == wanted, rule
            for place in found[rule]:
                assert place.pa is not None
                assert place.alias is not None
                numbers = {(va - ALIAS) // MB for va in (place.va, place.alias)}
                assert len(numbers) == 2
                assert numbers <= {row[0] for row in pages[(place.pa - base) // PAGE]}


def test_ten_thousand_runs_take_less_than_a_second(rng: random.Random) -> None:
    made = world()
    for i in range(10_000):
        made.upper.place(ALIAS + i * PAGE, 3, (RAM + rng.randrange(1 << 13) * PAGE) | 0x703 | rng.getrandbits(2) << 53)
    found = listing(made.memory, made.regs)
    assert len(found.runs.va) > 9000
    start = time.process_time()
    audit(found, made.memory)
    assert time.process_time() - start < 1


# garbage


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[] if n < 3 else pytest.mark.full) for n in range(10)])
def test_garbage_is_judged_in_time(seed: int) -> None:
    """30 random trees of each seed with random words in their tables: a verdict for every rule, in two seconds."""
    rng = random.Random(seed)
    print(f"seed {seed}")
    for _ in range(30):
        made = random_tree(rng, *rng.choice(SHAPES))
        regime = Regime(made.regime)
        tables = listing(made.memory, made.regs, regime=regime).tables
        pages = tables.pa[tables.there].tolist()
        for _ in range(rng.choice((1, 5, 100))):
            pa = rng.choice(pages) + 8 * rng.randrange(512)
            word = rng.choice((rng.getrandbits(64), rng.getrandbits(64) | 3, rng.choice(pages) | 3))
            made.memory.store(pa, word)
        start = time.process_time()
        verdicts = audit(listing(made.memory, made.regs, regime=regime), made.memory)
        for verdict in verdicts:
            assert len(list(verdict.places)) == len(verdict.places)
            assert (verdict.status in (Status.FAIL, Status.INFO)) == bool(len(verdict.places))
        assert time.process_time() - start < 2


def test_a_table_that_is_nothing_but_itself() -> None:
    made = tree(va=0)
    memory = PhysicalMemory((ROOT, 0x10000))
    memory.words(ROOT, 512)[:] = table(ROOT)
    found = listing(memory, made.regs)
    start = time.process_time()
    verdicts = audit(found, memory)
    assert time.process_time() - start < 2
    assert "structure" in failed(verdicts)
    assert np.all(found.runs.size > 0)
