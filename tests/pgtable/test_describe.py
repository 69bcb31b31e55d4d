"""Words explained. Judges: the walk (for rights), the Arm ARM's tables typed here, real oopses, binary digits.

Every layout's fields are gone through: each has a meaning, each of the 64 bits is in the map once.
"""

from __future__ import annotations

import random
import re
from itertools import product
from typing import Any

import pytest

from pgtable import Access, AccessType, Format, Granule, Kind, controls, explain, registers, syndromes, translate
from pgtable.bits import Layout
from pgtable.describe import Explanation, meaning
from pgtable.describe_registers import KNOWN, explain_register
from pgtable.faults import Fault, FaultType
from pgtable.figure import ASCII, bit_map, cells, field_name, side_by_side, text
from tests.pgtable.hand import SEED, leaf, tree
from tests.pgtable.test_bits import LOWEST, every_layout


def stage2_layouts() -> dict[str, Layout]:
    """Every layout of stage 2."""
    found = {}
    for granule, ds, fwb in product(Granule, (False, True), (False, True)):
        fmt = Format(granule, ds=ds, stage2=True, fwb=fwb)
        for level in range(LOWEST[granule], 4):
            found[f"{fmt.leaf(level).name} {ds} {fwb}"] = fmt.leaf(level)
        found[f"{fmt.table(1).name} {ds}"] = fmt.table(1)
    return found


LAYOUTS = {
    **every_layout(),
    **stage2_layouts(),
    **{
        layout.name: layout
        for m in (controls, registers, syndromes)
        for layout in vars(m).values()
        if isinstance(layout, Layout)
    },
    **{f"ESR {ec:#x}": syndromes.esr_layout(ec) for ec in range(64)},
}
PAGE = 0x00E8_0000_4000_0703  # PAGE_KERNEL


def kinds(found: Explanation) -> set[tuple[str, str]]:
    return {(finding.kind, finding.field) for finding in found.findings}


# Every field, every bit.


def test_every_field_of_every_layout_has_a_name_and_a_meaning_for_every_value() -> None:
    mute = [
        f"{name}: {field.name} = {value:#x}"
        for name, layout in LAYOUTS.items()
        for field in layout
        for value in ([*range(field.value_mask + 1)] if field.value_mask < 256 else [0, field.value_mask])
        if not field.name or not meaning(field, value)
    ]
    assert mute == []


@pytest.mark.parametrize("width", [34, 44, 66, 76, 80, 140, 200])
def test_every_bit_of_every_layout_is_in_the_map_once_under_its_name(width: int) -> None:
    rng = random.Random(f"{SEED} map {width}")
    for name, layout in LAYOUTS.items():
        word = rng.getrandbits(64)
        lines = bit_map(layout, word, width, ASCII)
        assert max(map(len, lines)) <= max(width, 54), name
        digits = "".join(re.sub(r"[^01]", "", line) for line in lines if line.startswith("  |") and line.endswith("|"))
        assert digits == f"{word:064b}", name
        drawn = "\n".join(lines)
        assert not [f.name for f in layout if field_name(f) not in drawn], name


def test_the_cells_of_a_layout_are_its_64_bits_once_from_the_top() -> None:
    for name, layout in LAYOUTS.items():
        found = [bit for cell in cells(layout) for bit in range(cell.hi, cell.lo - 1, -1)]
        assert found == list(range(63, -1, -1)), name


def test_a_cell_stands_above_its_name_and_a_split_field_says_which_bits_are_where() -> None:
    figure = bit_map(Format(ds=True).leaf(3), 0x300, 80, ASCII)
    start = next(i for i, line in enumerate(figure) if line.lstrip().startswith("31"))
    ruler, _, digits, hooks = figure[start : start + 4]
    column = digits.index("|1 1|") + 1
    label = next(line for line in figure if "OA[51:50]" in line)
    assert label.index("OA[51:50]") == column == hooks.index("|", column)
    assert ruler.index("11") == digits.index("|0|0|1 1|") + 1, "bit 11 is two bits above the field 9:8"
    names = [cell.name for cell in cells(Format(pie=True).leaf(3))]
    assert [n for n in names if n.startswith("PIIndex")] == ["PIIndex[3]", "PIIndex[2]", "PIIndex[1]", "PIIndex[0]"]
    assert {"OA[47:32]", "OA[31:12]"} <= set(re.findall(r"OA\S+", "\n".join(bit_map(Format().leaf(3), 0))))


