"""TLBI operations: encodings judged by binutils, scopes by a table typed from the Arm ARM (C5.5, D8.17.5)."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pgtable.descriptors import Granule
from pgtable.params import Regime
from pgtable.tlbi import (
    BY_ENCODING,
    OPERATIONS,
    Domain,
    Target,
    canonical,
    decode,
    misses,
    operand_for,
    range_operand,
)
from tests.kernels import lack

# Every operation's op1, CRm, op2, as the encoding tables of C5.5 have them; CRn is 8, and 9 for the nXS form.
ENCODINGS = """
VMALLE1 0 7 0   VMALLE1IS 0 3 0   VMALLE1OS 0 1 0     VAE1 0 7 1      VAE1IS 0 3 1      VAE1OS 0 1 1
ASIDE1 0 7 2    ASIDE1IS 0 3 2    ASIDE1OS 0 1 2      VAAE1 0 7 3     VAAE1IS 0 3 3     VAAE1OS 0 1 3
VALE1 0 7 5     VALE1IS 0 3 5     VALE1OS 0 1 5       VAALE1 0 7 7    VAALE1IS 0 3 7    VAALE1OS 0 1 7
RVAE1 0 6 1     RVAE1IS 0 2 1     RVAE1OS 0 5 1       RVAAE1 0 6 3    RVAAE1IS 0 2 3    RVAAE1OS 0 5 3
RVALE1 0 6 5    RVALE1IS 0 2 5    RVALE1OS 0 5 5      RVAALE1 0 6 7   RVAALE1IS 0 2 7   RVAALE1OS 0 5 7
ALLE2 4 7 0     ALLE2IS 4 3 0     ALLE2OS 4 1 0       VAE2 4 7 1      VAE2IS 4 3 1      VAE2OS 4 1 1
ALLE1 4 7 4     ALLE1IS 4 3 4     ALLE1OS 4 1 4       VALE2 4 7 5     VALE2IS 4 3 5     VALE2OS 4 1 5
VMALLS12E1 4 7 6  VMALLS12E1IS 4 3 6  VMALLS12E1OS 4 1 6
VMALLWS2E1 4 6 2  VMALLWS2E1IS 4 2 2  VMALLWS2E1OS 4 5 2
RVAE2 4 6 1     RVAE2IS 4 2 1     RVAE2OS 4 5 1       RVALE2 4 6 5    RVALE2IS 4 2 5    RVALE2OS 4 5 5
IPAS2E1 4 4 1   IPAS2E1IS 4 0 1   IPAS2E1OS 4 4 0     IPAS2LE1 4 4 5  IPAS2LE1IS 4 0 5  IPAS2LE1OS 4 4 4
RIPAS2E1 4 4 2  RIPAS2E1IS 4 0 2  RIPAS2E1OS 4 4 3    RIPAS2LE1 4 4 6 RIPAS2LE1IS 4 0 6 RIPAS2LE1OS 4 4 7
ALLE3 6 7 0     ALLE3IS 6 3 0     ALLE3OS 6 1 0       VAE3 6 7 1      VAE3IS 6 3 1      VAE3OS 6 1 1
VALE3 6 7 5     VALE3IS 6 3 5     VALE3OS 6 1 5       RVAE3 6 6 1     RVAE3IS 6 2 1     RVAE3OS 6 5 1
RVALE3 6 6 5    RVALE3IS 6 2 5    RVALE3OS 6 5 5
"""
GPT = "PAALL 6 7 4   PAALLOS 6 1 4   RPAOS 6 4 3   RPALOS 6 4 7"
_ROW = re.compile(r"([A-Z0-9]+) (\d) (\d) (\d)")


def test_every_encoding_is_that_of_the_arm_arm() -> None:
    expected = {}
    for name, *numbers in _ROW.findall(ENCODINGS):
        op1, crm, op2 = map(int, numbers)
        expected[name], expected[f"{name}NXS"] = (op1, 8, crm, op2), (op1, 9, crm, op2)
    for name, op1, crm, op2 in _ROW.findall(GPT):
        expected[name] = int(op1), 8, int(crm), int(op2)
    assert {name: op.encoding for name, op in OPERATIONS.items()} == expected
    assert {encoding: op.name for encoding, op in BY_ENCODING.items()} == {e: n for n, e in expected.items()}


def sys_word(op1: int, crn: int, crm: int, op2: int, rt: int) -> int:
    """SYS #op1, Cn, Cm, #op2, Xt."""
    return 0xD5080000 | op1 << 16 | crn << 12 | crm << 8 | op2 << 5 | rt


