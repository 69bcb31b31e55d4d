"""Where registers come from when a source has none: VMCOREINFO in RAM, a found root, the user."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from emu.sources import (
    SourceError,
    found_registers,
    open_source,
    overridden,
    parse_register,
    parse_registers,
    read_registers,
)
from emu.sources.vmcoreinfo import VmcoreInfo
from pgtable import Registers, translate
from pgtable.leaves import leaves
from pgtable.memory import PAGE
from tests.emu.dumps import (
    RAM,
    SIZE,
    Guest,
    guest,
    registers_of,
    write,
)


@pytest.fixture(scope="module")
def made() -> Guest:
    return guest()


@pytest.mark.parametrize(("page", "va_bits"), [(4096, 48), (4096, 39), (4096, 52), (16384, 47), (65536, 48)])
def test_vmcoreinfo_in_ram_gives_registers_for_every_granule(tmp_path: Path, page: int, va_bits: int) -> None:
    one = guest(page=page, va_bits=va_bits, voffset=((1 << 64) - (1 << va_bits - 1)) + 0x4000_0000)
    name = write(tmp_path / "ram", one.content)
    with open_source(f"raw:{name}@{RAM}") as source:
        regs = found_registers(source)
        assert source.origin == "VMCOREINFO found in RAM of 6.99.0-test"
        assert translate(source.memory, regs, one.linear + 0x12340).pa == RAM + 0x12340
        assert len(leaves(source.memory, regs).va) == (SIZE + (1 << 20)) // page
        lower = translate(source.memory, regs, 0x1000)
        assert lower.fault
        assert lower.fault.cause == "EPD"


def test_vmcoreinfo_without_t1sz_has_the_va_bits_of_the_build(made: Guest) -> None:
    text = "".join(line for line in made.info.splitlines(True) if "T1SZ" not in line)
    assert VmcoreInfo.parse(text).registers() == registers_of(made)
    info = VmcoreInfo.parse("OSRELEASE=5.4\nPAGESIZE=4096\nnonsense\n")
    assert info.va_bits is None
    assert info.release == "5.4"
    assert info.linear_pa(1 << 63) is None
    with pytest.raises(SourceError, match="does not say enough"):
        info.registers()


def test_text_that_only_begins_like_vmcoreinfo_is_passed_over(tmp_path: Path, made: Guest) -> None:
    content = bytearray(made.content)
    content[:10] = b"OSRELEASE="
    content[PAGE : PAGE + 14] = b"OSRELEASE=%s\n\0"
    content[2 * PAGE : 2 * PAGE + 40] = b"OSRELEASE=6.1\nCRASHTIME=1\nPAGESIZE=4096\n"
    name = write(tmp_path / "ram", bytes(content))
    with open_source(f"raw:{name}@{RAM}") as source:
        assert found_registers(source) == registers_of(made)
        assert source.origin == "VMCOREINFO found in RAM of 6.99.0-test"


def test_without_vmcoreinfo_the_root_is_found(tmp_path: Path, made: Guest) -> None:
    name = write(tmp_path / "ram", made.content.replace(b"OSRELEASE", b"osrelease"))
    with open_source(f"raw:{name}@{RAM}") as source:
        regs = found_registers(source)
        assert made.root == regs.TTBR1_EL1
        assert source.origin.startswith(f"the root found at PA {made.root:#x}: 4K, 48 VA bits")
    empty = write(tmp_path / "zeros", bytes(64 * PAGE))
    with open_source(f"raw:{empty}@0") as source, pytest.raises(SourceError, match="no root table was found"):
        found_registers(source)


# ---- registers by the user


def test_registers_from_lines_and_from_json(tmp_path: Path) -> None:
    lines = "TTBR1_EL1 = 0x41000000  # root\n\n# nothing\nSCTLR=5\n"
    want = {"TTBR1_EL1": 0x4100_0000, "SCTLR_EL1": 5}
    assert parse_registers(lines) == want
    assert parse_registers('{"TTBR1_EL1": "0x41000000", "SCTLR_EL1": 5}') == want
    (tmp_path / "regs").write_text(lines)
    assert read_registers(tmp_path / "regs") == want
    assert parse_register("TCR_EL1=0b101") == ("TCR_EL1", 5)


def test_the_command_line_overrides_the_file_and_the_file_the_source(tmp_path: Path) -> None:
    path = tmp_path / "regs"
    path.write_text("TTBR1_EL1=1\nTCR_EL1=2")
    base = Registers(TTBR1_EL1=9, MAIR_EL1=9)
    assert overridden(base, path, ["TCR_EL1=3"]) == Registers(TTBR1_EL1=1, TCR_EL1=3, MAIR_EL1=9)
    assert overridden(base) is base
    assert overridden(None) is None
    assert overridden(None, None, ["TTBR0_EL1=4"]) == Registers(TTBR0_EL1=4)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("TTBR1_EL1", "not NAME=VALUE"),
        ("TTBR9_EL1=0", "not a register that a translation reads"),
        ("TTBR1_EL1=red", "not a number"),
        ("TTBR1_EL1=-1", "64 bits"),
        (f"TTBR1_EL1={1 << 64}", "64 bits"),
        ("{not json", "begins like JSON"),
        ('{"TTBR1_EL1": [1]}', "must be a number"),
        ('{"TTBR1_EL1": true}', "must be a number"),
        ('{"X9": 1}', "not a register"),
    ],
)
def test_register_texts_that_cannot_be(text: str, says: str) -> None:
    with pytest.raises(SourceError, match=says) as error:
        parse_registers(text)
    assert "\n" not in str(error.value)


def test_register_files_that_cannot_be(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="cannot be read"):
        read_registers(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\0\1\2")
    with pytest.raises(SourceError, match="no text"):
        read_registers(tmp_path / "binary")
    start = time.process_time()
    with pytest.raises(SourceError, match="no text"):
        read_registers("/dev/zero")
    assert time.process_time() - start < 1
