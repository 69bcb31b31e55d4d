"""emu.btf against sections written by hand, and against what is known of Debian's kernels."""

from __future__ import annotations

import struct
import time

import numpy as np
import pytest

from emu import btf
from emu.btf import Btf, BtfError
from tests.emu.synthetic import BtfWriter
from tests.kernels import KERNELS, kernel_image


def section(writer: BtfWriter) -> np.ndarray:
    return np.frombuffer(writer.bytes(), np.uint8)


@pytest.fixture
def types() -> Btf:
    b = BtfWriter()
    u8, u32, u64 = b.integer("u8", 1), b.integer("u32", 4), b.integer("u64", 8)
    inner = b.record("rw_semaphore", 0x18, [("owner", u64, 8), ("count", u64, 0x10)])
    deep = b.record("", 0x10, [("first", u32, 0), ("second", u32, 4), ("flags", u8, 8)])
    union = b.record("", 0x10, [("", deep, 0), ("whole", u64, 0)], union=True)
    alias = b.typedef("sem_t", b.const(inner))
    many = b.array(u32, u64, 6)
    b.record(
        "mm_struct",
        0x80,
        [("pgd", b.pointer(inner), 0), ("", union, 0x10), ("mmap_lock", alias, 0x40), ("counts", many, 0x60)],
    )
    b.bitfields("flags", 4, [("a", u32, 0, 3), ("b", u32, 3, 13), ("c", u32, 16, 0)])
    b.enum("page_walk_lock", {"RDLOCK": 0, "WRLOCK": 1})
    b.enum("signed_one", {"MINUS": -1, "PLUS": 1}, signed=True)
    b.enum("wide", {"BIG": 1 << 40, "MAX": (1 << 64) - 1}, wide=True)
    b.typedef("mm_t", b.count - 4)
    b.typedef("both", u8)
    b.record("both", 0x30, [("x", u8, 7)])
    b.add("forward", 7)
    # One of each other kind, for their length: function, its prototype, variable, section, float, tags.
    b.add("", 13, vlen=2, rest=u32, extra=struct.pack("<IIII", 0, u32, 0, u64))
    b.add("f", 12, vlen=1, rest=b.count)
    b.add("v", 14, rest=u32, extra=struct.pack("<I", 1))
    b.add(".data", 15, vlen=1, rest=4, extra=struct.pack("<III", b.count, 0, 4))
    b.add("float", 16, rest=4)
    b.add("tag", 17, rest=u32, extra=struct.pack("<i", -1))
    tagged = b.add("tag", 18, rest=inner)
    b.add("", 9, rest=tagged)
    b.record("last", 8, [("seen", b.pointer(b.count), 0)])
    return Btf(section(b))


@pytest.mark.parametrize(
    ("path", "offset"),
    [
        ("pgd", 0),
        ("first", 0x10),
        ("second", 0x14),
        ("flags", 0x18),
        ("whole", 0x10),
        ("mmap_lock", 0x40),
        ("mmap_lock.owner", 0x48),
        ("mmap_lock.count", 0x50),
        ("counts", 0x60),
    ],
)
def test_offsets_go_through_typedefs_and_members_without_a_name(types: Btf, path: str, offset: int) -> None:
    assert types.offset("mm_struct", path) == offset
    assert types.has("mm_struct", path)


def test_records_of_every_kind_have_the_length_that_the_format_gives_them(types: Btf) -> None:
    assert types.offset("last", "seen") == 0


def test_sizes(types: Btf) -> None:
    assert [types.size(n) for n in ("mm_struct", "rw_semaphore", "sem_t", "u8", "page_walk_lock")] == [
        128,
        24,
        24,
        1,
        4,
    ]
    assert types.member("mm_struct", "counts").size == 24
    assert types.member("mm_struct", "pgd").size == 8


def test_of_a_struct_and_a_typedef_with_one_name_the_struct_is_meant(types: Btf) -> None:
    assert (types.size("both"), types.offset("both", "x")) == (0x30, 7)


def test_members_are_listed_in_order_with_the_nameless(types: Btf) -> None:
    assert [(m.name, m.offset) for m in types.members("mm_struct")] == [
        ("pgd", 0),
        ("", 0x10),
        ("mmap_lock", 0x40),
        ("counts", 0x60),
    ]


def test_bit_fields_keep_their_width_apart_from_their_place(types: Btf) -> None:
    assert [(m.name, m.offset, m.bits) for m in types.members("flags")] == [("a", 0, 3), ("b", 0, 13), ("c", 2, 0)]


