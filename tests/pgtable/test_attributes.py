"""MAIR bytes, all 256. Judge: the Arm ARM's MAIR_ELx tables and S1DecodeMemAttrs, restated row by row on digits."""

from __future__ import annotations

import pytest

from pgtable.attributes import FORCED_OUTER, MemoryAttributes, forced_outer, is_device

DEVICE = {"00": "Device-nGnRnE", "01": "Device-nGnRE", "10": "Device-nGRE", "11": "Device-GRE"}
HINT = {"00": "no allocate", "01": "write-allocate", "10": "read-allocate", "11": "read/write-allocate"}
WB_RWA, WT_RA = "write-back read/write-allocate", "write-through read-allocate"


def half(digits: str) -> str:
    """Four digits of a Normal encoding: cacheability, transience and allocation hints."""
    if digits == "0100":
        return "non-cacheable"
    transient = "transient " if digits[0] == "0" else ""
    return f"{'write-back' if digits[1] == '1' else 'write-through'} {transient}{HINT[digits[2:]]}"


def restated(byte: int) -> MemoryAttributes:
    high, low = f"{byte:08b}"[:4], f"{byte:08b}"[4:]
    if high == "0000":
        if low[2:] == "00":
            return MemoryAttributes(DEVICE[low[:2]], "", "", False, True)
        if low[2:] == "01":  # FEAT_XS
            return MemoryAttributes(DEVICE[low[:2]], "", "", False, False)
        return MemoryAttributes("reserved", "", "", False, True)
    if low == "0000":
        if high == "0100":  # FEAT_XS
            return MemoryAttributes("Normal", "non-cacheable", "non-cacheable", False, False)
        if high == "1010":  # FEAT_XS
            return MemoryAttributes("Normal", WT_RA, WT_RA, False, False)
        if high == "1111":  # FEAT_MTE2
            return MemoryAttributes("Normal", WB_RWA, WB_RWA, True, False)
        return MemoryAttributes("reserved", "", "", False, True)
    both_write_back = half(low).startswith("write-back") and half(high).startswith("write-back")
    return MemoryAttributes("Normal", half(low), half(high), False, not both_write_back)


def test_all_256_bytes_mean_what_the_arm_arm_says() -> None:
    for byte in range(256):
        assert MemoryAttributes.of(byte) == restated(byte), f"{byte:08b}"


def test_the_bytes_that_are_reserved_are_these() -> None:
    reserved = {byte for byte in range(256) if MemoryAttributes.of(byte).type == "reserved"}
    device = {dd << 2 | x for dd in range(4) for x in (2, 3)}
    assert reserved == device | {n << 4 for n in range(1, 16) if n not in (4, 10, 15)}


def test_device_is_eight_bytes() -> None:
    assert {byte for byte in range(256) if is_device(byte)} == {0, 1, 4, 5, 8, 9, 12, 13}


def test_device_and_fully_non_cacheable_memory_is_outer_shareable_whatever_the_descriptor_says() -> None:
    assert {byte for byte in range(256) if forced_outer(byte)} == {0, 1, 4, 5, 8, 9, 12, 13, 0x40, 0x44}
    assert {byte for byte in range(256) if FORCED_OUTER[byte]} == {0, 1, 4, 5, 8, 9, 12, 13, 0x40, 0x44}


@pytest.mark.parametrize(
    ("byte", "text"),
    [
        (0x00, "Device-nGnRnE"),
        (0x04, "Device-nGnRE"),
        (0x0D, "Device-GRE (XS=0)"),
        (0x44, "Normal non-cacheable"),
        (0xFF, "Normal write-back read/write-allocate"),
        (0xF0, "Normal write-back read/write-allocate, tagged"),
        (0xBB, "Normal write-through read/write-allocate"),
        (0x4F, "Normal inner write-back read/write-allocate, outer non-cacheable"),
        (0x77, "Normal write-back transient read/write-allocate"),
        (0x88, "Normal write-through no allocate"),
        (0x02, "reserved"),
    ],
)
def test_attributes_as_text(byte: int, text: str) -> None:
    assert str(MemoryAttributes.of(byte)) == text
