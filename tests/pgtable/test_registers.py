"""System registers: field positions and the `Registers` container.

Judge of positions: the Arm ARM's register descriptions (D24.2), typed here as one list each.
"""

from __future__ import annotations

import copy
import json
import pickle

import pytest

from pgtable import Access, Registers, translate
from pgtable import registers as r
from pgtable.bits import Layout
from pgtable.features import CPUS
from tests.pgtable.hand import tree


def positions(text: str) -> dict[str, str]:
    """`NAME bits, NAME bits` as a dict."""
    return dict(part.split() for part in text.split(","))


POSITIONS = {
    "TCR_EL1": (
        r.TCR_EL1,
        "T0SZ 5:0, EPD0 7, IRGN0 9:8, ORGN0 11:10, SH0 13:12, TG0 15:14, T1SZ 21:16, A1 22, EPD1 23, IRGN1 25:24,"
        "ORGN1 27:26, SH1 29:28, TG1 31:30, IPS 34:32, AS 36, TBI0 37, TBI1 38, HA 39, HD 40, HPD0 41, HPD1 42,"
        "HWU0 46:43, HWU1 50:47, TBID0 51, TBID1 52, NFD0 53, NFD1 54, E0PD0 55, E0PD1 56, TCMA0 57, TCMA1 58, DS 59,"
        "MTX0 60, MTX1 61",
    ),
    "TCR_EL2": (
        r.TCR_EL2,
        "T0SZ 5:0, IRGN0 9:8, ORGN0 11:10, SH0 13:12, TG0 15:14, PS 18:16, TBI 20, HA 21, HD 22, HPD 24, HWU 28:25,"
        "TBID 29, TCMA 30, DS 32, MTX 33",
    ),
    "TCR_EL3": (
        r.TCR_EL3,
        "T0SZ 5:0, IRGN0 9:8, ORGN0 11:10, SH0 13:12, TG0 15:14, PS 18:16, TBI 20, HA 21, HD 22, HPD 24, HWU 28:25,"
        "TBID 29, TCMA 30, DS 32, MTX 33, PnCH 34, PIE 35, POE 36, AIE 37, D128 38, PTTWI 41, HAFT 42, DisCH0 43",
    ),
    "TCR2": (
        r.TCR2,
        "PnCH 0, PIE 1, E0POE 2, POE 3, AIE 4, D128 5, SKL0 7:6, SKL1 9:8, PTTWI 10, HAFT 11, AMEC0 12, AMEC1 13,"
        "DisCH0 14, DisCH1 15, A2 16, FNG0 17, FNG1 18",
    ),
    "TTBR": (r.TTBR, "CnP 0, BADDR 47:1, ASID 63:48"),
    "TTBR_52": (r.TTBR_52, "CnP 0, BADDR 47:6;5:2, ASID 63:48"),
    "MAIR": (
        r.MAIR,
        "Attr0 7:0, Attr1 15:8, Attr2 23:16, Attr3 31:24, Attr4 39:32, Attr5 47:40, Attr6 55:48, Attr7 63:56",
    ),
    "ESR": (
        r.ESR,
        "FSC 5:0, WnR 6, S1PTW 7, CM 8, EA 9, FnV 10, SET 12:11, VNCR 13, AR 14, SF 15, SRT 20:16, SSE 21, SAS 23:22,"
        "ISV 24, IL 25, EC 31:26, Xs 36:32, DirtyBit 37, Overlay 38, AssuredOnly 39, GCS 40, TagAccess 41, TnD 42,"
        "HDBSSF 43",
    ),
    "HCR_EL2": (
        r.HCR_EL2,
        "VM 0, SWIO 1, PTW 2, FMO 3, IMO 4, AMO 5, VF 6, VI 7, VSE 8, FB 9, BSU 11:10, DC 12, TWI 13,"
        "TWE 14, TID0 15, TID1 16, TID2 17, TID3 18, TSC 19, TIDCP 20, TACR 21, TSW 22, TPCP 23, TPU 24,"
        "TTLB 25, TVM 26, TGE 27, TDZ 28, HCD 29, TRVM 30, RW 31, CD 32, ID 33, E2H 34, TLOR 35, TERR 36,"
        "TEA 37, MIOCNCE 38, TME 39, APK 40, API 41, NV 42, NV1 43, AT 44, NV2 45, FWB 46, FIEN 47,"
        "GPF 48, TID4 49, TICAB 50, AMVOFFEN 51, TOCU 52, EnSCXT 53, TTLBIS 54, TTLBOS 55, ATA 56,"
        "DCT 57, TID5 58, TWEDEn 59, TWEDEL 63:60",
    ),
    "SCR_EL3": (
        r.SCR_EL3,
        "NS 0, IRQ 1, FIQ 2, EA 3, SMD 7, HCE 8, SIF 9, RW 10, ST 11, TWI 12, TWE 13, TLOR 14, TERR 15,"
        "APK 16, API 17, EEL2 18, EASE 19, NMEA 20, FIEN 21, EnSCXT 25, ATA 26, FGTEn 27, ECVEn 28,"
        "TWEDEn 29, TWEDEL 33:30, TME 34, AMVOFFEN 35, EnAS0 36, ADEn 37, HXEn 38, GCSEn 39, TRNDR 40,"
        "EnTP2 41, RCWMASKEn 42, TCR2En 43, SCTLR2En 44, PIEn 45, AIEn 46, D128En 47, GPF 48, MECEn 49,"
        "EnFPM 50, TMEA 51, TWERR 52, PFAREn 53, EnIDCP128 55, FGTEn2 59, NSE 62",
    ),
    "SCTLR_EL1": (
        r.SCTLR_EL1,
        "M 0, A 1, C 2, SA 3, SA0 4, CP15BEN 5, nAA 6, ITD 7, SED 8, UMA 9, EnRCTX 10, EOS 11, I 12,"
        "EnDB 13, DZE 14, UCT 15, nTWI 16, nTWE 18, WXN 19, TSCXT 20, IESB 21, EIS 22, SPAN 23, E0E 24,"
        "EE 25, UCI 26, EnDA 27, nTLSMD 28, LSMAOE 29, EnIB 30, EnIA 31, CMOW 32, MSCEn 33, BT0 35,"
        "BT1 36, ITFSB 37, TCF0 39:38, TCF 41:40, ATA0 42, ATA 43, DSSBS 44, TWEDEn 45, TWEDEL 49:46,"
        "TMT0 50, TMT 51, TME0 52, TME 53, EnASR 54, EnAS0 55, EnALS 56, EPAN 57, TCSO0 58, TCSO 59,"
        "EnTP2 60, NMI 61, SPINTMASK 62, TIDCP 63",
    ),
    "SCTLR_ALONE": (
        r.SCTLR_ALONE,
        "M 0, A 1, C 2, SA 3, nAA 6, EOS 11, I 12, EnDB 13, WXN 19, IESB 21, EIS 22, EE 25, EnDA 27,"
        "EnIB 30, EnIA 31, BT1 36, ITFSB 37, TCF 41:40, ATA 43, DSSBS 44, TMT 51, TME 53, TCSO 59,"
        "NMI 61, SPINTMASK 62",
    ),
    "VTCR_EL2": (
        r.VTCR_EL2,
        "T0SZ 5:0, SL0 7:6, IRGN0 9:8, ORGN0 11:10, SH0 13:12, TG0 15:14, PS 18:16, VS 19, HA 21, HD 22,"
        "HWU 28:25, NSW 29, NSA 30, DS 32, SL2 33, AssuredOnly 34, TL1 35, S2PIE 36, S2POE 37, D128 38,"
        "GCSH 40, TL0 41, HAFT 44, HDBSS 45",
    ),
    "VTTBR_EL2": (
        r.VTTBR_EL2,
        "CnP 0, BADDR 47:1, VMID 63:48",
    ),
    "CONTEXTIDR_EL1": (
        r.CONTEXTIDR_EL1,
        "PROCID 31:0",
    ),
    "PAR_OK": (r.PAR_OK, "F 0, SH 8:7, NS 9, IMPDEF 10, NSE 11, PA 51:12, ATTR 63:56"),
    "PAR_FAULT": (r.PAR_FAULT, "F 0, FST 6:1, PTW 8, S 9, AssuredOnly 12, TopLevel 13, Overlay 14, DirtyBit 15"),
}


