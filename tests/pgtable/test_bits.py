"""Fields and layouts: the partition, scalar against array, and what they refuse. Judge: bit strings typed here."""

from __future__ import annotations

import random
from itertools import product

import numpy as np
import pytest

from pgtable import registers
from pgtable.bits import Field, Layout, Meaning, Span, View, address, bits, ignored, res0, res1
from pgtable.descriptors import Format, Granule
from tests.pgtable.hand import SEED, U64

CHUNK, CHUNKS = 10_000, 10  # 10^5 words, in pieces that stay in the cache
LOWEST = {Granule.K4: 0, Granule.K16: 0, Granule.K64: 1}  # levels of a 48-bit space; 52 bits of 4K add one


def every_layout() -> dict[str, Layout]:
    """Each different layout of every Format (levels -1 to 3 and tables) and of every register."""
    found: dict[frozenset[Field], tuple[str, Layout]] = {}
    flags = product(Granule, *[(False, True)] * 6)
    for granule, ds, el0, pie, poe, aie, lpa in flags:
        fmt = Format(granule, ds=ds, el0=el0, pie=pie, poe=poe, aie=aie, lpa=lpa)
        on = "+".join(n for n in ("ds", "el0", "pie", "poe", "aie", "lpa") if getattr(fmt, n))
        for level in range(LOWEST[granule] - (granule is Granule.K4 and ds), 4):
            layout = fmt.leaf(level)
            found.setdefault(frozenset(layout), (f"{layout.name} {on}", layout))
        found.setdefault(frozenset(fmt.table(1)), (f"{fmt.table(1).name} {on}", fmt.table(1)))
    for layout in vars(registers).values():
        if isinstance(layout, Layout):
            found.setdefault(frozenset(layout), (layout.name, layout))
    return dict(found.values())


LAYOUTS = every_layout()
FIELDS = {f"{f.name} {f.bits}": f for layout in LAYOUTS.values() for f in layout}


def by_string(field: Field, word: int) -> int:
    """A field's value read off the word's binary digits, span by span."""
    digits = f"{word:064b}"
    return sum(int(digits[64 - s.lo - s.width : 64 - s.lo], 2) << s.at for s in field.spans)


def random_words(name: str, n: int) -> np.ndarray:
    return np.frombuffer(random.Random(f"{SEED} {name}").randbytes(8 * n), np.uint64)


@pytest.fixture(scope="module")
def chunks() -> np.ndarray:
    return random_words("chunks", CHUNK * CHUNKS).reshape(CHUNKS, CHUNK)


def test_there_are_layouts_of_every_kind() -> None:
    assert len(LAYOUTS) > 200
    for name in ("TCR_EL1", "TCR_EL2", "TCR_EL3", "ESR_ELx (abort)", "PAR_EL1 (F=0)", "PAR_EL1 (F=1)", "MAIR_ELx"):
        assert name in LAYOUTS


# The partition.


def test_fields_that_overlap_are_refused_by_name_and_bits() -> None:
    with pytest.raises(ValueError, match=r"^toy: LOW overlaps bits 0x30$"):
        Layout("toy", (bits("HIGH", 63, 4), bits("LOW", 5, 0)))


def test_unnamed_bits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^toy: unnamed bits 0x10$"):
        Layout("toy", (bits("HIGH", 63, 5), bits("LOW", 3, 0)))


def test_a_name_used_twice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^toy: A is named twice$"):
        Layout("toy", (bits("A", 63, 32), bits("B", 31, 16), bits("A", 15, 0)))


def test_a_field_whose_own_spans_overlap_is_refused() -> None:
    twisted = Field("X", (Span(0, 2), Span(1, 2, 2)))
    with pytest.raises(ValueError, match=r"^toy: X .*overlap"):
        Layout("toy", (twisted, bits("B", 2, 1), bits("C", 63, 4)))


def test_a_layout_may_have_another_width() -> None:
    assert len(Layout("byte", (bits("A", 7, 4), bits("B", 3, 0)), width=8).fields) == 2
    with pytest.raises(ValueError, match="byte: unnamed bits"):
        Layout("byte", (bits("A", 8, 4), bits("B", 3, 0)), width=8)


def test_every_bit_of_every_layout_has_exactly_one_name() -> None:
    for name, layout in LAYOUTS.items():
        owners = [[f.name for f in layout if f.mask >> bit & 1] for bit in range(64)]
        assert [len(o) for o in owners] == [1] * 64, name


# Scalar against array against bit strings.