@pytest.mark.parametrize("fmt", [Format(), Format(ds=True), Format(Granule.K64)])
def test_every_field_is_in_the_text_unless_it_is_reserved_and_empty(fmt: Format) -> None:
    word = (1 << 64) - 1 & ~fmt.leaf(3).mask(*(f.name for f in fmt.leaf(3) if f.reserved))
    found = explain(word, 3, granule=fmt.granule, ds=fmt.ds)
    shown = {line.split()[1] for line in str(found).splitlines() if re.match(r"[\d:,]+  +\w", line)}
    assert shown == {f.name for f in fmt.leaf(3) if not f.reserved}
    assert [row.field for row in found.fields] == list(fmt.leaf(3))
    assert found["UXN"].meaning == "EL0 may not execute"


# Rights: what the walk grants.

NEED = (("r", AccessType.READ), ("w", AccessType.WRITE), ("x", AccessType.FETCH))


@pytest.mark.parametrize("regime", ["EL10", "EL20", "EL2", "EL3"])
def test_rights_are_what_the_walk_grants(regime: str) -> None:
    rng = random.Random(f"{SEED} {regime}")
    el = {"EL10": 1, "EL20": 2, "EL2": 2, "EL3": 3}[regime]
    one = regime in ("EL2", "EL3")
    for _ in range(150):
        xn = {"XN": rng.getrandbits(1)} if one else {"UXN": rng.getrandbits(1), "PXN": rng.getrandbits(1)}
        limits = {"APTable": rng.choice((0, 0, 1, 2, 3)), ("XNTable" if one else "UXNTable"): rng.getrandbits(1)}
        word = leaf(0x8000_0000, AP=rng.randrange(4), DBM=rng.getrandbits(1), **xn)
        registers_ = {f"SCTLR_EL{el}": 0x1005 | rng.getrandbits(1) << 19}
        made = tree(word, regime=regime, tables={1: limits}).with_regs(**registers_)
        upper = [w for w in made.memory.values() if w != word]
        found = explain(word, 3, regime=regime, tables=upper, **registers_)
        for level in (el,) if one else (el, 0):
            if regime == "EL20" and level == 0:
                made = made.with_regs(HCR_EL2=1 << 34 | 1 << 27 | 1 << 31)
            walks = {c: translate(made.memory, made.regs, made.va, Access(type, level)).ok for c, type in NEED}
            assert found.place
            assert found.place.rights[f"EL{level}"] == "".join(c if ok else "-" for c, ok in walks.items()), (
                f"{word:#x} {limits} EL{level}"
            )


S2AP = {0: "--", 1: "r-", 2: "-w", 3: "rw"}  # Arm ARM D8.4, stage 2 data permissions
S2XN = {0b00: ("x", "x"), 0b01: ("-", "x"), 0b10: ("-", "-"), 0b11: ("x", "-")}  # XN[54:53]: EL1, EL0


@pytest.mark.parametrize(("access", "xn"), list(product(S2AP, S2XN)))
def test_stage_2_rights_are_those_of_the_arm_arm(access: int, xn: int) -> None:
    found = explain(0x4000_0000 | 0x73F | access << 6 | xn << 53, 3, stage=2)
    assert found.place
    assert found.place.rights == {"EL1": S2AP[access] + S2XN[xn][0], "EL0": S2AP[access] + S2XN[xn][1]}
    who = {("x", "x"): "EL1 and EL0 may", ("-", "x"): "EL0 may execute, EL1 may not", ("-", "-"): "neither EL1 nor EL0"}
    assert found["XN"].meaning.startswith(who.get(S2XN[xn], "EL1 may execute, EL0 may not"))