@pytest.mark.parametrize("name", POSITIONS)
def test_every_named_field_is_where_the_arm_arm_has_it(name: str) -> None:
    layout, text = POSITIONS[name]
    found = {f.name: f.bits.replace(",", ";") for f in layout if not f.reserved}
    assert found == positions(text)


# Registers of which only some fields matter to a translation: those, at least.
SOME = {
    "SCTLR_EL1": (
        r.SCTLR_EL1,
        "M 0, A 1, C 2, I 12, WXN 19, SPAN 23, EE 25, UCI 26, nTLSMD 28, LSMAOE 29, CMOW 32, ATA0 42, ATA 43, EPAN 57",
    ),
    "HCR_EL2": (
        r.HCR_EL2,
        "VM 0, PTW 2, DC 12, TGE 27, RW 31, CD 32, ID 33, E2H 34, NV 42, NV1 43, AT 44, NV2 45, FWB 46, DCT 57",
    ),
    "SCR_EL3": (r.SCR_EL3, "NS 0, EA 3, SIF 9, RW 10, EEL2 18, TCR2En 43, SCTLR2En 44, PIEn 45, AIEn 46"),
}


@pytest.mark.parametrize("name", SOME)
def test_the_fields_that_a_translation_reads_are_where_the_arm_arm_has_them(name: str) -> None:
    layout, text = SOME[name]
    assert {n: layout[n].bits for n in positions(text)} == positions(text)