def test_binutils_disassembles_the_whole_space_of_crn_8_as_we_do(tmp_path: Path) -> None:
    """All 512 encodings for which binutils has a name have ours, and none of ours is unknown but FEAT_TLBIW's."""
    if shutil.which("aarch64-linux-gnu-objdump") is None:
        lack("binutils", "no aarch64-linux-gnu-objdump: install binutils-aarch64-linux-gnu")
    space = [(op1, 8, crm, op2) for op1 in range(8) for crm in range(8) for op2 in range(8)]
    takes = [e in BY_ENCODING and BY_ENCODING[e].takes_operand for e in space]
    words = [sys_word(*e, 0 if xt else 31) for e, xt in zip(space, takes, strict=True)]
    binary = tmp_path / "words.bin"
    binary.write_bytes(b"".join(word.to_bytes(4, "little") for word in words))
    command = ["aarch64-linux-gnu-objdump", "-D", "-b", "binary", "-m", "aarch64", str(binary)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    named = {int(at, 16) // 4: name for at, name in re.findall(r"^\s*([0-9a-f]+):.*\ttlbi\t([a-z0-9]+)", text, re.M)}
    theirs = {space[i]: name.upper() for i, name in named.items()}
    assert len(theirs) > 70
    ours = {e: op.name for e, op in BY_ENCODING.items() if e[1] == 8 and "WS2" not in op.name}
    assert theirs == ours


def entry(start: int = 0xFFFF_0000_0000_1000, size: int = 4096, **changes: Any) -> Target:
    """A global EL1&0 page, with changes."""
    return Target(Regime.EL10, 0, None, start, size, 3, True, Granule.K4)._replace(**changes)


PAGE = entry()
USER = entry(0x1000, asid=5)
TABLE = entry(0xFFFF_0000_0000_0000, 1 << 21, level=2, leaf=False, asid=5)
BLOCK = entry(0xFFFF_0000_0020_0000, 1 << 21, level=2)
IPA = entry(0x1000, stage=2, vmid=7)
BOTH = entry(0x1000, stage=3, vmid=7, asid=5)
EL2 = entry(0x1000, regime=Regime.EL2)
HOST = entry(0x1000, regime=Regime.EL20, asid=5)
EL3 = entry(0x1000, regime=Regime.EL3)

# operation, address, asid, TTL, what it must remove of the entries above (D8.17.5.4); vmid 0 unless "vmid 7".
SCOPES = (
    ("VMALLE1", 0, 0, 0, "PAGE USER TABLE BLOCK"),
    ("VMALLE1 vmid 7", 0, 0, 0, "BOTH"),
    ("VMALLS12E1IS", 0, 0, 0, "PAGE USER TABLE BLOCK"),
    ("VMALLS12E1IS vmid 7", 0, 0, 0, "IPA BOTH"),
    ("ALLE1OS", 0, 0, 0, "PAGE USER TABLE BLOCK IPA BOTH"),
    ("ALLE2", 0, 0, 0, "EL2"),
    ("ALLE2 e2h", 0, 0, 0, "HOST"),
    ("ALLE3", 0, 0, 0, "EL3"),
    ("ASIDE1IS", 0, 5, 0, "USER TABLE"),
    ("ASIDE1IS", 0, 6, 0, ""),
    ("ASIDE1IS e2h tge", 0, 5, 0, "HOST"),
    ("VAE1IS", 0x1000, 5, 0, "USER"),
    ("VAE1IS", 0x1000, 6, 0, ""),
    ("VAE1IS vmid 7", 0x1000, 5, 0, "BOTH"),
    ("VAE1IS", 0xFFFF_0000_0000_1000, 5, 0, "PAGE TABLE"),
    ("VAE1IS", 0xFFFF_0000_0000_1000, 6, 0, "PAGE"),  # a table entry is never global
    ("VALE1IS", 0xFFFF_0000_0000_1000, 5, 0, "PAGE"),
    ("VAAE1IS", 0xFFFF_0000_0000_1000, 0, 0, "PAGE TABLE"),
    ("VAALE1IS", 0xFFFF_0000_0000_1000, 0, 0, "PAGE"),
    ("VAALE1IS", 0xFFFF_0000_0000_0000, 0, 0, ""),  # the page before
    ("VAALE1IS", 0xFFFF_0000_0000_2000, 0, 0, ""),  # the page after
    ("VAALE1IS", 0xFFFF_0000_003F_F000, 0, 0, "BLOCK"),
    ("VAALE1IS", 0xFFFF_0000_0040_0000, 0, 0, ""),
    ("VAALE1IS", 0xFFFF_0000_0000_1000, 0, 0b0111, "PAGE"),
    ("VAALE1IS", 0xFFFF_0000_0000_1000, 0, 0b0110, ""),  # says that the leaf is at level 2
    ("VAALE1IS", 0xFFFF_0000_0000_1000, 0, 0b1011, ""),  # says that the granule is 16K
    ("VAALE1IS", 0xFFFF_0000_0000_1000, 0, 0b1000, "PAGE"),  # reserved: no hint
    ("VAAE1IS", 0xFFFF_0000_0000_1000, 0, 0b0111, "PAGE TABLE"),
    ("VAE2IS", 0x1000, 5, 0, "EL2"),
    ("VAE2IS e2h", 0x1000, 5, 0, "HOST"),
    ("VALE3", 0x1000, 0, 0, "EL3"),
    ("IPAS2E1IS", 0x1000, 0, 0, ""),
    ("IPAS2E1IS vmid 7", 0x1000, 0, 0, "IPA"),
    ("VMALLWS2E1 vmid 7", 0, 0, 0, ""),
    ("PAALL", 0, 0, 0, ""),
)


@pytest.mark.parametrize(("text", "address", "asid", "ttl", "removed"), SCOPES, ids=[f"{s[0]}-{s[4]}" for s in SCOPES])
def test_scope_is_that_of_the_arm_arm(text: str, address: int, asid: int, ttl: int, removed: str) -> None:
    name, *options = text.split()
    operand = operand_for(name, address, asid=asid, ttl=ttl) if OPERATIONS[name].takes_operand else 0
    op = decode(name, operand, e2h="e2h" in options, tge="tge" in options, vmid=7 if "vmid" in options else 0)
    entries = {"PAGE": PAGE, "USER": USER, "TABLE": TABLE, "BLOCK": BLOCK, "IPA": IPA, "BOTH": BOTH}
    entries |= {"EL2": EL2, "HOST": HOST, "EL3": EL3}
    assert " ".join(n for n, e in entries.items() if not misses(op, e)) == removed


# name, operand, [start, end), level: worked by hand from D8.17.5.2 and table D8-122.
RANGES = (
    ("RVAAE1IS", 1 << 46 | 0x1_0000_0001 | 1 << 36, 0xFFFF_1000_0000_1000 | 0xF << 48, 2, None),
    ("RVAE1", 1 << 46 | 0x123, 0x12_3000, 2, None),
    ("RVAE1", 1 << 46 | 3 << 39 | 0x123, 0x12_3000, 8, None),
    ("RVAE1", 1 << 46 | 1 << 44 | 0x123, 0x12_3000, 64, None),
    ("RVAE1", 1 << 46 | 3 << 44 | 31 << 39 | 0x123, 0x12_3000, 32 << 16, None),
    ("RVAE1", 2 << 46 | 0x123, 0x48_C000, 2, None),
    ("RVAE1", 3 << 46 | 3 << 37 | 0x123, 0x123_0000, 2, 3),
    ("RIPAS2E1IS", 1 << 46 | 1 << 36, 1 << 48, 2, None),
)


@pytest.mark.parametrize(("name", "operand", "start", "pages", "level"), RANGES)
def test_range_operands(name: str, operand: int, start: int, pages: int, level: int | None) -> None:
    op = decode(name, operand)
    assert op.granule
    start = canonical(start) if "IPA" not in name else start
    assert (op.start, op.end - op.start, op.level) == (start, pages * op.granule.page_size, level)


def test_a_range_with_52_bit_addresses_counts_in_64k() -> None:
    op = decode("RVAAE1IS", 1 << 46 | 0x1F_FFFF_0001, ds=True)
    assert (op.start, op.end - op.start) == (0xFFFF_FFFF_0001_0000, 2 * 4096)


def test_a_range_does_not_wrap_into_the_other_half() -> None:
    op = decode("RVAAE1IS", 1 << 46 | 31 << 39 | 3 << 44 | (1 << 37) - 1)
    assert (op.start, op.end) == (0xFFFF_FFFF_FFFF_F000, 1 << 64)


def test_what_the_architecture_gives_no_effect_is_said() -> None:
    assert decode("RVAE1", 0x123).void == "TG = 0 is reserved"
    assert decode("RVAE1", 1 << 46 | 2 << 37 | 1).void == "BaseADDR is no multiple of a level 2 entry"
    assert misses(decode("RVAE1", 0), PAGE) == "no effect required"


def test_range_of_another_granule_need_not_remove() -> None:
    assert misses(decode("RVAAE1", range_operand(0xFFFF_0000_0000_0000, 2, Granule.K16)), PAGE) == "another granule"


def test_operands_are_read_back(rng: random.Random) -> None:
    for _ in range(500):
        va = canonical(rng.getrandbits(56)) & -4096
        asid = rng.getrandbits(16)
        op = decode("VAE1IS", operand_for("VAE1IS", va, asid=asid))
        assert (op.start, op.end, op.asid) == (va, va + 4096, asid)
        granule = rng.choice(list(Granule))
        size = rng.randint(1, 32) << rng.choice((1, 6, 11, 16))
        bits = granule.page_shift + 36
        va = va & (1 << bits) - 1 & -granule.page_size
        op = decode("RVAE1IS", range_operand(va, size, granule, asid=asid))
        assert (op.start, op.end - op.start, op.asid) == (va, size * granule.page_size, asid)


def test_domains_and_suffixes() -> None:
    assert [OPERATIONS[name].domain for name in ("VAE1", "VAE1IS", "VAE1OSNXS")] == list(Domain)
    assert OPERATIONS["VAE1OSNXS"].nxs
    assert not OPERATIONS["VAE1OS"].nxs
    assert {op.name for op in OPERATIONS.values() if op.last} == {
        name for name in OPERATIONS if re.match(r"R?(VA|VAA|IPAS2|PA)L(E|OS)", name)
    }


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(ValueError, match="no TLBI operation is called VAE9"):
        decode("VAE9")
