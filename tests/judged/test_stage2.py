"""Stage 2 and both stages against QEMU's stored answers; and that breaking a rule of either is noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from emu.judge.corpus import Case, load
from emu.judge.verdict import PATHS, Tally, judge_case
from pgtable import (
    Access,
    Fault,
    FaultType,
    Granule,
    PhysicalMemory,
    Registers,
    combine,
    nested,
    stage2,
    stage2_permissions,
    translate,
)
from pgtable.nested import NestedWalk, translate_nested
from pgtable.registers import HCR_EL2, VTCR_EL2
from pgtable.stage2 import Stage2Params
from pgtable.stage2_permissions import READ

CORPUS = Path(__file__).parent / "corpus"
KINDS = ("s2-only", "s1s2", "s2")
EDGE = {"T1": 6, "T5": 8, "T7": 130, "T8": 85, "T9": 40, "T10": 20, "T11": 3}  # docs/judges.md


def cases(name: str) -> Iterator[Case]:
    """The stage 2 cases of a corpus."""
    return (case for case in load(CORPUS / f"{name}.jsonl.xz") if case.kind in KINDS)


def judged(name: str, *paths: str) -> dict[str, Tally]:
    """What is judged of a corpus, by kind."""
    tallies: dict[str, Tally] = {}
    for case in cases(name):
        judge_case(case, tallies.setdefault(case.kind, Tally(case.kind)), paths)
    return tallies


def rules(tallies: dict[str, Tally]) -> dict[str, int]:
    """How often each known fault of the judge was met."""
    return dict(sum((tally.known for tally in tallies.values()), Counter()))


@pytest.mark.parametrize("name", ["at_clean", "access"])
def test_every_answer_agrees(name: str) -> None:
    """33,600 AT instructions; 16,172 accesses with ESR_EL2, FAR_EL2, HPFAR_EL2; every word that hardware changed."""
    found = judged(name, *PATHS)
    queries = {"s2-only": 16_800, "s1s2": 16_800} if name == "at_clean" else {"s2": 16_172}
    assert {kind: tally.agree for kind, tally in found.items()} == queries
    assert not any(tally.failed for tally in found.values())


def test_every_difference_at_the_edges_is_explained() -> None:
    found = judged("at_edge", *PATHS)
    assert rules(found) == EDGE
    assert not any(tally.failed for tally in found.values())


# broken rules

Break = Callable[[pytest.MonkeyPatch], None]


def _params(**changes: Callable[[Stage2Params], Any]) -> Break:
    """Stage 2's parameters read otherwise."""

    def breaks(patch: pytest.MonkeyPatch) -> None:
        read = Stage2Params._read.__func__  # type: ignore[attr-defined]

        def other(cls: type[Stage2Params], regs: Registers, ns: bool) -> Stage2Params:
            p = read(cls, regs, ns)
            return replace(p, **{name: change(p) for name, change in changes.items()})

        patch.setattr(Stage2Params, "_read", classmethod(other))

    return breaks


def _set(where: Any, name: str, value: Any) -> Break:
    return lambda patch: patch.setattr(where, name, value, raising=name != "min")


def _in_leaf(field: str, value: int) -> Break:
    """A field of leaves is taken for `value`."""

    def breaks(patch: pytest.MonkeyPatch) -> None:
        right = stage2.base
        patch.setattr(stage2, "base", lambda p, word: right(p, p.page[field].put(word, value)))

    return breaks


def _fault(**changes: Any) -> Break:
    right = stage2._fault

    def other(*args: Any, **more: Any) -> Any:
        return right(*args, **more)._replace(**changes)

    return _set(stage2, "_fault", other)