def test_par_of_a_fault_has_bit_11_as_1_and_the_rest_as_0() -> None:
    reserved = {f.bits: f.reserved for f in r.PAR_FAULT if f.reserved}
    assert reserved == {"7": "RES0", "10": "RES0", "11": "RES1", "47:16": "RES0", "63:48": "IGNORED"}


def test_permission_registers_are_sixteen_nibbles() -> None:
    assert [r.NIBBLES[f"Perm{i}"].get(0xFEDC_BA98_7654_3210) for i in range(16)] == list(range(16))


def test_a_52_bit_ttbr_holds_the_top_address_bits_in_5_2() -> None:
    assert r.TTBR_52["BADDR"].get(0x0042_0000_4000_0054 | 1) == 0x0005_0000_4000_0040
    assert r.TTBR_52["BADDR"].get(0b111100) == 0x000F_0000_0000_0000
    assert r.TTBR["BADDR"].get(0x0042_0000_4000_0055) == 0x4000_0054


@pytest.mark.parametrize(
    ("layout", "field", "value", "meaning"),
    [
        (r.TCR_EL1, "TG0", 0, "4K"),
        (r.TCR_EL1, "TG0", 1, "64K"),
        (r.TCR_EL1, "TG0", 2, "16K"),
        (r.TCR_EL1, "TG1", 1, "16K"),
        (r.TCR_EL1, "TG1", 2, "4K"),
        (r.TCR_EL1, "TG1", 3, "64K"),
        (r.TCR_EL1, "IPS", 5, "48 bits, 256 TiB"),
        (r.TCR_EL2, "PS", 6, "52 bits, 4 PiB"),
        (r.ESR, "EC", 0x25, "data abort from the same EL"),
        (r.ESR, "EC", 0x20, "instruction abort from a lower EL"),
        (r.ESR, "FSC", 0x0F, "permission fault, level 3"),
        (r.ESR, "FSC", 0x2B, "translation fault, level -1"),
        (r.ESR, "FSC", 0x13, "external abort on the walk, level -1"),
        (r.ESR, "FSC", 0x29, "address size fault, level -1"),
        (r.ESR, "FSC", 0x0B, "access flag fault, level 3"),
        (r.ESR, "FSC", 0x00, "address size fault, level 0"),
        (r.ESR, "FSC", 0x31, "unsupported atomic hardware update"),
    ],
)
def test_values_mean_what_the_arm_arm_says(layout: Layout, field: str, value: int, meaning: str) -> None:
    assert layout[field].meaning(value) == meaning


def test_pa_sizes_by_ps() -> None:
    assert r.PA_BITS == (32, 36, 40, 42, 44, 48, 52, 52)


# The container.


def test_a_register_that_is_not_given_has_its_reset_or_useful_value() -> None:
    regs = Registers()
    assert regs.TCR_EL1 == regs.TTBR0_EL1 == regs.PAN == 0
    assert regs.SCTLR_EL1 == 0x1005  # M, C, I
    assert regs.HCR_EL2 == 1 << 31
    assert regs["SCR_EL3"] == 1 << 43 | 0x501
    assert repr(regs) == "Registers()"
    assert repr(Registers(PAN=1, TCR_EL1=0x19)) in (
        "Registers(PAN=0x1, TCR_EL1=0x19)",
        "Registers(TCR_EL1=0x19, PAN=0x1)",
    )