@pytest.mark.parametrize(
    ("attr", "fwb", "said"),
    [
        (0b0000, False, "Device-nGnRnE"),
        (0b0001, False, "Device-nGnRE"),
        (0b0101, False, "non-cacheable"),
        (0b1010, False, "write-through"),
        (0b1111, False, "write-back"),
        (0b0111, False, "inner write-back, outer non-cacheable"),
        (0b1100, False, "reserved"),
        (0b0001, True, "Device-nGnRE"),
        (0b0101, True, "non-cacheable, or stage 1's Device"),
        (0b0110, True, "write-back, whatever"),
        (0b0111, True, "what stage 1 says"),
        (0b0100, True, "reserved"),
        (0b1111, True, "no tag access"),
    ],
)
def test_stage_2_memory_types_are_those_of_the_arm_arm(attr: int, fwb: bool, said: str) -> None:
    found = explain(0x4000_0000 | 0x7C3 | attr << 2, 3, stage=2, fwb=fwb)
    assert said in found["MemAttr"].meaning
    assert found.facts["memory"] == found["MemAttr"].meaning


def test_a_guest_page_as_kvm_maps_it() -> None:
    found = explain(0x0000_0000_4000_07FF, 3, stage=2)
    assert found.place
    assert found.place.rights == {"EL1": "rwx", "EL0": "rwx"}
    assert (found.place.address, found.findings) == (0x4000_0000, ())
    vtcr = registers.VTCR_EL2.pack(TG0=1)
    assert "64K" in explain(0x7FF, 3, stage=2, VTCR_EL2=vtcr).title


# Findings: each word with a twin that has none of its kind.