AT, REAL = ("at_clean", "at_edge"), ("access",)
MUTANTS: dict[str, tuple[Break, tuple[str, ...]]] = {
    "S2AP is not looked at": (_in_leaf("S2AP", 3), AT),
    "S2AP[0] alone decides": (
        _set(stage2, "needs", lambda access, s1ptw: READ),
        AT,
    ),
    "XN is not looked at": (_in_leaf("XN", 0), REAL),
    "XN[0] is not looked at": (
        _set(stage2_permissions, "_EXECUTE", {0: 12, 1: 12, 2: 0, 3: 0}),
        REAL,
    ),
    "EL0 and EL1 exchanged in XN": (_set(stage2_permissions, "_EXECUTE", {0: 12, 1: 4, 2: 0, 3: 8}), REAL),
    "FWB is off": (_params(fwb=lambda p: False), AT),
    "FWB is on": (_params(fwb=lambda p: True), AT),
    "one root table only": (_set(Stage2Params, "levels", property(lambda p: _one_table(p))), AT),
    "at most eight root tables": (_set(stage2, "CONCATENATED", 3), AT),
    "the IPA has no range": (
        lambda patch: patch.setattr(nested, "stage2_walk", _any_range(stage2.stage2_walk)),
        AT,
    ),
    "S1PTW is not reported": (_fault(s1ptw=False), AT),
    "the fault is stage 1's": (_fault(stage=1), AT),
    "the level is stage 2's root": (_fault(level=0), AT),
    "PTW is off": (_params(ptw=lambda p: False), AT),
    "AF is not looked at": (_params(ha=lambda p: True), AT),
    "HA is off": (_params(ha=lambda p: False), AT),
    "HD is off": (_params(hd=lambda p: False), AT),
    "PS has no meaning": (_params(ps_bits=lambda p: 52), AT),
    "tables are in plain order": (_params(big_endian=lambda p: not p.big_endian), AT),
    "52-bit VTTBR": (_params(wide=lambda p: not p.wide), AT),
    "stage 2's type is not looked at": (_set(nested, "combined", lambda attr, memattr, **_: attr), AT),
    "the stronger type wins": (_set(combine, "min", max), AT),
    "shareability is stage 1's": (_set(nested, "combined_sh", lambda sh, sh2, attr: sh), AT),
    "Device and non-cacheable keep theirs": (_set(combine, "FORCED_OUTER", (False,) * 256), AT),
    "HPFAR_EL2 has the VA": (_set(NestedWalk, "ipa", property(lambda w: (w.va ^ 0x1000) % (1 << 52))), REAL),
    "HPFAR_EL2 is shifted by 8": (_set(NestedWalk, "hpfar", property(lambda w: (w.ipa or 0) >> 8)), REAL),
}


def _one_table(p: Stage2Params) -> tuple[tuple[int, int, int], ...]:
    granule = p.fmt.granule
    mask = (1 << granule.stride) - 1
    return tuple((level, granule.level_shift(level), mask) for level in range(p.start_level, 4))


def _any_range(right: Callable[..., Any]) -> Callable[..., Any]:
    def other(fetch: Any, p: Stage2Params, ipa: int, access: Access, **more: Any) -> Any:
        return right(fetch, p, ipa & (1 << p.ia_bits) - 1, access, **more)

    return other