def test_an_unknown_register_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^register TTBR2_EL1 is not one that a translation reads \(.*TTBR1_EL1"):
        Registers(TTBR2_EL1=0)
    with pytest.raises(AttributeError, match="no register TTBR2_EL1"):
        Registers().TTBR2_EL1  # noqa: B018  the attribute is the test
    with pytest.raises(KeyError):
        Registers()["TTBR2_EL1"]


@pytest.mark.parametrize("value", [-1, 1 << 64, 1.5, "0x19", None])
def test_a_value_that_is_no_64_bit_integer_is_refused_by_name(value: object) -> None:
    with pytest.raises(ValueError, match=r"^TCR_EL1=.*: must be an integer of 64 bits$"):
        Registers(TCR_EL1=value)


def test_registers_cannot_be_changed() -> None:
    regs = Registers(TCR_EL1=1)
    with pytest.raises(AttributeError):
        regs.TCR_EL1 = 2
    with pytest.raises(AttributeError):
        regs.features = CPUS["cortex-a57"]
    values = regs.as_dict()
    assert isinstance(values, dict)
    values["TCR_EL1"] = 3
    assert regs.TCR_EL1 == 1


def test_equal_registers_are_one_key() -> None:
    a, b = Registers(TCR_EL1=0x19, PAN=1), Registers(PAN=1, TCR_EL1=0x19)
    assert a == b
    assert hash(a) == hash(b)
    assert len({a: 0, b: 1}) == 1
    assert a != Registers(TCR_EL1=0x19)
    assert a != Registers(CPUS["cortex-a57"], TCR_EL1=0x19, PAN=1), "another CPU"
    assert a != "TCR_EL1"


def test_replace_makes_another_set_with_the_same_cpu() -> None:
    regs = Registers(CPUS["cortex-a57"], TCR_EL1=1, PAN=1)
    other = regs.replace(TCR_EL1=2)
    assert (regs.TCR_EL1, other.TCR_EL1, other.PAN) == (1, 2, 1)
    assert other.features is CPUS["cortex-a57"]
    with pytest.raises(ValueError, match="register NONE is not"):
        regs.replace(NONE=1)


def test_parameters_kept_with_one_set_do_not_leak_into_another() -> None:
    good = tree()
    assert translate(good.memory, good.regs, good.va).ok
    off = good.regs.replace(TCR_EL1=good.regs.TCR_EL1 | 1 << 7)
    assert translate(good.memory, off, good.va).fault is not None
    assert translate(good.memory, good.regs, good.va).ok


@pytest.mark.parametrize("clone", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_are_equal_and_translate_alike(clone) -> None:
    good = tree()
    other = clone(good.regs)
    assert other == good.regs
    assert translate(good.memory, other, good.va, Access.write()).pa == 0x8000_0AB8


def test_all_registers_are_listed() -> None:
    assert {"TCR_EL1", "TCR2_EL2", "PIRE0_EL1", "POR_EL0", "UAO"} <= set(Registers())
    assert set(Registers()) == set(Registers().as_dict())


# Text.


def test_lines_are_parsed_with_comments_and_every_number_form() -> None:
    regs = Registers.parse(
        """
        # a comment
        TCR_EL1 = 0x19   # T0SZ
        TTBR0_EL1=1073741824

        MAIR_EL1=0b11111111
        PAN=0o1
        """
    )
    assert (regs.TCR_EL1, regs.TTBR0_EL1, regs.MAIR_EL1, regs.PAN) == (0x19, 0x4000_0000, 0xFF, 1)
    assert Registers.parse("") == Registers()


def test_json_is_parsed_with_strings_and_numbers() -> None:
    text = json.dumps({"TCR_EL1": "0x19", "TTBR0_EL1": 1 << 30})
    assert Registers.parse(text) == Registers.parse(f"\n  {text}") == Registers(TCR_EL1=0x19, TTBR0_EL1=1 << 30)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("TCR_EL1", r"^register line 'TCR_EL1': must be NAME=VALUE$"),
        ("TCR_EL1 0x19", r"^register line 'TCR_EL1 0x19': must be NAME=VALUE$"),
        ("TCR_EL1=", r"^TCR_EL1=: not a number \(0x..., decimal\)$"),
        ("TCR_EL1=x19", r"^TCR_EL1=x19: not a number"),
        ("TCR_EL1=1.5", r"^TCR_EL1=1.5: not a number"),
        ("TCR_EL9=1", r"^register TCR_EL9 is not one"),
        ("TCR_EL1=-1", r"^TCR_EL1=-1: must be an integer of 64 bits$"),
        ('{"TCR_EL1": "x"}', r"^TCR_EL1=x: not a number"),
        ('{"TCR_EL1": [1]}', r"^TCR_EL1=\[1\]: not a number"),
        ('{"NONE": 1}', r"^register NONE is not one"),
        ('{"TCR_EL1": ', r"Expecting value"),
    ],
)
def test_bad_text_is_refused_with_a_sentence(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Registers.parse(text)