CASES: dict[str, tuple[int, dict[str, Any], tuple[str, str], int]] = {
    # word, how it is asked for, (kind, field), bits to flip for the good twin
    "invalid": (PAGE & ~1, {"level": 3}, ("fault", "VALID"), 1),
    "reserved type": (PAGE & ~2, {"level": 3}, ("wrong", "TYPE"), 2),
    "L0 block": (0x0080_0000_0000_0701, {"level": 0}, ("wrong", "TYPE"), 2),
    "AF": (PAGE & ~0x400, {"level": 3}, ("fault", "AF"), 0x400),
    "SH": (PAGE & ~0x200, {"level": 3}, ("wrong", "SH"), 0x200),
    "beyond 48 bits": (PAGE | 1 << 48, {"level": 3}, ("wrong", "RES0_49_48"), 1 << 48),
    "beyond 48 bits, table": (0x4000_0003 | 1 << 49, {"level": 2}, ("wrong", "RES0_49_48"), 1 << 49),
    "misaligned block": (PAGE & ~2 | 1 << 17, {"level": 2}, ("wrong", "RES0_20_17"), 1 << 17),
    "OA": (PAGE | 1 << 45, {"level": 3, "TCR_EL1": 0x4_8010_0010}, ("fault", "OA"), 1 << 45),
    "contiguous": (PAGE | 1 << 52, {"level": 3, "va": 0x1000}, ("wrong", "Contiguous"), 1 << 52),
    "no such run": (PAGE & ~2 | 1 << 52, {"level": 1, "granule": "64K"}, ("wrong", "Contiguous"), 1 << 52),
    "W+X": (0x0048_0000_4000_0703, {"level": 3}, ("suspicious", "AP"), 1 << 53),
    "W+X at EL0": (0x0008_0000_4000_0F43, {"level": 3}, ("suspicious", "AP"), 1 << 54),
    "EL0 runs EL1's": (0x0028_0000_4000_0703, {"level": 3}, ("suspicious", "UXN"), 1 << 54),
    "executable device": (0x0048_0000_4000_078F, {"level": 3}, ("suspicious", "AttrIndx"), 1 << 53),
    "reserved attribute": (PAGE, {"level": 3, "MAIR_EL1": 0x01 | 0x0F}, ("wrong", "AttrIndx"), 0b001 << 2),
    "nT": (PAGE & ~2 | 1 << 16, {"level": 2}, ("suspicious", "nT"), 1 << 16),
    "clean": (PAGE | 0x80, {"level": 3}, ("note", "DBM"), 1 << 51),
    "LPA2's SH": (PAGE, {"level": 3, "ds": True}, ("suspicious", "OA"), 0x300),
    "nG at EL2": (0x0040_0000_4000_0F03, {"level": 3, "regime": "EL2"}, ("wrong", "nG"), 0x800),
    "table at 0": (0x3, {"level": 2}, ("suspicious", "TA"), 0x1000),
    "table with attributes": (PAGE, {"level": 2}, ("note", "TYPE"), 0x00E8_0000_0000_0300),
    "implicit PXN": (0x0040_0000_4000_0743, {"level": 3}, ("note", "PXN"), 1 << 53),
    "nDirty": (PAGE | 0x80, {"level": 3, "TCR2_EL1": 2}, ("note", "nDirty"), 0x80),
    "stage 2 AF": (0x4000_03FF, {"level": 3, "stage": 2}, ("fault", "AF"), 0x400),
    "stage 2 reserved": (0x4000_07F3, {"level": 3, "stage": 2}, ("wrong", "MemAttr"), 0b0011 << 2),
    "stage 2 table": (0x4000_0003 | 1 << 59, {"level": 2, "stage": 2}, ("wrong", "RES0_63_59"), 1 << 59),
    "stage 2 device": (0x4000_07C7, {"level": 3, "stage": 2}, ("suspicious", "XN"), 1 << 54),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_wrong_is_found_and_its_good_twin_is_not(name: str) -> None:
    word, asked, finding, flip = CASES[name]
    assert finding in kinds(explain(word, **asked))
    assert finding not in kinds(explain(word ^ flip, **asked))


def test_a_plain_kernel_page_has_no_finding_but_the_note_about_its_dirty_state() -> None:
    assert kinds(explain(PAGE)) == {("note", "DBM")}
    assert kinds(explain(0x0060_0000_4000_0783)) == set()


def test_a_half_that_is_switched_off_is_a_finding() -> None:
    off = {name: registers.TCR_EL1.pack(T1SZ=16, TG1=2, IPS=5, **{name: 1}) for name in ("EPD1", "E0PD1")}
    assert ("fault", "EPD") in kinds(explain(PAGE, 3, TCR_EL1=off["EPD1"]))
    assert ("note", "E0PD") in kinds(explain(PAGE, 3, TCR_EL1=off["E0PD1"]))
    assert not kinds(explain(PAGE, 3, va=0, TCR_EL1=off["EPD1"])) & {("fault", "EPD"), ("note", "E0PD")}


def test_what_registers_say_is_used() -> None:
    clean = PAGE | 0x80
    tcr = registers.TCR_EL1.pack(T1SZ=16, TG1=2, IPS=5, HA=1, HD=1)
    assert explain(clean, 3).facts["access"].startswith("EL1 r--  EL0 ---; with HD=1 EL1 rw-")
    assert explain(clean, 3, TCR_EL1=tcr).facts["access"] == "EL1 rw-  EL0 ---"
    device = explain(PAGE, 3, MAIR_EL1=0x04)
    assert device.facts["memory"] == "Device-nGnRE, outer shareable whatever SH says"
    assert not [said for said in device.assumptions if "MAIR" in said]
    assert [said for said in explain(PAGE, 3).assumptions if "MAIR_EL1 is Linux's, 0x000000040044ffff" in said]
    assert explain(0x0048_0000_4000_0703, 3, SCTLR_EL1=0x1005 | 1 << 19).facts["access"].startswith("EL1 rw-")
    assert "PAN=1" in explain(0x0060_0000_4000_0FC3, 3).facts["access"]
    both = registers.TCR_EL1.pack(T0SZ=16, T1SZ=16, TG0=1, TG1=1)
    assert [explain(PAGE, 3, va=va, TCR_EL1=both).title.split(", ")[2] for va in (0, 1 << 63 | 1 << 55)] == [
        "64K granule",
        "16K granule",
    ]
    pie = explain(PAGE, 3, TCR2_EL1=2, PIR_EL1=0x5 << 4 * 0b1110)
    assert pie["PIIndex"].value == 0b1110
    assert pie.facts["access"].startswith("EL1 rw-")


# The level.

GUESSES = [
    (0x00E8_0000_4000_0F03, {}, 3),
    (0x1800_0000_4321_0403, {}, 2),
    (0x4321_0003, {}, 2),
    (0x00E8_0000_4020_0701, {}, 2),
    (0x00F8_0000_8000_0701, {}, 1),
    (0x0000_0000_4000_07FF, {"stage": 2}, 3),
    (0x00E8_0000_4200_0701, {"granule": "16K"}, 2),
    (0x00E8_0000_6000_0701, {"granule": "64K"}, 2),
    (0x00E8_0000_4020_0F02, {}, 3),
    (0x00E8_0000_4020_0F00, {}, 2),
    (0x00E8_0000_4000_1701, {}, 2),
    (0x00E8_0080_0000_0401, {"ds": True}, 0),
    (0, {}, 3),
    (0x4000_0700, {}, 3),
]


@pytest.mark.parametrize(("word", "asked", "level"), GUESSES)
def test_the_level_is_guessed_with_a_reason_and_a_given_one_decides(
    word: int, asked: dict[str, Any], level: int
) -> None:
    found = explain(word, **asked)
    assert found.place
    assert (found.place.level, found.facts["level"][:10]) == (level, f"{level}, guessed")
    assert "(guessed)" in found.title
    given = explain(word, 2, **asked)
    assert given.place
    assert (given.place.level, given.place.reason) == (2, "")
    assert "level" not in given.facts


def test_kinds_and_addresses_of_golden_words() -> None:
    rows = [
        (0x00E8_0000_4020_0701, 2, {}, Kind.BLOCK, 0x4020_0000, 2 << 20),
        (0x1800_0000_4321_0403, 1, {}, Kind.TABLE, 0x4321_0000, 1 << 30),
        (0x00E8_0000_4000_A703, 3, {"granule": "64K"}, Kind.PAGE, 0xA_0000_4000_0000, 1 << 16),
        (0x00E8_0000_4000_0303 | 0x400, 3, {"ds": True}, Kind.PAGE, 0xC_0000_4000_0000, 1 << 12),
        (0x0000_0000_0000_0000, 3, {}, Kind.INVALID, None, 1 << 12),
    ]
    for word, level, asked, kind, address, size in rows:
        place = explain(word, level, **asked).place
        assert place
        assert (place.kind, place.address, place.size) == (kind, address, size), f"{word:#x}"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"word": 1 << 64}, "word 0x10000000000000000: must be 64 bits"),
        ({"word": -1}, "word -0x1: must be 64 bits"),
        ({"level": 4}, "level 4: the 4K granule has levels 0 to 3"),
        ({"level": -1}, "level -1: the 4K granule has levels 0 to 3"),
        ({"level": -2, "ds": True}, "level -2: the 4K granule with DS=1 has levels -1 to 3"),
        ({"level": 0, "granule": "64K"}, "level 0: the 64K granule has levels 1 to 3"),
        ({"granule": "8K"}, "granule 8K: must be 4K, 16K or 64K"),
        ({"stage": 3}, "stage 3: must be 1 or 2"),
        ({"regime": "EL1"}, "regime EL1: must be EL10, EL20, EL2, EL3"),
        ({"SCTLR_EL9": 1}, "register SCTLR_EL9 is not one"),
    ],
)
def test_what_cannot_be_is_refused_by_name_value_and_limit(asked: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        explain(**{"word": 3} | asked)
    with pytest.raises(ValueError, match="register FOO: there is none, only CONTEXTIDR_EL1, "):
        explain_register("FOO", 0)


# Registers and syndromes.

# "Mem abort info" of oopses that people posted: ESR, its class, fault, WnR.
OOPSES = [
    (0x9600_0047, "DABT (current EL)", "level 3 translation fault", 1),
    (0x9600_0004, "DABT (current EL)", "level 0 translation fault", 0),
    (0x9600_0006, "DABT (current EL)", "level 2 translation fault", 0),
    (0x9600_004F, "DABT (current EL)", "level 3 permission fault", 1),
    (0x9600_0021, "DABT (current EL)", "alignment fault", 0),
    (0x8600_000F, "IABT (current EL)", "level 3 permission fault", None),
    (0x8600_0004, "IABT (current EL)", "level 0 translation fault", None),
    (0x9200_0046, "DABT (lower EL)", "level 2 translation fault", 1),
]


@pytest.mark.parametrize(("esr", "cls", "fault", "write"), OOPSES)
def test_aborts_say_what_the_kernel_says_of_them(esr: int, cls: str, fault: str, write: int | None) -> None:
    found = explain_register("ESR_EL1", esr)
    said = found.facts["what"]
    level = re.match(r"level (\d) (.*)", fault)
    assert (f"{level[2]}, level {level[1]}" if level else fault) in said
    who = {None: "an instruction fetch", 0: "a read", 1: "a write"}[write]
    assert said.startswith(f"{who} by {'EL1' if 'current' in cls else 'a level below EL1'}")
    assert found.facts["FAR_EL1"] == f"is the VA of the {'fetch' if write is None else 'access'}"


def test_every_fault_that_the_model_encodes_is_read_back() -> None:
    for type, level in product(FaultType, range(4)):
        fault = Fault(type, level, write=True)
        esr = explain_register("ESR_EL1", fault.esr(Access.write()))
        assert str(fault) in esr.facts["what"]
        assert esr.facts["what"].startswith("a write by EL1")
        assert str(fault) in explain_register("PAR_EL1", fault.par()).facts["what"]
        assert str(fault) in explain_register("ESR_EL1", fault.esr(Access.fetch())).facts["what"]
    s1ptw = explain_register("ESR_EL2", Fault(FaultType.TRANSLATION, 2, s1ptw=True).esr(Access.read(), target_el=2))
    assert "stage 1's tables were read" in s1ptw.facts["what"]
    assert "HPFAR_EL2" in s1ptw.facts["FAR_EL2"]
    at = explain_register("ESR_EL1", Fault(FaultType.TRANSLATION, 2).esr(Access(AccessType.AT_READ)))
    assert at.facts["what"].startswith("a cache maintenance or AT instruction")


def test_far_is_said_to_be_worth_nothing_where_it_is() -> None:
    assert "not valid" in explain_register("ESR_EL1", 0x9600_0410).facts["FAR_EL1"]
    assert "says nothing" in explain_register("ESR_EL1", 0xF200_0800).facts["FAR_EL1"]
    assert "misaligned PC" in explain_register("ESR_EL1", 0x22 << 26).facts["FAR_EL1"]


def test_far_is_taken_apart_for_the_granule() -> None:
    va = 0xFFFF_8000_1234_5678
    found = explain_register("ESR_EL1", 0x9600_0047, far=va)
    assert found.facts["entries"].startswith("L0[256] L1[0] L2[145] L3[325], offset 0x678 ")
    assert "upper half" in found.facts["address"]
    for granule, levels in ((Granule.K16, range(4)), (Granule.K64, range(1, 4))):
        entries = explain_register("FAR_EL1", va, granule=granule).facts["entries"]
        indexes = {int(a): int(b) for a, b in re.findall(r"L(\d)\[(\d+)\]", entries)}
        low = va & (1 << 48) - 1
        assert set(indexes) == set(levels)
        assert sum(i << granule.level_shift(n) for n, i in indexes.items()) == low & -granule.page_size
    assert "0x00ff: a tag" in explain_register("FAR_EL1", 0x00FF_0000_0000_0000).facts["address"]


def test_a_trapped_register_is_named() -> None:
    esr = syndromes.esr_layout(0x18).pack(EC=0x18, Op0=3, Op1=0, CRn=2, CRm=0, Op2=2, Rt=7, Direction=1)
    assert explain_register("ESR_EL2", esr).facts["access"] == "MRS x7, S3_0_C2_C0_2"


def test_par_of_a_translation() -> None:
    found = explain_register("PAR_EL1", 0xFF00_0000_4800_0B80)
    assert found.facts["what"] == "translated: PA 0x48000000 (bits 11:0 are the VA's)"
    assert found.facts["memory"] == "Normal write-back read/write-allocate, inner shareable"
    assert "outer shareable" in explain_register("PAR_EL1", 0x0400_0000_0900_0B80).facts["memory"]


def test_every_register_is_explained_whatever_its_value() -> None:
    rng = random.Random(f"{SEED} registers")
    for name in KNOWN:
        for value in (0, (1 << 64) - 1, *(rng.getrandbits(64) for _ in range(20))):
            found = explain_register(name, value, far=rng.getrandbits(64), e2h=bool(value & 1), wide=bool(value & 2))
            assert all(row.meaning for row in found.fields), name
            assert f"{value:#018x}" in str(found)


def test_every_word_is_explained_in_every_form() -> None:
    rng = random.Random(f"{SEED} words")
    for granule, ds, stage, regime in product(Granule, (False, True), (1, 2), ("EL10", "EL20", "EL2", "EL3")):
        for _ in range(25):
            word = rng.getrandbits(64) & rng.choice((rng.getrandbits(64), ~0))
            found = explain(word, granule=granule, ds=ds, stage=stage, regime=regime, va=rng.getrandbits(64))
            assert all(row.meaning for row in found.fields)
            assert max(len(line) for line in str(found).splitlines()) <= 80


REGISTERS = [
    ("TCR_EL1", 16, "T0SZ", "48-bit range: from 0 to 0x0000ffffffffffff"),
    ("TCR_EL1", 25 << 16, "T1SZ", "39-bit range: from 0xffffff8000000000 up"),
    ("TCR_EL1", 1 << 39, "HA", "hardware sets the access flag"),
    ("TCR_EL1", 0, "HA", "not: hardware sets the access flag"),
    ("MAIR_EL1", 0x4_0044_FFFF, "Attr2", "Normal non-cacheable"),
    ("MAIR_EL1", 0x4_0044_FFFF, "Attr4", "Device-nGnRE"),
    ("PIR_EL1", 0x6, "Perm0", "rwx, not executable while writable"),
    ("PIR_EL1", 0xA, "Perm0", "r-x, overlays do not apply"),
    ("PIR_EL1", 0x4, "Perm0", "reserved: nothing"),
    ("POR_EL0", 0x7, "Perm0", "rwx remains"),
    ("VTCR_EL2", 24, "T0SZ", "40-bit IPA range"),
    ("HCR_EL2", 1 << 34, "E2H", "EL2 is a host (VHE)"),
    ("SCTLR_EL3", 1 << 19, "WXN", "writable implies execute-never"),
    ("VTTBR_EL2", 3 << 48, "VMID", "virtual machine identifier"),
]


@pytest.mark.parametrize(("name", "value", "field", "said"), REGISTERS)
def test_register_fields_say_what_their_values_mean(name: str, value: int, field: str, said: str) -> None:
    assert explain_register(name, value)[field].meaning == said


def test_registers_have_their_findings() -> None:
    assert ("wrong", "RES0_63_62") in kinds(explain_register("TCR_EL1", 1 << 63))
    assert ("wrong", "HD") in kinds(explain_register("TCR_EL1", 16 << 16 | 16 | 1 << 40))
    assert ("wrong", "TG0") in kinds(explain_register("TCR_EL1", 3 << 14))
    assert ("wrong", "T0SZ") in kinds(explain_register("TCR_EL1", 3))
    assert ("wrong", "Attr1") in kinds(explain_register("MAIR_EL1", 0x0F00))
    assert kinds(explain_register("TCR_EL1", registers.TCR_EL1.pack(T0SZ=16, T1SZ=16, TG1=2))) == set()
    assert explain_register("TCR_EL2", 1 << 16, e2h=True).layout is registers.TCR_EL1


# Text.


def test_words_side_by_side_mark_what_differs() -> None:
    shown = side_by_side([explain(PAGE, 3), explain(PAGE | 0x80, 3), explain(PAGE | 0x4000_0000, 3)]).splitlines()
    marked = [line.split()[2] for line in shown if line.startswith("* ")]
    assert marked == ["AP"]
    assert "AP          a: EL1 read/write, EL0 none; b: EL1 read-only, EL0 none; c: EL1" in " ".join(shown)
    assert side_by_side([explain(PAGE), explain(PAGE)]).endswith("no field differs")


def test_text_fits_the_width_and_paint_changes_no_width() -> None:
    found = explain(PAGE | 1 << 52 | 1 << 48)
    for width in (40, 60, 80, 132, 200):
        assert max(map(len, text(found, width).splitlines())) <= max(width, 54)
    painted = text(found, paint=lambda style, piece: f"<{style}>{piece}</>")
    assert re.sub(r"</>|<\w+>", "", painted) == text(found)
    assert {"<head>", "<one>", "<wrong>", "<note>"} <= set(re.findall(r"<\w+>", painted))
    assert text(found, box=ASCII).isascii()


GOLDEN = """\
0x00c8000040000703  page, level 3, 4K granule, stage 1 of EL1&0

   63      59      55      51      47      43      39      35
  +-+-----+-+-------+-+-+-+-+-+---+-------------------------------+
  |0|0 0 0|0|0 0 0 1|1|0|0|1|0|0 0|0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0|
  +|+|----+|+|------+|+|+|+|+|+|--+|------------------------------+
   | |     | |       | | | | | |   OA[47:32]
   | |     | |       | | | | | RES0
   | |     | |       | | | | GP
   | |     | |       | | | DBM
   | |     | |       | | Contiguous
   | |     | |       | PXN
   | |     | ignored UXN
   | |     ignored
   | ignored
   ignored
   31      27      23      19      15      11      7       3
  +---------------------------------------+-+-+---+---+-+-----+-+-+
  |0 1 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0|0|1|1 1|0 0|0|0 0 0|1|1|
  +|--------------------------------------+|+|+|--+|--+|+|----+|+|+
   |                                       | | |   |   | |     | VALID
   |                                       | | |   |   | |     TYPE
   |                                       | | |   |   | AttrIndx
   |                                       | | SH  AP  NS
   |                                       | AF
   OA[31:12]                               nG

maps      4K at PA 0x0000000040000000
access    EL1 rwx  EL0 ---
memory    Normal write-back read/write-allocate, inner shareable

58:55  ignored     0x1         for software
54     UXN         1           EL0 may not execute
53     PXN         0           privileged code may execute
52     Contiguous  0           on its own
51     DBM         1           hardware may make it writable at a write (TCR.HD)
50     GP          0           not guarded
47:12  OA          0x40000000  output address
11     nG          0           global: the same for every ASID
10     AF          1           accessed
9:8    SH          0x3         inner shareable
7:6    AP          0x0         EL1 read/write, EL0 none
5      NS          0           no effect outside Secure state
4:2    AttrIndx    0x0         Attr0 of MAIR_EL1: Normal write-back
                               read/write-allocate
1      TYPE        1           page
0      VALID       1           valid

note        DBM=1 and AP[2]=0: writable and dirty; DBM changes nothing until
            AP[2] is 1
suspicious  EL1 can write and execute it

assumed   4K granule; DS=0 (48-bit addresses); MAIR_EL1 is Linux's,
          0x000000040044ffff; no limits from tables above; WXN=0; TCR.HA=0, HD=0"""


def test_golden_text_of_a_page() -> None:
    assert text(explain(0x00C8_0000_4000_0703, 3), box=ASCII) == GOLDEN