def test_every_field_reads_the_bits_that_a_string_has_there_from_one_word_and_from_an_array() -> None:
    words = random_words("strings", 100)
    for name, field in FIELDS.items():
        array = field.get(words)
        assert array.dtype == np.uint64, name
        values = [field.get(word) for word in words.tolist()]
        assert {type(value) for value in values} == {int}, name
        assert values == array.tolist() == [by_string(field, word) for word in words.tolist()], name


def test_what_is_put_into_a_field_is_got_back_and_no_other_bit_moves(chunks: np.ndarray) -> None:
    for name, field in FIELDS.items():
        for words in chunks:
            values = words[::-1] & np.uint64(field.value_mask)
            put = field.put(words, values)
            assert put.dtype == np.uint64, name
            assert np.array_equal(field.get(put), values), name
            assert not ((put ^ words) & np.uint64(U64 ^ field.mask)).any(), name
        some = zip(words[:30].tolist(), values[:30].tolist(), strict=True)
        assert [field.put(word, value) for word, value in some] == put[:30].tolist(), name
        one = int(values[0])
        assert field.get(field.put(words[:9], one)).tolist() == [one] * 9, name


def test_the_unpacked_fields_of_every_layout_pack_to_the_same_word(chunks: np.ndarray) -> None:
    different = {frozenset(f.spans for f in layout): (name, layout) for name, layout in LAYOUTS.items()}
    for name, layout in different.values():
        for words in chunks:
            packed = np.zeros(CHUNK, np.uint64)
            for field in layout:
                packed = field.put(packed, field.get(words))
            assert np.array_equal(packed, words), name
        for word in chunks[0][:10].tolist():
            assert layout.pack(**layout.unpack(word)) == layout.pack(U64, **layout.unpack(word)) == word, name


def test_arrays_of_any_shape_keep_it() -> None:
    field = Format().leaf(3)["OA"]
    words = random_words("shape", 24).reshape(2, 3, 4)
    assert field.get(words).shape == field.put(words, 0x5000).shape == (2, 3, 4)


# Split fields and addresses in place.


def test_an_lpa2_output_address_has_its_top_bits_in_9_8() -> None:
    oa = Format(ds=True).leaf(3)["OA"]
    assert oa.bits == "49:12,9:8"
    assert str(oa) == "OA[49:12,51:50]"
    assert oa.get(1 << 8) == 1 << 50
    assert oa.get(1 << 9) == 1 << 51
    assert oa.get(1 << 49) == 1 << 49
    assert oa.put(0, 0x000F_FFFF_FFFF_F000) == 0x0003_FFFF_FFFF_F300


def test_an_lpa_output_address_has_its_top_bits_in_15_12() -> None:
    oa = Format(Granule.K64).leaf(3)["OA"]
    assert oa.bits == "47:16,15:12"
    assert oa.get(0xA000) == 0x000A_0000_0000_0000
    assert oa.put(0, 0x000A_0000_8000_0000) == 0x0000_0000_8000_A000


def test_piindex_collects_four_bits_from_three_places() -> None:
    index = Format(pie=True).leaf(3)["PIIndex"]
    assert [index.put(0, 1 << i) for i in range(4)] == [1 << 6, 1 << 51, 1 << 53, 1 << 54]


# What does not fit.


