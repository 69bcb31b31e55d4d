"""PhysicalMemory: regions, words, bytes, marks, copy-on-write copies, raw dumps. Judge: plain dicts and bytearrays."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest

from pgtable import Memory, NoMemory, PhysicalMemory
from pgtable.memory import Mark, difference

BASE = 0x4000_0000
PAGE = 4096


@pytest.fixture
def two() -> PhysicalMemory:
    """Two adjacent regions and one further up."""
    return PhysicalMemory((BASE, 2 * PAGE), (BASE + 2 * PAGE, PAGE), (BASE + 0x10_0000, PAGE))


# Regions.


@pytest.mark.parametrize(
    ("base", "size", "message"),
    [
        (BASE + 8, PAGE, r"^RAM at 0x40000008, 0x1000 bytes: both must be multiples of 0x1000$"),
        (BASE, PAGE + 8, r"^RAM at 0x40000000, 0x1008 bytes: both must be multiples of 0x1000$"),
        (BASE, 0, r"^RAM at 0x40000000, 0x0 bytes: both must be multiples"),
        (BASE, -PAGE, r"^RAM at 0x40000000, -0x1000 bytes: both must be multiples"),
        (-PAGE, PAGE, r"^RAM at -0x1000, 0x1000 bytes: physical addresses end at 2\^56$"),
        ((1 << 56) - PAGE, 2 * PAGE, r"physical addresses end at 2\^56$"),
        (1 << 56, PAGE, r"physical addresses end at 2\^56$"),
    ],
)
def test_a_region_that_cannot_be_is_refused(base: int, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PhysicalMemory((base, size))


@pytest.mark.parametrize("other", [(BASE, PAGE), (BASE - PAGE, 2 * PAGE), (BASE + 2 * PAGE, 9 * PAGE), (0, 1 << 40)])
def test_overlapping_regions_are_refused_and_the_first_is_named(other: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"overlaps the region at 0x40000000$"):
        PhysicalMemory((BASE, 3 * PAGE), other)
    with pytest.raises(ValueError, match=r"overlaps the region at 0x40000000$"):
        PhysicalMemory((BASE, 3 * PAGE)).add(*other)


def test_a_refused_region_leaves_the_others_as_they_were() -> None:
    memory = PhysicalMemory((BASE, PAGE))
    with pytest.raises(ValueError, match="overlaps"):
        memory.add(BASE, PAGE)
    assert repr(memory) == "PhysicalMemory((0x40000000, 0x1000))"


def test_regions_are_kept_in_address_order_and_may_touch() -> None:
    memory = PhysicalMemory((BASE + PAGE, PAGE), (0, PAGE), (BASE, PAGE))
    assert [r.base for r in memory.regions] == [0, BASE, BASE + PAGE]
    assert repr(memory) == "PhysicalMemory((0x0, 0x1000), (0x40000000, 0x1000), (0x40001000, 0x1000))"


def test_buffers_are_page_aligned_for_an_engine_that_shares_them(two: PhysicalMemory) -> None:
    for region in two.regions:
        assert region.address % PAGE == 0
        assert len(region.buffer) == region.size == 8 * len(region.words)


def test_the_top_of_the_address_space_is_usable() -> None:
    memory = PhysicalMemory(((1 << 56) - PAGE, PAGE))
    memory.store((1 << 56) - 8, 7)
    assert memory.fetch((1 << 56) - 8) == 7
    words, there = memory.gather(np.array([(1 << 56) - 8, 1 << 56, 0], np.uint64))
    assert words.tolist() == [7, 0, 0]
    assert there.tolist() == [True, False, False]


# Words.


def test_memory_begins_as_zeros_and_keeps_what_is_stored(two: PhysicalMemory, rng: random.Random) -> None:
    model = {}
    for _ in range(300):
        region = rng.choice(two.regions)
        pa = region.base + 8 * rng.randrange(region.size // 8)
        model[pa] = rng.getrandbits(64)
        two.store(pa, model[pa])
    for region in two.regions:
        for pa in range(region.base, region.base + region.size, 8):
            assert two.fetch(pa) == model.get(pa, 0)
    assert {type(two.fetch(pa)) for pa in model} == {int}


@pytest.mark.parametrize("pa", [0, BASE - 8, BASE + 3 * PAGE, BASE + 0x10_0000 - 8, BASE + 0x10_1000, 1 << 60])
def test_where_there_is_no_ram_the_address_is_named(two: PhysicalMemory, pa: int) -> None:
    for call in (two.fetch, two.region_of, lambda at: two.words(at, 1), lambda at: two.store(at, 1)):
        with pytest.raises(NoMemory, match=rf"^no memory at PA {pa:#x}$") as error:
            call(pa)
        assert error.value.pa == pa
    assert pa not in two
    assert isinstance(NoMemory(pa), LookupError)


def test_memory_without_regions_has_nothing() -> None:
    with pytest.raises(NoMemory):
        PhysicalMemory().fetch(0)
    with pytest.raises(NoMemory):
        PhysicalMemory().region_of(0)


@pytest.mark.parametrize("low", range(1, 8))
def test_unaligned_words_are_refused(two: PhysicalMemory, low: int) -> None:
    for call in (two.fetch, lambda at: two.words(at, 1), lambda at: two.store(at, 1)):
        with pytest.raises(ValueError, match=rf"^PA 0x4000000{low} is not 8-byte aligned$"):
            call(BASE | low)


def test_words_are_a_view_and_end_with_the_region(two: PhysicalMemory) -> None:
    view = two.words(BASE + 8, 4)
    view[1] = 5
    assert two.fetch(BASE + 16) == 5
    assert view.dtype == np.uint64
    two.store(BASE + 8, 9)
    assert view[0] == 9
    with pytest.raises(NoMemory) as error:
        two.words(BASE + 2 * PAGE - 8, 2)
    assert error.value.pa == BASE + 2 * PAGE


def test_physical_memory_is_a_memory(two: PhysicalMemory) -> None:
    assert isinstance(two, Memory)


# Gathers.


def test_gather_equals_fetch_address_by_address(two: PhysicalMemory, rng: random.Random) -> None:
    for region in two.regions:
        region.words[:] = np.frombuffer(rng.randbytes(region.size), np.uint64)
    pas = [rng.randrange(BASE - 2 * PAGE, BASE + 6 * PAGE) & ~7 for _ in range(500)]
    pas += [BASE + 0x10_0000 + 8 * rng.randrange(512) for _ in range(50)] + [0, (1 << 64) - 8]
    words, there = two.gather(np.array(pas, np.uint64).reshape(-1, 2))
    assert words.shape == there.shape == (len(pas) // 2, 2)
    for pa, word, here in zip(pas, words.ravel().tolist(), there.ravel().tolist(), strict=True):
        assert here is (pa in two)
        assert word == (two.fetch(pa) if here else 0)


@pytest.mark.parametrize("n", [1, 16, 512])
def test_tables_equal_fetch_word_by_word(two: PhysicalMemory, rng: random.Random, n: int) -> None:
    for region in two.regions:
        region.words[:] = np.frombuffer(rng.randbytes(region.size), np.uint64)
    pas = [BASE, BASE + PAGE, BASE + 2 * PAGE, BASE + 3 * PAGE, BASE + 0x10_0000, 0, BASE - PAGE, 1 << 50]
    found, there = two.tables(np.array(pas, np.uint64), n)
    assert found.shape == (len(pas), n)
    for pa, row, here in zip(pas, found.tolist(), there.tolist(), strict=True):
        assert here is (pa in two)
        assert row == [two.fetch(pa + 8 * i) if pa + 8 * i in two else 0 for i in range(n)]


def test_a_table_that_leaves_its_region_goes_on_in_the_next_one_or_is_zero_from_there_on(two: PhysicalMemory) -> None:
    for region in two.regions:
        region.words[:] = 1 + np.arange(len(region.words), dtype=np.uint64)
    pas = np.array([BASE + PAGE, BASE + 2 * PAGE, BASE + 0x10_0000, BASE + 3 * PAGE], np.uint64)
    found, there = two.tables(pas, 1024)
    assert there.tolist() == [True, True, True, False]
    first = list(range(1, 513))
    assert found.tolist() == [[*range(513, 1025), *first], first + [0] * 512, first + [0] * 512, [0] * 1024]


def test_a_table_larger_than_the_ram_at_0_has_what_there_is() -> None:
    memory = PhysicalMemory((0, PAGE))
    memory.store(8, 7)
    found, there = memory.tables(np.array([0], np.uint64), 8192)
    assert there.tolist() == [True]
    assert (found.shape, int(found[0, 1]), int(found.sum())) == ((1, 8192), 7, 7)


# Bytes.


def test_bytes_are_the_little_endian_words(two: PhysicalMemory) -> None:
    two.store(BASE, 0x0102_0304_0506_0708)
    assert two.read(BASE, 8) == bytes([8, 7, 6, 5, 4, 3, 2, 1])
    two.write(BASE + 3, b"\xaa")
    assert two.fetch(BASE) == 0x0102_0304_AA06_0708


def test_reads_and_writes_cross_adjacent_regions(two: PhysicalMemory, rng: random.Random) -> None:
    model = bytearray(3 * PAGE)
    for _ in range(100):
        start = rng.randrange(3 * PAGE)
        data = rng.randbytes(rng.randrange(1, 3 * PAGE - start + 1))
        two.write(BASE + start, data)
        model[start : start + len(data)] = data
        at = rng.randrange(3 * PAGE)
        n = rng.randrange(3 * PAGE - at + 1)
        assert two.read(BASE + at, n) == model[at : at + n]
    assert two.read(BASE, 0) == b""


def test_a_read_of_missing_bytes_names_the_first_of_them(two: PhysicalMemory) -> None:
    with pytest.raises(NoMemory) as error:
        two.read(BASE + 3 * PAGE - 4, 8)
    assert error.value.pa == BASE + 3 * PAGE


def test_nothing_is_written_if_a_part_has_no_ram(two: PhysicalMemory) -> None:
    two.write(BASE + 3 * PAGE - 4, b"abcd")
    with pytest.raises(NoMemory) as error:
        two.write(BASE + 3 * PAGE - 4, b"12345678")
    assert error.value.pa == BASE + 3 * PAGE
    assert two.read(BASE + 3 * PAGE - 4, 4) == b"abcd"


# Marks.


def test_changes_are_the_words_that_differ_in_address_order(two: PhysicalMemory) -> None:
    two.store(BASE + 16, 3)
    mark = two.mark()
    assert len(two.changes(mark).pa) == 0
    two.store(BASE + 0x10_0008, 1)
    two.store(BASE + 16, 4)
    two.store(BASE + 2 * PAGE, 5)
    two.store(BASE + 8, 6)
    two.store(BASE + 8, 0)
    changes = two.changes(mark)
    assert changes.pa.tolist() == [BASE + 16, BASE + 2 * PAGE, BASE + 0x10_0008]
    assert changes.old.tolist() == [3, 0, 0]
    assert changes.new.tolist() == [4, 5, 1]
    assert {a.dtype for a in changes} == {np.dtype(np.uint64)}


def test_a_mark_of_some_ranges_sees_only_those(two: PhysicalMemory) -> None:
    mark = two.mark([(BASE + PAGE, PAGE), (BASE, 16)])
    for pa in (BASE, BASE + 16, BASE + PAGE + 8, BASE + 2 * PAGE):
        two.store(pa, 1)
    assert two.changes(mark).pa.tolist() == [BASE, BASE + PAGE + 8]


def test_restore_puts_a_marks_words_back(two: PhysicalMemory, rng: random.Random) -> None:
    for region in two.regions:
        region.words[:] = np.frombuffer(rng.randbytes(region.size), np.uint64)
    mark, before = two.mark(), two.read(BASE, 3 * PAGE)
    two.write(BASE, rng.randbytes(3 * PAGE))
    assert len(two.changes(mark).pa) > 1000
    two.restore(mark)
    assert two.read(BASE, 3 * PAGE) == before
    assert len(two.changes(mark).pa) == 0


def test_marks_are_compared_by_content(two: PhysicalMemory) -> None:
    first, second = two.mark(), two.mark()
    assert first.same_as(second)
    two.store(BASE, 1)
    assert not first.same_as(two.mark())
    assert not first.same_as(two.mark([(BASE, PAGE)]))


def words(*values: int) -> np.ndarray:
    return np.array(values, np.uint64)


def test_the_difference_of_two_marks_takes_what_only_the_later_has_as_zero_before() -> None:
    before = Mark(((0x1000, 2), (0x3000, 1)), (words(1, 2), words(9)))
    after = Mark(((0x5000, 2), (0x1000, 4)), (words(0, 7), words(1, 3, 0, 4)))
    found = difference(before, after)
    assert found.pa.tolist() == [0x1008, 0x1018, 0x5008]
    assert found.old.tolist() == [2, 0, 0]
    assert found.new.tolist() == [3, 4, 7]


def test_the_difference_of_empty_marks_is_empty() -> None:
    assert len(difference(Mark((), ()), Mark((), ())).pa) == 0


# Copies that cost nothing until written.


def test_two_thawed_copies_and_the_original_do_not_see_each_other(two: PhysicalMemory) -> None:
    two.store(BASE + 8, 1)
    frozen = two.freeze()
    a, b = frozen.thaw(), frozen.thaw()
    two.store(BASE + 8, 2)
    a.store(BASE + 8, 3)
    a.store(BASE + 0x10_0000, 4)
    assert [m.fetch(BASE + 8) for m in (two, a, b, frozen.thaw())] == [2, 3, 1, 1]
    assert [m.fetch(BASE + 0x10_0000) for m in (two, a, b)] == [0, 4, 0]
    frozen.close()
    assert (a.fetch(BASE + 8), b.fetch(BASE + 8)) == (3, 1), "thawed copies stay when the files are given back"


def test_frozen_content_is_all_of_it(rng: random.Random) -> None:
    memory = PhysicalMemory((BASE, 64 * PAGE), (0, 3 * PAGE))
    for page in (0, 1, 2, 9, 31, 33, 63):
        memory.write(BASE + page * PAGE, rng.randbytes(PAGE))
    memory.write(3 * PAGE - 8, b"lastword")
    frozen = memory.freeze()
    copy = frozen.thaw()
    assert repr(copy) == repr(memory)
    assert copy.read(BASE, 64 * PAGE) == memory.read(BASE, 64 * PAGE)
    assert copy.read(0, 3 * PAGE) == memory.read(0, 3 * PAGE)
    frozen.close()


def test_written_names_the_pages_written_since_the_thaw_and_no_other() -> None:
    memory = PhysicalMemory((BASE, 16 * PAGE), (0, 4 * PAGE))
    memory.write(BASE, bytes([7]) * 16 * PAGE)
    frozen = memory.freeze()
    copy = frozen.thaw()
    assert [len(numbers) for numbers, _ in copy.written().parts] == [0, 0]
    copy.read(BASE, 16 * PAGE)
    assert [len(numbers) for numbers, _ in copy.written().parts] == [0, 0], "reading is not writing"
    copy.store(BASE + 3 * PAGE, 1)
    copy.store(BASE + 9 * PAGE + 8, 2)
    copy.store(2 * PAGE, 3)
    low, high = copy.written().parts
    assert low[0].tolist() == [2]
    assert high[0].tolist() == [3, 9]
    assert (int(low[1][0, 0]), int(high[1][0, 0]), int(high[1][1, 1])) == (3, 1, 2)
    frozen.close()


def test_rewind_goes_back_to_the_thawed_content_or_to_given_pages() -> None:
    memory = PhysicalMemory((BASE, 8 * PAGE))
    memory.store(BASE, 1)
    frozen = memory.freeze()
    copy = frozen.thaw()
    view = copy.words(BASE, 1)
    copy.store(BASE, 2)
    copy.store(BASE + PAGE, 3)
    pages = copy.written()
    copy.store(BASE, 4)
    copy.store(BASE + 5 * PAGE, 5)
    copy.rewind()
    assert [copy.fetch(BASE + n * PAGE) for n in (0, 1, 5)] == [1, 0, 0]
    assert int(view[0]) == 1, "views stay valid"
    copy.rewind(pages)
    assert [copy.fetch(BASE + n * PAGE) for n in (0, 1, 5)] == [2, 3, 0]
    frozen.close()


def test_only_thawed_memory_knows_what_was_written() -> None:
    memory = PhysicalMemory((BASE, PAGE))
    for call in (memory.written, memory.rewind):
        with pytest.raises(ValueError, match=r"^RAM at 0x40000000 was not thawed from a frozen content$"):
            call()


def test_staged_memory_is_frozen_without_a_copy() -> None:
    memory = PhysicalMemory.staged((BASE, 4 * PAGE), (0, PAGE))
    memory.store(BASE + 8, 5)
    files = [r.file for r in memory.regions]
    assert all(file >= 0 for file in files)
    frozen = memory.freeze()
    assert [file for _, _, file in frozen.regions] == files
    a, b = frozen.thaw(), frozen.thaw()
    a.store(BASE + 8, 6)
    assert (a.fetch(BASE + 8), b.fetch(BASE + 8)) == (6, 5)
    frozen.close()


@pytest.mark.parametrize("regions", [((BASE, 100),), ((BASE, PAGE), (BASE, PAGE))])
def test_staged_memory_is_checked_like_any_other(regions: tuple[tuple[int, int], ...]) -> None:
    with pytest.raises(ValueError, match=r"^RAM at 0x40000000"):
        PhysicalMemory.staged(*regions)


# A raw dump.


def test_a_raw_dump_is_read_in_place_and_never_written(tmp_path: Path) -> None:
    path = tmp_path / "dump.raw"
    content = bytes(range(256)) * 32
    path.write_bytes(content)
    memory = PhysicalMemory.open(path, origin=BASE)
    assert memory.read(BASE, 2 * PAGE) == content
    assert memory.fetch(BASE) == int.from_bytes(content[:8], "little")
    memory.store(BASE, 0)
    memory.write(BASE + PAGE, b"changed")
    assert memory.fetch(BASE) == 0
    assert path.read_bytes() == content


@pytest.mark.parametrize("size", [0, 100, PAGE + 1])
def test_a_dump_that_is_no_whole_number_of_pages_is_refused(tmp_path: Path, size: int) -> None:
    path = tmp_path / "dump.raw"
    path.write_bytes(bytes(size))
    with pytest.raises(ValueError, match=rf"dump.raw: {size} bytes is not a whole number of 4096-byte pages$"):
        PhysicalMemory.open(path)


def test_a_dump_with_an_origin_that_is_no_page_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "dump.raw"
    path.write_bytes(bytes(PAGE))
    with pytest.raises(ValueError, match=r"^RAM at 0x40000010, 0x1000 bytes: both must be multiples"):
        PhysicalMemory.open(path, origin=BASE + 0x10)


def test_a_missing_dump_is_an_oserror(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PhysicalMemory.open(tmp_path / "none")