@pytest.mark.full
@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_rule_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By an answer that nothing explains, or by counts of what is explained that are not the stored ones."""
    breaks, corpora = MUTANTS[name]
    breaks(monkeypatch)
    for corpus in corpora:
        found = judged(corpus, "scalar")
        if any(tally.disagree for tally in found.values()) or (corpus == "at_edge" and rules(found) != EDGE):
            return
    raise AssertionError(f"{name}: nobody noticed")


# by hand: what the corpora do not have


def machine(**registers: int) -> tuple[PhysicalMemory, Registers]:
    """RAM whose stage 2 maps the first GiB of IPAs to the same PAs by one block, write-back; stage 1 is off."""
    memory = PhysicalMemory((0x4000_0000, 1 << 20))
    memory.store(0x4000_0000 + 8, 1 << 30 | 0x7FD)
    vtcr = VTCR_EL2.pack(T0SZ=25, SL0=1, PS=2, SH0=3)
    values = {
        "HCR_EL2": HCR_EL2.pack(VM=1, RW=1),
        "VTCR_EL2": vtcr,
        "VTTBR_EL2": 0x4000_0000,
        "SCTLR_EL1": 0,
    } | registers
    return memory, Registers(**values)


def test_a_block_of_stage_2() -> None:
    memory, regs = machine()
    found = translate_nested(memory, regs, 0x4001_2345)
    assert (found.pa, found.ipa, found.hpfar) == (0x4001_2345, 0x4001_2345, 0)
    missing = translate_nested(memory, regs, 0x8001_2345)
    assert missing.fault == Fault(FaultType.TRANSLATION, 1, 2, cause="descriptor")
    assert missing.hpfar == 0x80012 << 4
    assert "IPA 0x80012345" in str(missing)
    assert "translation fault, level 1 (stage 2)" in str(missing)


def test_stage_2_off_is_stage_1_alone() -> None:
    memory, regs = machine(HCR_EL2=HCR_EL2.pack(RW=1))
    access = Access.read(el=1)
    assert translate_nested(memory, regs, 0x1234).result == translate(memory, regs, 0x1234, access).result


def test_dc_alone_turns_stage_2_on() -> None:
    """HCR_EL2.DC behaves as if VM were set (Arm ARM D19.2, HCR_EL2.DC)."""
    memory, regs = machine(HCR_EL2=HCR_EL2.pack(DC=1, RW=1))
    assert translate_nested(memory, regs, 0x8000_0000).fault


def test_a_host_has_no_stage_2() -> None:
    _, regs = machine(HCR_EL2=HCR_EL2.pack(VM=1, E2H=1, TGE=1))
    assert not Stage2Params.of(regs).on


def test_cd_makes_stage_2_non_cacheable_for_data_and_id_for_fetches() -> None:
    for name, access, other in (
        ("CD", Access.read(el=1), Access.fetch(el=1)),
        ("ID", Access.fetch(el=1), Access.read(el=1)),
    ):
        memory, regs = machine(HCR_EL2=HCR_EL2.pack(VM=1, DC=1, RW=1, **{name: 1}))
        attributes = [translate_nested(memory, regs, 0x4000_0000, how).result for how in (access, other)]
        assert [found.attr for found in attributes] == [0x44, 0xFF]  # type: ignore[union-attr]


def test_root_tables_are_concatenated() -> None:
    """T0SZ = 21 with SL0 = 1: 43 bits of IPA, sixteen level 1 tables of 4K."""
    _, regs = machine(VTCR_EL2=VTCR_EL2.pack(T0SZ=21, SL0=1, PS=5))
    p = Stage2Params.of(regs)
    assert (p.fmt.granule, p.start_level, p.root_tables, p.consistent) == (Granule.K4, 1, 16, True)
    assert not replace(p, t0sz=20).consistent


@pytest.mark.parametrize(
    ("granule", "ds", "t0sz", "sl0", "sl2", "level"),
    [
        (0, 0, 34, 0, 0, 2),
        (0, 0, 25, 1, 0, 1),
        (0, 0, 16, 2, 0, 0),
        (0, 0, 43, 3, 0, 3),  # FEAT_TTST
        (0, 1, 12, 0, 1, -1),
        (0, 1, 12, 1, 1, None),  # SL2 goes with SL0 = 0
        (2, 0, 40, 0, 0, 3),
        (2, 0, 28, 1, 0, 2),
        (2, 0, 17, 2, 0, 1),
        (2, 1, 12, 3, 0, 0),
        (2, 0, 16, 3, 0, None),  # without DS
        (1, 0, 36, 0, 0, 3),
        (1, 0, 22, 1, 0, 2),
        (1, 0, 12, 2, 0, 1),
        (1, 0, 12, 3, 0, None),
        (0, 0, 15, 2, 0, None),  # 49 bits without DS
        (0, 0, 49, 3, 0, None),  # more than 48
        (0, 0, 20, 1, 0, None),  # 32 root tables
        (0, 0, 33, 1, 0, 1),  # a root of two descriptors
        (0, 0, 34, 1, 0, None),  # of one: level 2 it must be
    ],
)
def test_root_levels(granule: int, ds: int, t0sz: int, sl0: int, sl2: int, level: int | None) -> None:
    """By VTCR_EL2.{TG0, DS, T0SZ, SL0, SL2}; None: a translation fault at level 0 (S2InvalidSL, S2InconsistentSL)."""
    vtcr = VTCR_EL2.pack(TG0=granule, DS=ds, T0SZ=t0sz, SL0=sl0, SL2=sl2, PS=6)
    memory, regs = machine(VTCR_EL2=vtcr)
    found = translate_nested(memory, regs, 0).fault
    assert found
    assert (found.cause in ("T0SZ", "SL0")) == (level is None)
    if level is not None:
        assert Stage2Params.of(regs).start_level == found.level == level


def test_an_update_of_a_stage_1_descriptor_needs_write_permission_at_stage_2() -> None:
    """Hardware sets AF in a stage 1 table that stage 2 has read-only: a stage 2 permission fault with S1PTW."""
    memory, regs = machine()
    tcr = 0x5 << 32 | 1 << 39 | 25 | 3 << 12  # HA, T0SZ 25
    memory.store(0x4000_0000 + 8, 1 << 30 | 0x77D)  # S2AP read-only
    memory.store(0x4000_1000 + 8, 1 << 30 | 0x301)  # a block, AF = 0
    regs = regs.replace(TCR_EL1=tcr, TTBR0_EL1=0x4000_1000, SCTLR_EL1=1)

    def swap(pa: int, old: int, new: int) -> bool:
        raise AssertionError("nothing may be written")

    found = translate_nested(memory, regs, 0x4000_0000, swap=swap)
    assert found.fault
    assert (found.fault.type, found.fault.stage, found.fault.s1ptw) == (FaultType.PERMISSION, 2, True)
    assert found.hpfar == 0x40001 << 4
    assert translate_nested(memory, regs, 0x4000_0000).fault == found.fault, "what hardware would meet"


# attributes, against a restatement by cacheability classes


@pytest.mark.parametrize("fwb", [False, True])
def test_every_pair_of_attributes(fwb: bool) -> None:
    """All defined MAIR bytes under all defined MemAttr: type and cacheability as a table by hand says."""
    from pgtable.attributes import MemoryAttributes

    order = ["non-cacheable", "write-through", "write-back"]
    devices = ["Device-nGnRnE", "Device-nGnRE", "Device-nGRE", "Device-GRE"]

    def kind(text: str) -> int:
        return next(i for i, name in enumerate(order) if text.startswith(name))

    for byte in range(256):
        s1 = MemoryAttributes.of(byte)
        if s1.type == "reserved" or byte in (0x40, 0xA0, 0xF0) or (s1.type.startswith("Device") and not s1.xs):
            continue
        for memattr in (0, 1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15) if not fwb else (0, 1, 2, 3, 5, 6, 7):
            got = MemoryAttributes.of(combine.combined(byte, memattr, fwb=fwb))
            if fwb and memattr >= 5:
                forced = {5: "non-cacheable", 6: "write-back", 7: ""}[memattr]
                if memattr == 7 or (memattr == 5 and s1.type != "Normal"):
                    assert got == s1
                else:
                    assert (got.type, got.inner[: len(forced)], got.outer[: len(forced)]) == ("Normal", forced, forced)
                continue
            if memattr < 4 or s1.type != "Normal":
                limit = [devices[memattr]] if memattr < 4 else []
                limit += [s1.type] if s1.type != "Normal" else []
                assert got.type == min(limit, key=devices.index)
                continue
            for mine, theirs, most in ((got.outer, s1.outer, memattr >> 2), (got.inner, s1.inner, memattr & 3)):
                assert kind(mine) == min(kind(theirs), most - 1)