@pytest.mark.parametrize(
    ("fmt", "field", "value", "message"),
    [
        (Format(), "OA", 0x123, r"^OA\[47:12\] cannot hold 0x123$"),
        (Format(), "OA", 1 << 48, r"^OA\[47:12\] cannot hold 0x1000000000000$"),
        (Format(ds=True), "OA", 1 << 52, r"^OA\[49:12,51:50\] cannot hold 0x10000000000000$"),
        (Format(Granule.K64), "OA", 0x1000, r"^OA\[47:16,51:48\] cannot hold 0x1000$"),
        (Format(), "AP", 4, r"^AP cannot hold 0x4$"),
        (Format(), "AF", -1, r"^AF cannot hold -0x1$"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_by_field_bits_and_value(
    fmt: Format, field: str, value: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        fmt.leaf(3).pack(**{field: value})


def test_an_array_with_one_bad_value_names_that_value() -> None:
    oa = Format().leaf(3)["OA"]
    with pytest.raises(ValueError, match=r"^OA\[47:12\] cannot hold 0x5008$"):
        oa.put(np.zeros(3, np.uint64), np.array([0x1000, 0x5008, 0x2000], np.uint64))


def test_an_unknown_field_is_named_with_its_layout() -> None:
    with pytest.raises(KeyError, match="4K level 3 page has no field APTable"):
        Format().leaf(3).pack(APTable=1)
    with pytest.raises(KeyError, match="4K table has no field AP"):
        Format().table(0)["AP"]
    assert "AF" in Format().leaf(3)
    assert "APTable" not in Format().leaf(3)


# Views, explanations, differences.


def test_a_view_reads_fields_as_attributes_of_a_word_and_of_an_array() -> None:
    page = Format().leaf(3)
    assert page.view(0x00E8_0000_4000_0703).OA == 0x4000_0000
    assert page.view(np.array([0x703, 0x303], np.uint64)).AF.tolist() == [1, 0]
    assert repr(page.view(0x703)) == "4K level 3 page(0x0000000000000703)"
    assert repr(page.view(np.zeros((2, 3), np.uint64))) == "4K level 3 page(array of (2, 3))"


def test_a_view_has_no_field_that_its_layout_lacks() -> None:
    with pytest.raises(AttributeError, match=r"^4K level 3 page has no field APTable$"):
        Format().leaf(3).view(0).APTable  # noqa: B018  the attribute is the test
    assert not hasattr(View(Format().table(1), 0), "AP")


def test_explain_names_every_field_from_the_top_with_value_and_meaning() -> None:
    toy = Layout("toy", (bits("TOP", 63, 4, "the rest"), bits("LOW", 3, 0, "low", {5: "five"})))
    assert toy.explain(0x25) == [Meaning(toy["TOP"], 2, "the rest"), Meaning(toy["LOW"], 5, "five")]
    assert [m.text for m in toy.explain(0x26)] == ["the rest", "low"]
    explained = {m.field.name: (m.value, m.text) for m in Format().leaf(3).explain(0x00E8_0000_4000_0783)}
    assert explained["AP"] == (2, "EL1 read-only, EL0 none")
    assert explained["SH"] == (3, "inner shareable")
    assert list(explained) == [f.name for f in Format().leaf(3)]


def test_misuse_lists_the_reserved_fields_that_do_not_hold_what_they_must() -> None:
    toy = Layout("toy", (bits("A", 63, 8), res1(7, 6), res0(5, 4), ignored(3, 2), res0(1), res1(0)))
    assert [f.name for f in toy.misuse(0)] == ["RES1_7_6", "RES1_0"]
    assert [f.name for f in toy.misuse(0b0100_0001)] == ["RES1_7_6"], "one of two RES1 bits is not enough"
    assert toy.misuse(0b1100_1101) == []
    assert [f.name for f in toy.misuse(0b1101_0011)] == ["RES0_5_4", "RES0_1"]


@pytest.mark.parametrize(
    ("fmt", "level", "word", "names"),
    [
        (Format(), 3, 1 << 48, ["RES0_49_48"]),
        (Format(), 2, 1 << 12, ["RES0_15_12"]),
        (Format(), 2, 1 << 17, ["RES0_20_17"]),
        (Format(), 2, 1 << 16, []),  # nT has a meaning
        (Format(el0=False), 3, 1 << 53, ["PXN"]),
        (Format(Granule.K64), 3, 1 << 48, ["RES0_49_48"]),
        (Format(Granule.K64, lpa=False), 3, 1 << 12, ["RES0_15_12"]),
        (Format(ds=True), 3, 1 << 48, []),
    ],
)
def test_misuse_of_a_leaf(fmt: Format, level: int, word: int, names: list[str]) -> None:
    assert [f.name for f in fmt.leaf(level).misuse(word)] == names


def test_changed_names_the_fields_that_differ_lowest_first() -> None:
    page = Format().leaf(3)
    assert page.changed(0x00E8_0000_4000_0703, 0x00E8_0000_4000_0F02) == {"VALID": (1, 0), "nG": (0, 1)}
    assert page.changed(0x703, 0x703) == {}
    assert page.changed(0x0000_0000_4000_0703, 0x0000_0000_5000_0783) == {
        "AP": (0, 2),
        "OA": (0x4000_0000, 0x5000_0000),
    }


def test_rows_keep_an_address_in_place_and_count_other_fields_from_bit_0() -> None:
    assert bits("F", 9, 8).get(0x300) == 3
    assert address("A", (47, 12)).get(0xFFFF_FFFF_FFFF_FFFF) == 0x0000_FFFF_FFFF_F000
    assert bits("F", 5).mask == 0x20
    assert Span(4, 3, 1).mask == 0x70
    assert Span(4, 3, 1).value_mask == 0xE


def test_a_mask_is_the_bits_of_the_named_fields() -> None:
    assert Format().leaf(3).mask("VALID", "AF", "UXN") == 1 | 1 << 10 | 1 << 54