def test_enums(types: Btf) -> None:
    assert types.enum("page_walk_lock") == {"RDLOCK": 0, "WRLOCK": 1}
    assert types.enum("signed_one") == {"MINUS": -1, "PLUS": 1}
    assert types.enum("wide") == {"BIG": 1 << 40, "MAX": (1 << 64) - 1}


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda b: b.offset("nothing", "x"), "no type nothing"),
        (lambda b: b.offset("mm_struct", "nothing"), "mm_struct has no member nothing"),
        (lambda b: b.offset("mm_struct", "pgd.owner"), "mm_struct has no member pgd.owner"),
        (lambda b: b.offset("mm_struct", "mmap_lock.nothing"), "no member mmap_lock.nothing"),
        (lambda b: b.size("mm_stru"), "no type mm_stru"),
        (lambda b: b.size("forward"), "no type forward"),
        (lambda b: b.enum("mm_struct"), "mm_struct is not an enum"),
        (lambda b: b.members("u8"), "u8 has no members"),
        (lambda b: b.size(""), "no type"),
    ],
)
def test_what_is_absent_is_named(types: Btf, ask, message: str) -> None:
    with pytest.raises(BtfError, match=message):
        ask(types)


def test_has_asks_without_raising(types: Btf) -> None:
    assert types.has("mm_struct")
    assert not types.has("nothing")
    assert not types.has("mm_struct", "nothing")


def test_the_section_is_found_by_its_header_and_the_longest_real_one_wins() -> None:
    b = BtfWriter()
    b.record("mm_struct", 8, [])
    real = b.bytes()
    small = BtfWriter()
    small.integer("u8", 1)
    image = b"\x9f\xeb\x01\0" + b"\xff" * 28 + small.bytes().ljust(64, b"\0") + bytes(32) + real
    start = len(image) - len(real)
    padded = image + b"\x7f" * 50
    assert btf.find(np.frombuffer(padded, np.uint8)) == (start, start + len(real))
    assert btf.find(np.frombuffer(image[:-1] + b"\x7f", np.uint8)) == (32, 32 + len(small.bytes()))
    assert btf.find(np.zeros(4096, np.uint8)) is None


def test_records_that_do_not_fill_the_section_or_are_unknown_are_refused() -> None:
    b = BtfWriter()
    b.record("x", 8, [])
    b.types += struct.pack("<III", 0, 4 << 24 | 9, 8)  # nine members, none there
    with pytest.raises(BtfError, match="ends inside a record"):
        len(Btf(section(b)))
    c = BtfWriter()
    c.add("x", 30)
    with pytest.raises(BtfError, match="unknown kind 30"):
        len(Btf(section(c)))


def test_an_index_that_was_kept_serves_again(types: Btf) -> None:
    again = Btf(types_section := section(_one()), Btf(types_section).index)
    assert again.offset("pair", "second") == 8


def _one() -> BtfWriter:
    b = BtfWriter()
    u64 = b.integer("u64", 8)
    b.record("pair", 16, [("first", u64, 0), ("second", u64, 8)])
    return b


# Offsets by which the real kernels have run (facts 0.2): what the kernel stores there was seen there.
KNOWN = {
    "debian:6.1": {
        ("mm_struct", "pgd"): 0x38,
        ("task_struct", "stack_canary"): 0x550,
        ("vm_struct", "nr_pages"): 0x2C,
    },
    "debian:6.12": {
        ("mm_struct", "pgd"): 0x68,
        ("mm_struct", "mmap_lock.count"): 0x98,
        ("task_struct", "stack_canary"): 0x568,
        ("vm_struct", "nr_pages"): 0x2C,
        ("mm_walk_ops", "walk_lock"): 0x50,
    },
    "debian:7.3": {
        ("mm_struct", "pgd"): 0x68,
        ("mm_struct", "mmap_lock.count"): 0x158,
        ("task_struct", "stack_canary"): 0x760,
        ("vm_struct", "nr_pages"): 0x30,
        ("mm_walk_ops", "install_pte"): 0x50,
        ("mm_walk_ops", "walk_lock"): 0x58,
    },
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_known_offsets_of_real_kernels(name: str) -> None:
    types = kernel_image(name).btf
    assert {key: types.offset(*key) for key in KNOWN[name]} == KNOWN[name]
    assert types.size("page") == 64
    assert types.has("mm_walk_ops", "walk_lock") == (name != "debian:6.1")


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_the_types_of_a_real_kernel_are_indexed_in_under_half_a_second(name: str) -> None:
    image = kernel_image(name).data
    times = []
    for _ in range(3):
        start = time.process_time()
        first, end = btf.find(image)
        types = Btf(image[first:end])
        types.offset("mm_struct", "pgd")
        times.append(time.process_time() - start)
    print(f"{name}: {len(types)} types in {min(times):.2f} s")
    assert min(times) < 0.5
