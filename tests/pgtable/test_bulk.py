"""The array walk against the scalar walk, field by field; the scalar walk is judged elsewhere (tests/judged)."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from emu.judge.corpus import load
from emu.judge.model import memory_of, registers_of
from pgtable import (
    CPUS,
    Access,
    AccessType,
    Fault,
    Features,
    Format,
    Granule,
    Many,
    Memory,
    NestedMany,
    NestedWalk,
    PhysicalMemory,
    Regime,
    Registers,
    Stage2Params,
    Walk,
    WalkParams,
    at,
    at_many,
    translate,
    translate_many,
)
from pgtable import addresses as addresses_module
from pgtable import classes as classes_module
from pgtable import regions as regions_module
from pgtable.at import OPERATIONS, ExternalAbort
from pgtable.classes import DIRTY_BIT, MMU_OFF, NG, NS, OVERLAY, S1PTW, STAGE2, WRITE
from pgtable.registers import HCR_EL2, SCR_EL3, SCTLR_EL1, TCR2, TCR_EL1, TCR_EL2, TCR_EL3, TTBR_52, VTCR_EL2

CORPUS = Path(__file__).parents[1] / "judged" / "corpus"
U64 = (1 << 64) - 1
COLUMNS = ("ok", "pa", "fault", "level", "word", "attr", "sh", "perms", "flags")


# What is compared: every column of `Many`, PAR, ESR, and what hardware changes.


def expected(walk: Walk) -> tuple[int, ...]:
    """What `Many` must say of a scalar walk: COLUMNS, PAR, ESR."""
    r = walk.result
    last = walk.raw[-1][2] if walk.raw else 0
    if isinstance(r, Fault):
        flags = WRITE * r.write | DIRTY_BIT * r.dirty_bit | OVERLAY * r.overlay
        flags |= STAGE2 * (r.stage == 2) | S1PTW * r.s1ptw
        esr = r.esr(walk.access, target_el=2 if r.stage == 2 else None)
        return (False, 0, r.code, r.level, last, 0, 0, 0, flags, r.par(), esr)
    level = MMU_OFF if r.level is None else r.level
    return (True, r.pa, 0, level, r.word, r.attr, r.sh, r.perms, NG * r.nG | NS * r.ns, r.par(), 0)


def found(many: Many) -> list[tuple[int, ...]]:
    columns = [getattr(many, name) for name in COLUMNS] + [many.par(), many.esr()]
    return list(zip(*(column.reshape(-1).tolist() for column in columns), strict=True))


def changes(walks: list[Walk]) -> dict[int, tuple[int, int]]:
    """The updates of walks made at the same moment."""
    flips: dict[int, tuple[int, int]] = {}
    for update in (u for walk in walks for u in walk.updates):
        flips[update.pa] = update.old, flips.get(update.pa, (0, 0))[1] | (update.old ^ update.new)
    return {pa: (old, old ^ flip) for pa, (old, flip) in flips.items()}


def assert_same(case: Case, many: Many, note: str) -> None:
    walks = [translate(case.memory, case.regs, va, case.access, regime=case.regime) for va in case.vas]
    for walk, got in zip(walks, found(many), strict=True):
        want = expected(walk)
        names = (*COLUMNS, "PAR", "ESR")
        wrong = {n: (hex(g), hex(w)) for n, g, w in zip(names, got, want, strict=True) if g != w}
        assert not wrong, f"{note}: VA {walk.va:#x}: (array, scalar) {wrong}\n{walk}\n{case.regs}"
    listed = zip(*(column.tolist() for column in many.updates), strict=True)
    assert {pa: (old, new) for pa, old, new in listed} == changes(walks), note
    assert many.updates.pa.tolist() == sorted(changes(walks)), note
    nested = [walk for walk in walks if isinstance(walk, NestedWalk)]
    if isinstance(many, NestedMany):
        assert many.hpfar.tolist() == [walk.hpfar for walk in nested], note
        assert many.ipa.tolist() == [walk.ipa or 0 for walk in nested], note
    else:
        assert not nested, note


# The ways an array may take: few addresses walked to the end, regions first, many chunks, colliding hashes.


class OnlyRead:
    """A Memory that is not a PhysicalMemory."""

    def __init__(self, memory: PhysicalMemory) -> None:
        self.memory = memory
        self.pages: list[int] = []

    def fetch(self, pa: int) -> int:
        return self.memory.fetch(pa)

    def words(self, pa: int, n: int) -> npt.NDArray[np.uint64]:
        assert n * 8 == 4096
        self.pages.append(pa)
        return self.memory.words(pa, n).copy()


def no_few(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(addresses_module, "FEW", 0)


def small_chunks(patch: pytest.MonkeyPatch) -> None:
    no_few(patch)
    patch.setattr(regions_module, "ALIKE", 0)
    for module in (addresses_module, regions_module):
        patch.setattr(module, "CHUNK", 7)


def colliding(patch: pytest.MonkeyPatch) -> None:
    no_few(patch)
    patch.setattr(regions_module, "ALIKE", 0)
    patch.setattr(classes_module, "_SPREAD", np.uint64(1 << 46))  # few different slots


def far_apart(patch: pytest.MonkeyPatch) -> None:
    no_few(patch)
    patch.setattr(addresses_module, "SPARSE", 4)
    patch.setattr(addresses_module, "LONELY", 0)
    patch.setattr(addresses_module, "DIGIT", 4)


WAYS = {
    "few": lambda patch: None,
    "regions": no_few,
    "small chunks": small_chunks,
    "colliding": colliding,
    "far apart": far_apart,
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    WAYS[request.param](monkeypatch)
    return str(request.param)


# Random cases: any registers, tables that point at each other, descriptors sane and raw.


class Case(NamedTuple):
    memory: Memory
    regs: Registers
    vas: list[int]
    access: Access
    regime: Regime


ISLANDS = ((0x4000_0000, 1 << 20), (1 << 35, 1 << 18), (1 << 46, 1 << 18), (1 << 50, 3 << 14))
POOL = [base + at for base, size in ISLANDS for at in range(0, size, 1 << 16)]
INDICES = (0, 1, 2, 5, 511)
STAGE2_RAM = (0x8000_0000, 1 << 17)
STAGE2_TABLES = (0x8000_0000, 0x8001_0000, 0x8001_1000, 0x8001_2000)  # sixteen root tables, one of each level below


@pytest.fixture(scope="module")
def ram() -> PhysicalMemory:
    return PhysicalMemory(*ISLANDS, STAGE2_RAM)


def chance(rng: random.Random, p: float) -> int:
    return int(rng.random() < p)


def random_features(rng: random.Random) -> Features:
    f = rng.choice([*(cpu for cpu in CPUS.values() if not cpu.rme), *[CPUS["max"]] * 6])
    f = f.replace(contiguous_output=rng.random() < 0.2, contiguous_faults=rng.random() < 0.1)
    return f.replace(nt_faults=rng.random() < 0.1, at_updates=rng.random() < 0.5, txsz_faults=rng.random() < 0.5)


def random_tcr(rng: random.Random, regime: Regime) -> int:
    """Mostly sane: sizes of which every walk has its levels, sometimes anything at all."""
    if rng.random() < 0.05:
        value = rng.getrandbits(64)
    else:
        value = rng.getrandbits(64) & ~TCR_EL1.mask("EPD0", "EPD1", "E0PD0", "E0PD1", "T0SZ", "T1SZ", "TG0", "TG1")
    layout = {Regime.EL2: TCR_EL2, Regime.EL3: TCR_EL3}.get(regime, TCR_EL1)
    size = rng.choice((12, 12, 12, 16, 16, 17, 25, 28, 34, 39, 47))
    fields = {"T0SZ": size, "TG0": rng.choice((0, 0, 0, 1, 2, 3)), "DS": chance(rng, 0.5)}
    fields["IPS" if regime.has_el0 else "PS"] = rng.choice((0, 2, 5, 6, 6, 6))
    if regime.has_el0:
        fields |= {"T1SZ": rng.choice((12, 16, 20, 25, 33)), "TG1": rng.choice((0, 1, 2, 2, 3))}
        fields |= {"EPD0": chance(rng, 0.05), "EPD1": chance(rng, 0.05), "E0PD0": chance(rng, 0.1)}
    value = value & U64 if layout is TCR_EL1 else value & (1 << 44) - 1
    for name, field in fields.items():
        value = layout[name].put(value, field)
    return value


def random_ttbr(rng: random.Random) -> int:
    root = rng.choice(POOL) if rng.random() < 0.93 else rng.getrandbits(52) & -64
    return TTBR_52.pack(CnP=chance(rng, 0.5), BADDR=root, ASID=rng.getrandbits(16))


def random_registers(rng: random.Random, regime: Regime) -> Registers:
    el = regime.el
    anything = ("MAIR", "MAIR2", "PIR", "POR")
    values = {f"{name}_EL{el}": rng.getrandbits(64) for name in anything}
    if rng.random() < 0.3:
        values[f"PIR_EL{el}"] = U64 // 15 * 5  # every PIIndex grants read and write
    values |= {"POR_EL0": rng.getrandbits(64), f"TCR_EL{el}": random_tcr(rng, regime)}
    values[f"TTBR0_EL{el}"] = random_ttbr(rng)
    if regime.has_el0:
        values |= {f"TTBR1_EL{el}": random_ttbr(rng), f"PIRE0_EL{el}": rng.getrandbits(64)}
    bits = rng.getrandbits(64) & SCTLR_EL1.mask("C", "I", "WXN", "EPAN", "CMOW")
    values[f"SCTLR_EL{el}"] = bits | SCTLR_EL1.pack(M=chance(rng, 0.95), EE=chance(rng, 0.15))
    if el < 3:
        names = ("PIE", "POE", "E0POE", "AIE", "HAFT")
        values[f"TCR2_EL{el}"] = TCR2.pack(**{name: chance(rng, 0.3) for name in names})
    host = regime is Regime.EL20
    values["HCR_EL2"] = HCR_EL2.pack(RW=1, E2H=int(host), TGE=host and chance(rng, 0.5), DC=chance(rng, 0.02))
    values["SCR_EL3"] = SCR_EL3.pack(NS=chance(rng, 0.7), RW=1, TCR2En=chance(rng, 0.9))
    values |= {"PAN": chance(rng, 0.5), "UAO": chance(rng, 0.2)}
    values |= random_stage2(rng) if regime is Regime.EL10 and rng.random() < 0.3 else {}
    return Registers(random_features(rng), **values)


def random_stage2(rng: random.Random) -> dict[str, int]:
    """Registers of a stage 2 that `fill_stage2` fills: 52-bit IPAs by the 4K granule, from level 0 on."""
    hcr = {name: chance(rng, 0.3) for name in ("FWB", "PTW", "CD", "ID")}
    vtcr = VTCR_EL2.pack(
        T0SZ=12, SL0=2, PS=6, DS=1, SH0=3, HA=chance(rng, 0.6), HD=chance(rng, 0.5), HAFT=chance(rng, 0.3)
    )
    sctlr = SCTLR_EL1.pack(EE=chance(rng, 0.2))
    hcr_el2 = HCR_EL2.pack(RW=1, VM=1, DC=chance(rng, 0.1), **hcr)
    return {"HCR_EL2": hcr_el2, "VTCR_EL2": vtcr, "VTTBR_EL2": STAGE2_TABLES[0], "SCTLR_EL2": sctlr}


def fill_stage2(rng: random.Random, memory: PhysicalMemory, big_endian: bool) -> None:
    """An identity map of everything with attributes at random: blocks, and pages around the first tables."""
    fmt, (root, gibs, blocks, pages) = Format(Granule.K4, ds=True, stage2=True), STAGE2_TABLES

    def store(table: int, index: int, word: int) -> None:
        memory.store(table + 8 * index, int.from_bytes(word.to_bytes(8, "big"), "little") if big_endian else word)

    def leaf(level: int, pa: int) -> int:
        page = {"TYPE": 1} if level == 3 else {"TYPE": 0}
        fields = {
            "S2AP": 3 if rng.random() < 0.8 else rng.randrange(4),
            "XN": rng.randrange(4),
            "DBM": chance(rng, 0.5),
        }
        fields |= {"MemAttr": rng.choice((5, 6, 7, 15)), "AF": chance(rng, 0.8), "VALID": chance(rng, 0.95)}
        return fmt.leaf(level).pack(OA=pa, **page, **fields)

    for i in range(512):  # sixteen tables in a row: four bits more than a table has
        store(pages, i, leaf(3, ISLANDS[0][0] + (i << 12)))
        store(blocks, i, leaf(2, ISLANDS[0][0] + (i << 21)))
        store(gibs, i, leaf(1, i << 30))
    for i in range(8192):
        store(root, i, leaf(0, i << 39)) if i % 512 == 0 or i < 512 else None
    table = fmt.table(2)
    store(blocks, 0, table.pack(VALID=1, TYPE=1, TA=pages, AF=chance(rng, 0.5)))
    store(gibs, 1, table.pack(VALID=1, TYPE=1, TA=blocks, AF=chance(rng, 0.5)))
    store(root, 0, table.pack(VALID=1, TYPE=1, TA=gibs, AF=chance(rng, 0.5)))


def random_word(rng: random.Random) -> int:
    """A descriptor that may stand at any level: bits [1:0] = 3 is a table above level 3, a page at level 3."""
    kind = rng.random()
    if kind < 0.1:
        return rng.getrandbits(64)
    if kind < 0.18:
        return rng.getrandbits(64) & ~1
    junk = rng.getrandbits(64) & rng.getrandbits(64) & rng.choice((0, U64, 0xF8FF << 48, 0xFFC))
    low = 3 if kind < 0.8 else 1
    address = rng.choice(POOL) if kind < 0.75 else rng.getrandbits(52) & -4096
    high = Format(Granule.K4, ds=True).table(2)["TA"].put(0, address) if kind < 0.25 else address & (1 << 48) - 1
    return junk & ~3 | high | low | (0x400 if rng.random() < 0.8 else 0)


def random_va(rng: random.Random, halves: list[WalkParams]) -> int:
    if rng.random() < 0.05:
        return rng.getrandbits(64)
    p = rng.choice(halves)
    va = rng.getrandbits(p.fmt.granule.page_shift)
    for _, shift, mask in p.levels:
        va |= (rng.choice(INDICES) & mask) << shift
    va |= p.half_base
    if rng.random() < 0.1:
        va ^= rng.getrandbits(8) << 56  # a tag
    return va


def fill(rng: random.Random, memory: PhysicalMemory, big_endian: bool) -> None:
    tables = rng.sample(POOL, 8) + POOL[:4]
    for table in POOL:
        memory.words(table, 1 << 11)[:520] = 0
    for table in tables:
        for index in INDICES:
            word = random_word(rng)
            memory.store(table + 8 * index, int.from_bytes(word.to_bytes(8, "big"), "little") if big_endian else word)


def random_access(rng: random.Random, regime: Regime) -> Access:
    el = rng.choice((0, regime.el)) if regime.has_el0 else regime.el
    pan = rng.choice((None, None, True, False))
    type = rng.choice(list(AccessType))
    return Access(type, el, unprivileged=rng.random() < 0.1, aligned=rng.random() < 0.9, pan=pan)


def random_case(rng: random.Random, memory: PhysicalMemory, n: int = 30) -> Case:
    regime = rng.choice((Regime.EL10, Regime.EL10, Regime.EL10, Regime.EL20, Regime.EL2, Regime.EL3))
    regs = random_registers(rng, regime)
    halves = [WalkParams.of(regs, regime, va) for va in ((0, U64) if regime.has_el0 else (0,))]
    fill(rng, memory, halves[0].big_endian)
    if halves[0].through_stage2:
        fill_stage2(rng, memory, Stage2Params.of(regs).big_endian)
    vas = [random_va(rng, halves) for _ in range(n)]
    return Case(memory, regs, vas, random_access(rng, regime), regime)


def many_of(case: Case, memory: Memory | None = None, **options: bool) -> Many:
    vas = np.array(case.vas, np.uint64)
    return translate_many(memory or case.memory, case.regs, vas, case.access, regime=case.regime, **options)


def check_random_cases(seed: int, n: int, way: str, ram: PhysicalMemory) -> None:
    for i in range(n):
        note = f"seed {seed}-{i}, {way}"
        case = random_case(random.Random(f"bulk-{way}-{seed}-{i}"), ram)
        assert_same(case, many_of(case), note)
        if i % 3 == 0:
            assert_same(case, many_of(case, OnlyRead(ram)), f"{note}, only read")


def test_random_trees_give_what_the_scalar_walk_gives(way: str, ram: PhysicalMemory) -> None:
    check_random_cases(0, 150, way, ram)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(1, 9))
def test_many_random_trees_give_what_the_scalar_walk_gives(seed: int, way: str, ram: PhysicalMemory) -> None:
    check_random_cases(seed, 300, way, ram)


def test_random_trees_reach_everything(ram: PhysicalMemory) -> None:
    """The random cases are worth something: every fault code of stage 1, every level, every flag occurs."""
    codes: set[int] = set()
    levels: set[int] = set()
    flags: set[int] = set()
    for i in range(1000):
        many = many_of(random_case(random.Random(f"bulk-reach-{i}"), ram))
        codes |= set(many.fault[~many.ok].tolist())
        levels |= set(many.level[many.ok].tolist())
        flags |= set(many.flags.tolist())
    translation = {0x2B, 4, 5, 6, 7}
    assert codes >= translation | {0, 1, 2, 3, 9, 10, 11, 13, 14, 15, 0x13, 0x14, 0x15, 0x16, 0x17, 0x21, 0x29}
    assert levels >= {MMU_OFF, 0, 1, 2, 3}
    assert flags >= {0, WRITE, DIRTY_BIT | WRITE, OVERLAY, OVERLAY | WRITE, NG, NS, NG | NS}


@pytest.mark.parametrize("seed", range(8))
def test_swap_makes_the_updates_of_all_walks(seed: int, way: str, ram: PhysicalMemory) -> None:
    rng = random.Random(f"bulk-swap-{seed}")
    f = CPUS["max"].replace(at_updates=True)
    while True:
        case = random_case(rng, ram)
        case = case._replace(regs=Registers(f, **case.regs.as_dict()))
        listed = many_of(case).updates
        if listed.pa.size:
            break
    before = ram.mark()
    made = many_of(case, swap=True).updates
    array = ram.mark()
    ram.restore(before)

    def swap(pa: int, old: int, new: int) -> bool:
        if ram.fetch(pa) != old:
            return False
        ram.store(pa, new)
        return True

    for va in case.vas:
        translate(ram, case.regs, va, case.access, regime=case.regime, swap=swap)
    assert [column.tolist() for column in made] == [column.tolist() for column in listed], f"seed {seed}, {way}"
    assert ram.changes(array).pa.size == 0, f"seed {seed}, {way}"
    assert ram.changes(before).pa.tolist() == listed.pa.tolist()


def test_swap_needs_memory_that_can_be_written(ram: PhysicalMemory) -> None:
    with pytest.raises(ValueError, match="OnlyRead cannot be written"):
        translate_many(OnlyRead(ram), Registers(), [0], swap=True)


# The corpora, in the operations that they have.


@pytest.mark.parametrize("name", ["at_clean", "at_edge", "access"])
def test_corpus_cases_give_what_the_scalar_walk_gives(name: str, way: str) -> None:
    rng = random.Random(name)
    for i, corpus_case in enumerate(load(CORPUS / f"{name}.jsonl.xz")):
        if i % 60:
            continue
        vas = [va for va, _ in corpus_case.queries]
        with memory_of(corpus_case) as memory:
            access = random_access(rng, Regime.EL10)
            case = Case(memory, registers_of(corpus_case), rng.sample(vas, min(40, len(vas))), access, Regime.EL10)
            assert_same(case, many_of(case), f"{corpus_case.id}, {way}")


# Built trees.

BASE = 0x4000_0000
LOW, HIGH = 0, 0xFFFF_0000_0000_0000
TG = {Granule.K4: (0, 2), Granule.K16: (2, 1), Granule.K64: (1, 3)}


def registers(granule: Granule = Granule.K4, **fields: int) -> Registers:
    tg0, tg1 = TG[granule]
    values = {"T0SZ": 16, "T1SZ": 16, "TG0": tg0, "TG1": tg1, "IPS": 5, **fields}
    return Registers(TTBR0_EL1=BASE, TTBR1_EL1=BASE, TCR_EL1=TCR_EL1.pack(**values), MAIR_EL1=0x44FF)


class Tree(NamedTuple):
    """One path of tables from the root to level 3, each at BASE + 64 KiB * its place in the path."""

    memory: PhysicalMemory
    regs: Registers
    p: WalkParams

    @classmethod
    def of(cls, granule: Granule = Granule.K4, **fields: int) -> Tree:
        memory, regs = PhysicalMemory((BASE, 8 << 16)), registers(granule, **fields)
        tree = cls(memory, regs, WalkParams.of(regs, Regime.EL10, 0))
        for i, (level, _, _) in enumerate(tree.p.levels[:-1]):
            memory.store(tree.table(level), tree.p.fmt.table(level).pack(VALID=1, TYPE=1, TA=BASE + ((i + 1) << 16)))
        return tree

    def table(self, level: int) -> int:
        return BASE + (level - self.p.start_level << 16)

    def leaf(self, level: int, entry: int, **fields: int) -> None:
        values = {"VALID": 1, "TYPE": int(level == 3), "AF": 1, **fields}
        self.memory.store(self.table(level) + 8 * entry, self.p.fmt.leaf(level).pack(**values))

    def case(self, vas: list[int], access: Access | None = None) -> Case:
        return Case(self.memory, self.regs, vas, access or Access(), Regime.EL10)


GRANULES = [(Granule.K4, 0), (Granule.K16, 0), (Granule.K64, 0), (Granule.K4, 1), (Granule.K16, 1)]


@pytest.mark.parametrize(("granule", "ds"), GRANULES, ids=lambda x: getattr(x, "label", f"ds{x}"))
def test_blocks_at_every_level_pages_and_holes(granule: Granule, ds: int, way: str) -> None:
    tree = Tree.of(granule, DS=ds, T0SZ=12 if ds else 16, IPS=6)
    p, vas, want = tree.p, [0x123], [3]
    tree.leaf(3, 0, OA=0x5555 << granule.page_shift)
    for level, shift, mask in p.levels:
        if level in p.fmt.block_levels:
            tree.leaf(level, 1, OA=3 << granule.level_shift(level))
            vas += [1 << shift, (1 << shift) + 0xABCD, (2 << shift) - 1]
            want += [level] * 3
        if mask > 2:
            vas.append(3 << shift)  # a hole at this level
    case = tree.case(vas * 3)
    many = many_of(case)
    assert_same(case, many, way)
    assert many.level[many.ok].tolist() == want * 3
    assert set(many.level[~many.ok].tolist()) == {level for level, _, mask in p.levels if mask > 2}


def test_both_halves_and_addresses_in_neither(way: str) -> None:
    tree = Tree.of()
    tree.leaf(3, 0, OA=0x7000)
    tree.leaf(2, 1, OA=0x40_0000, PXN=1)
    tagged = 0x8000_0000_0000_0000  # bit 63 set and bit 55 clear: nobody's, or with TBI0 the lower half's
    vas = [LOW, HIGH, LOW + 0x20_0040, HIGH + 0x20_0050, 1 << 48, HIGH - 1, tagged, 0xFF80_0000_0000_0000, U64]
    for names in ("", "TBI0", "TBI1", "TBI0 TBI1 TBID0", "EPD0", "EPD0 EPD1"):
        fields = dict.fromkeys(names.split(), 1)
        tcr = tree.regs.TCR_EL1 | TCR_EL1.pack(**fields)
        for access in (Access.read(), Access.fetch()):
            case = tree.case(vas, access)._replace(regs=tree.regs.replace(TCR_EL1=tcr))
            assert_same(case, many_of(case), f"{fields} {access} {way}")


def test_a_secure_walk_through_a_non_secure_table_is_not_global(way: str) -> None:
    tree = Tree.of()
    tree.leaf(3, 0, OA=0x7000)
    regs = tree.regs.replace(SCR_EL3=SCR_EL3.pack(NS=0, RW=1))
    plain = many_of(tree.case([0])._replace(regs=regs))
    root = tree.memory.fetch(BASE)
    tree.memory.store(BASE, tree.p.fmt.table(0)["NSTable"].put(root, 1))
    through = many_of(tree.case([0])._replace(regs=regs))
    assert (plain.flags.tolist(), through.flags.tolist()) == ([0], [NG | NS]), way


@pytest.mark.parametrize("fetch", [False, True])
def test_mmu_off(fetch: bool, way: str) -> None:
    memory = PhysicalMemory((BASE, 4096))
    access = Access.fetch() if fetch else Access.read()
    for sctlr in (0, SCTLR_EL1.pack(I=1, C=1)):
        for hcr in (0, HCR_EL2.pack(DC=1)):
            for fields in ({}, {"TBI0": 1}, {"TBI0": 1, "TBI1": 1, "TBID0": 1}):
                tcr = TCR_EL1.pack(**fields)
                regs = Registers(SCTLR_EL1=sctlr, HCR_EL2=hcr, TCR_EL1=tcr)
                vas = [0, 1 << 51, 1 << 52, 0xAB << 56 | 5, U64, HIGH]
                for one in (access, Access(access.type, aligned=False)):
                    case = Case(memory, regs, vas, one, Regime.EL10)
                    assert_same(case, many_of(case), f"{fields} {one} {way}")


def test_updates_are_listed_once(way: str) -> None:
    tree = Tree.of(HA=1, HD=1)
    tree.leaf(3, 0, AF=0, AP=2, DBM=1, OA=0x7000)
    tree.leaf(2, 1, AF=0, OA=0x40_0000)
    case = tree.case([8, 16, HIGH + 24, 0x20_0000, 0x30_0000, 0x1000], Access.write())
    many = many_of(case)
    assert_same(case, many, way)
    assert many.updates.pa.tolist() == [tree.table(2) + 8, tree.table(3)]


@pytest.mark.parametrize("hd", [0, 1])
def test_dirty_state_with_indirect_permissions(hd: int, way: str) -> None:
    tree = Tree.of(HA=1, HD=hd)
    regs = tree.regs.replace(TCR2_EL1=TCR2.pack(PIE=1), PIR_EL1=U64 // 15 * 5)  # every PIIndex: read, write
    tree = tree._replace(regs=regs, p=WalkParams.of(regs, Regime.EL10, 0))
    tree.leaf(3, 0, nDirty=1, OA=0x7000)
    tree.leaf(3, 1, nDirty=0, OA=0x8000)
    case = tree.case([0, 0x1000], Access.write())
    many = many_of(case)
    assert_same(case, many, way)
    assert many.ok.tolist() == [bool(hd), True]
    assert many.updates.pa.tolist() == [tree.table(3)] * hd
    assert many.flags.tolist() == [NS if hd else WRITE | DIRTY_BIT, NS]


def test_tables_that_nobody_goes_through_are_not_marked_used(way: str) -> None:
    tree = Tree.of(HA=1)
    regs = tree.regs.replace(TCR2_EL1=TCR2.pack(HAFT=1))
    table = tree.memory.fetch(tree.table(2))
    for region in (1, 2):
        tree.memory.store(tree.table(2) + 8 * region, table)
    vas = [(region << 21) + offset for region in (0, 2) for offset in range(0, 1 << 12, 16)]
    case = tree.case(vas)._replace(regs=regs)
    many = many_of(case)
    assert_same(case, many, way)
    assert many.updates.pa.tolist() == [tree.table(0), tree.table(1), tree.table(2), tree.table(2) + 16]


def test_a_descriptor_that_is_table_and_page_gets_both_changes(way: str) -> None:
    """The level 2 table is its own entry 1: entry 0 is a table for VA 0, and a clean page for VA 2 MiB."""
    tree = Tree.of(HA=1, HD=1)
    tree = tree._replace(regs=tree.regs.replace(TCR2_EL1=TCR2.pack(HAFT=1)))
    tree.leaf(3, 0, AF=1, OA=0x7000)
    both = tree.p.page.pack(tree.memory.fetch(tree.table(2)), AP=2, DBM=1)
    tree.memory.store(tree.table(2), both)
    tree.memory.store(tree.table(2) + 8, tree.p.fmt.table(2).pack(VALID=1, TYPE=1, AF=1, TA=tree.table(2)))
    case = tree.case([0, 1 << 21], Access.write())
    many = many_of(case)
    assert_same(case, many, way)
    assert many.updates.new.tolist()[-1] == tree.p.page.pack(both, AF=1, AP=0)


# The shape of the input.


def small() -> Tree:
    tree = Tree.of()
    for i in range(12):
        tree.leaf(3, i, OA=0x10_0000 + (i << 12), AttrIndx=i & 1, UXN=i >> 1 & 1)
    return tree


def test_empty_input() -> None:
    for empty in ([], np.zeros((0, 3), np.uint64), np.zeros(0, np.int64)):
        many = translate_many(small().memory, small().regs, empty)
        columns = [getattr(many, name) for name in COLUMNS] + [many.par(), many.esr(), many.aborts]
        assert {column.shape for column in columns} == {np.shape(empty)}
        assert many.updates.pa.size == 0


def test_any_shape() -> None:
    tree = small()
    vas = (np.arange(12, dtype=np.uint64) << np.uint64(12)) + np.uint64(0x123)
    flat = translate_many(tree.memory, tree.regs, vas)
    assert flat.pa.tolist() == [0x10_0123 + (i << 12) for i in range(12)]
    for shape in ((12,), (3, 4), (2, 1, 6)):
        many = translate_many(tree.memory, tree.regs, vas.reshape(shape))
        for name in COLUMNS:
            assert getattr(many, name).shape == shape
            assert getattr(many, name).reshape(-1).tolist() == getattr(flat, name).tolist()
        assert many.par().shape == shape


def test_one_address() -> None:
    tree = small()
    for va in (0x1123, np.uint64(0x1123), np.array(0x1123, np.uint64)):
        many = translate_many(tree.memory, tree.regs, va)
        assert (many.pa.shape, int(many.pa), bool(many.ok)) == ((), 0x10_1123, True)
        assert int(many.word) == translate(tree.memory, tree.regs, 0x1123).raw[-1][2]


def test_arrays_that_are_not_contiguous() -> None:
    tree = small()
    vas = np.arange(12, dtype=np.uint64) << np.uint64(12)
    want = translate_many(tree.memory, tree.regs, vas).pa
    assert translate_many(tree.memory, tree.regs, vas[::2]).pa.tolist() == want[::2].tolist()
    assert translate_many(tree.memory, tree.regs, vas[::-1]).pa.tolist() == want[::-1].tolist()
    turned = translate_many(tree.memory, tree.regs, vas.reshape(3, 4).T)
    assert turned.pa.tolist() == want.reshape(3, 4).T.tolist()
    assert turned.word.shape == (4, 3)


def test_other_integer_types() -> None:
    tree = small()
    want = translate_many(tree.memory, tree.regs, np.array([0, 0x1000], np.uint64)).pa.tolist()
    assert translate_many(tree.memory, tree.regs, [0, 0x1000]).pa.tolist() == want
    for dtype in ("i8", "u2", ">u8", "i4"):
        assert translate_many(tree.memory, tree.regs, np.array([0, 0x1000], dtype)).pa.tolist() == want
    assert translate_many(tree.memory, tree.regs, [HIGH, 0]).ok.all()


@pytest.mark.parametrize(
    ("vas", "message"),
    [
        ([0.5], "VAs of type float64: must be integers of 64 bits"),
        ([True], "VAs of type bool: must be integers"),
        (["0x1000"], "VAs of type <U6"),
        ([1 << 64], "VA 0x10000000000000000: must be 64 bits"),
        ([HIGH, -1], "VA -0x1: must be 64 bits"),
        ([HIGH, 0.5], "VAs of type float64"),
        ([HIGH, None], "VAs of type object"),
        ([0, -4096], "VA -0x1000: must be 64 bits and not negative"),
    ],
)
def test_what_is_no_address_is_refused(vas: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        translate_many(small().memory, small().regs, vas)


def test_answers_stay_when_memory_changes() -> None:
    tree = small()
    many = translate_many(tree.memory, tree.regs, [0x1000, 0x40_0000])
    word = tree.memory.fetch(tree.table(3) + 8)
    tree.memory.words(BASE, 8 << 13)[:] = 0
    assert many.word.tolist() == [word, 0]
    assert many.level.tolist() == [3, 2]


def test_another_memory_is_read_by_pages_each_once() -> None:
    tree = small()
    memory = OnlyRead(tree.memory)
    translate_many(memory, tree.regs, np.arange(0, 1 << 21, 64, dtype=np.uint64))
    assert sorted(memory.pages) == [tree.table(level) for level in range(4)]


def test_a_table_half_of_which_is_ram(way: str) -> None:
    """A 64K table of which only the first 4 KiB are RAM: the rest is an external abort."""
    tree = Tree.of(Granule.K64)
    beyond = 0x1_0000_0000
    memory = PhysicalMemory((BASE, 8 << 16), (beyond - (1 << 16), (1 << 16) + 4096))
    memory.write(BASE, tree.memory.read(BASE, 8 << 16))
    memory.store(tree.table(2), tree.p.fmt.table(2).pack(VALID=1, TYPE=1, TA=beyond))
    memory.store(beyond + 8 * 511, tree.p.fmt.leaf(3).pack(VALID=1, TYPE=1, AF=1, OA=0x9_0000))
    vas = [511 << 16, (511 << 16) + 5, 512 << 16, 510 << 16]
    for reader in (memory, OnlyRead(memory)):
        case = tree.case(vas)._replace(memory=reader)
        many = many_of(case)
        assert_same(case, many, way)
        assert many.aborts.tolist() == [False, False, True, False]


# AT instructions.


@pytest.mark.parametrize("operation", OPERATIONS)
def test_at_many_gives_what_at_gives(operation: str, ram: PhysicalMemory) -> None:
    for i in range(12):
        rng = random.Random(f"bulk-at-{operation}-{i}")
        case = random_case(rng, ram, n=12)
        regs = case.regs
        many = at_many(ram, regs, operation, np.array(case.vas, np.uint64))
        for va, par, aborts in zip(case.vas, many.par().tolist(), many.aborts.tolist(), strict=True):
            try:
                assert (at(ram, regs, operation, va), False) == (par, aborts), f"{i}: {va:#x} {regs}"
            except ExternalAbort:
                assert aborts, f"{i}: {va:#x} {regs}"


def test_at_many_refuses_what_at_refuses(ram: PhysicalMemory) -> None:
    with pytest.raises(ValueError, match="AT S1E9R: must be one of S1E0R"):
        at_many(ram, Registers(), "S1E9R", [0])


# A large map: the ways that small inputs do not take.


def large(seed: int) -> Iterator[Case]:
    """64 MiB by pages with some blocks, holes and five sorts of page; VAs in order, random, and of both halves."""
    rng = np.random.default_rng(seed)
    memory, regs = PhysicalMemory((BASE, 64 << 12), (1 << 36, 64 << 12)), registers(HA=1, HD=seed & 1)
    fmt = Format()
    table = np.uint64(fmt.table(2).pack(VALID=1, TYPE=1))
    memory.store(BASE, int(table) | BASE + 0x1000)
    memory.store(BASE + 0x1000, int(table) | BASE + 0x2000)
    values = {"VALID": 1, "TYPE": 1, "DBM": 1, "UXN": 1}
    sorts = [fmt.leaf(3).pack(**values, AF=af, AP=ap) for af, ap in ((1, 0), (1, 2), (0, 0), (1, 3))]
    for region in range(32):
        home = (1 << 36) if region % 5 == 0 else BASE + 0x3000
        at = home + (region << 12)
        kind = np.array([*sorts, 0], np.uint64)[rng.integers(0, 5, 512)]
        memory.words(at, 512)[:] = kind | np.arange(512, dtype=np.uint64) << np.uint64(12) | np.uint64(region << 21)
        aptable = np.uint64(fmt.table(2).pack(APTable=2) if region % 7 == 0 else 0)
        memory.store(BASE + 0x2000 + 8 * region, int(table | aptable) | at)
    for region in (3, 4, 17):
        memory.store(BASE + 0x2000 + 8 * region, fmt.leaf(2).pack(VALID=1, AF=1, OA=region << 21) if region != 4 else 0)
    random_vas = rng.integers(0, 66 << 20, 40_000, dtype=np.uint64)
    upper = random_vas | np.where(rng.random(40_000) < 0.5, np.uint64(HIGH), np.uint64(0))
    outside = upper ^ (rng.random(40_000) < 0.01).astype(np.uint64) << np.uint64(50)
    for vas in (np.sort(random_vas), random_vas, upper, outside):
        for access in (Access.read(), Access.write(0)):
            yield Case(memory, regs, vas.tolist(), access, Regime.EL10)


@pytest.mark.parametrize("seed", range(2))
def test_a_large_map_gives_what_the_scalar_walk_gives(seed: int) -> None:
    picked = random.Random(seed).sample(range(40_000), 600)
    for case in large(seed):
        many = many_of(case)
        rows = found(many)
        for i in picked:
            walk = translate(case.memory, case.regs, case.vas[i], case.access)
            assert rows[i] == expected(walk), f"seed {seed}: VA {case.vas[i]:#x}\n{walk}"
        few = translate_many(case.memory, case.regs, np.array(case.vas, np.uint64)[picked], case.access)
        assert set(few.updates.pa.tolist()) <= set(many.updates.pa.tolist())


@pytest.mark.parametrize("spread", [10, 1 << 12, 1 << 20, 1 << 40, U64])
def test_distinct_values_and_their_places(spread: int, way: str) -> None:
    rng = np.random.default_rng(spread & 0xFFFF)
    keys = rng.integers(0, spread, 5000, dtype=np.uint64)
    values, places = addresses_module.distinct(keys)
    assert values.tolist() == sorted(set(keys.tolist()))
    assert (values[places] == keys).all()
