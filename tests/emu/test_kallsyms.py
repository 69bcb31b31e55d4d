"""emu.kallsyms and emu.relocate against images made by hand, and against vmlinux-to-elf on real kernels."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from emu import kallsyms, relocate
from tests.emu import synthetic
from tests.kernels import KERNELS, MORE, kernel_path, lack

ORDERS = ("offsets first, seqs before tokens", "offsets first", "offsets behind tokens")


def as_array(content: bytes) -> np.ndarray:
    return np.frombuffer(bytes(content), np.uint8)


def located(image: np.ndarray) -> tuple[kallsyms.Table, int, list[int]]:
    """The table, the base and every symbol's address."""
    table = kallsyms.read(image)
    base = relocate.link_base(image, table)
    shift = relocate.symbol_shift(image, table, base)
    return table, base, [base + shift + offset for offset in table.offsets.tolist()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("align", [4, 8])
@pytest.mark.parametrize("form", ["base", "self"])
@pytest.mark.parametrize("relocation", ["rela", "relr", "none"])
def test_every_order_alignment_and_form_gives_names_types_and_addresses(
    order: str, align: int, form: str, relocation: str
) -> None:
    made = synthetic.make(order=order, align=align, form=form, relocation=relocation)
    table, base, addresses = located(as_array(made.content))
    assert base == made.base
    got = sorted(zip(table.names, map(chr, table.types.tolist()), addresses, strict=True))
    assert got == made.rows()


@pytest.mark.parametrize("base", [0xFFFFFFC080000000, 0xFFFF800008000000, 0xFFFFC00080000000, 0xFFFFFC0008000000])
@pytest.mark.parametrize("form", ["base", "self"])
@pytest.mark.parametrize("relocation", ["rela", "relr"])
def test_the_base_is_found_wherever_it_is(base: int, form: str, relocation: str) -> None:
    made = synthetic.make(base=base, form=form, relocation=relocation)
    assert located(as_array(made.content))[1] == base


def test_names_of_more_than_127_tokens_have_a_length_of_two_bytes() -> None:
    assert len(synthetic.compress("T" + synthetic.LONG_NAME)) > 127
    table = kallsyms.read(as_array(synthetic.make().content))
    assert synthetic.LONG_NAME in table.names
    assert synthetic.LONG_NAME + "_2" in table.names


@pytest.mark.parametrize("count", [642, 767, 768, 769, 1024])
def test_the_last_group_may_be_full_or_not(count: int) -> None:
    symbols = synthetic.default_symbols(count - 2)
    made = synthetic.make(symbols=symbols, relocation="none")
    assert len(kallsyms.read(as_array(made.content))) == count


def test_a_table_of_functions_only_begins_64_kib_above_text() -> None:
    symbols = [s for s in synthetic.default_symbols() if s.name != "_text"]
    made = synthetic.make(symbols=symbols, relocation="rela", order=ORDERS[0])
    table, base, addresses = located(as_array(made.content))
    assert (base, table.offsets[0], addresses[0]) == (made.base, 0, made.base + synthetic.STEXT)


# Each breaks what ties one table to the others; a letter in a token could be anything and is not noticed.
BREAKS = {
    "names": (0, b"\x7f" * 300),
    "markers": (6, b"\xff"),
    "token_table": (700, b"\0"),
    "token_index": (6, b"\xff"),
    "offsets": (403, b"\xff"),
    "num_syms": (1, b"\xff"),
}


@pytest.mark.parametrize("part", BREAKS)
def test_tables_that_do_not_agree_are_not_read_as_something_else(part: str) -> None:
    made = synthetic.make()
    where, wrong = BREAKS[part]
    at = made.places[part] + where
    made.content[at : at + len(wrong)] = wrong
    with pytest.raises(kallsyms.KallsymsError):
        kallsyms.read(as_array(made.content))


def test_an_image_without_tables_has_none() -> None:
    with pytest.raises(kallsyms.KallsymsError):
        kallsyms.read(np.zeros(1 << 16, np.uint8))
    # The digits are in many tables of any kernel; alone they are no sign.
    digits = bytes(5000) + b"".join(b"%d\0" % d for d in range(10)) + b"x\0" * 5000
    with pytest.raises(kallsyms.KallsymsError):
        kallsyms.read(as_array(digits))


def words_at(image: np.ndarray, offsets: list[int]) -> list[int]:
    return [int.from_bytes(image[at : at + 8].tobytes(), "little") for at in offsets]


@pytest.mark.parametrize("relocation", ["rela", "relr"])
@pytest.mark.parametrize("by", [0, 0x200000, 0x1234560000, -0x40000000])
def test_relocation_moves_each_pointer_once_and_nothing_else(relocation: str, by: int) -> None:
    made = synthetic.make(relocation=relocation)
    image = as_array(made.content)
    span = made_span(made, relocation)
    found = relocate.find(image, made.base, **{relocation: span})
    moved = found.move(image, by)
    assert words_at(moved, list(made.pointers)) == [value + by for value in made.pointers.values()]
    untouched = np.ones(len(image), bool)
    for at in made.pointers:
        untouched[at : at + 8] = False
    assert np.array_equal(moved[untouched], image[untouched])


def made_span(made: synthetic.Made, kind: str) -> tuple[int, int]:
    ends = {s.name: s.offset for s in made.symbols}
    return ends[f"__pi_{kind}_start"], ends[f"__pi_{kind}_end"]


@pytest.mark.parametrize("relr", [False, True])
def test_a_list_of_relocations_that_is_damaged_is_refused(relr: bool) -> None:
    made = synthetic.make()
    image = as_array(made.content).copy()
    start, end = made_span(made, "relr")
    with pytest.raises(relocate.RelocationError, match="lies outside the file"):
        relocate.find(image[: end - 8], made.base, **{"relr" if relr else "rela": (start, end)})
    image[start] |= 1
    with pytest.raises(relocate.RelocationError, match="does not begin with a place"):
        relocate.find(image, made.base, relr=(start, end))


def test_a_relr_table_of_functions_only_has_its_base_64_kib_below_its_first_symbol() -> None:
    symbols = [s for s in synthetic.default_symbols() if s.name != "_text"]
    made = synthetic.make(symbols=symbols, relocation="relr")
    _, base, addresses = located(as_array(made.content))
    assert (base, addresses[0]) == (made.base, made.base + synthetic.STEXT)


@pytest.mark.parametrize("distance", [0x1230, 2 << 20])
def test_a_row_that_looks_like_that_of_the_kallsyms_base_does_not_mislead(distance: int) -> None:
    # Its addend is its place less where the base's word is; only the step of 2 MiB or the other rows refute it.
    gap = distance + 0x40000
    first = synthetic.make(relocation="rela", data=bytes(gap))
    at = first.places["data"] + 8 * ((first.places["relative_base"] - distance - first.places["data"]) // 8)
    wrong = first.base + at - first.places["relative_base"]
    pointers = {at - first.places["data"]: wrong}
    grown = synthetic.make(relocation="rela", data=bytes(gap), data_pointers=pointers)
    moved = grown.places["relative_base"] - first.places["relative_base"]
    pointers = {at + moved - first.places["data"]: wrong}
    made = synthetic.make(relocation="rela", data=bytes(gap), data_pointers=pointers)
    assert made.base + at + moved - made.places["relative_base"] == wrong
    assert (wrong % (2 << 20) == 0) == (distance == 2 << 20)
    assert located(as_array(made.content))[1] == made.base


def test_a_lone_row_in_an_image_without_others_is_an_accident() -> None:
    made = synthetic.make(relocation="none", data=bytes(64))
    image, at = as_array(made.content).copy(), made.places["data"]
    row = np.array([made.base + at + 40, 1027, made.base], "<u8")
    image[at : at + 24] = np.frombuffer(row.tobytes(), np.uint8)
    assert len(relocate.find(image, made.base).rows) == 0


@pytest.mark.parametrize("named", [False, True], ids=["by shape", "by symbols"])
def test_rela_rows_are_found_and_ordinary_numbers_are_not_taken_for_rows(named: bool) -> None:
    # A netlink policy: a pointer, the number 1027, something small. Real kernels have three of these; here they lie
    # at every distance from the real rows, modulo the size of a row.
    made = synthetic.make(relocation="rela", data=bytes(256))
    image, at = as_array(made.content).copy(), made.places["data"]
    for k in range(3):
        row = np.array([made.base + at + 200 + 8 * k, 1027, 0x10000], "<u8")
        image[at + 32 * k : at + 32 * k + 24] = np.frombuffer(row.tobytes(), np.uint8)
    moved = relocate.find(image, made.base, rela=made_span(made, "rela") if named else None).move(image, 0)
    assert words_at(moved, [at + 200, at + 208, at + 216]) == [0, 0, 0]
    assert words_at(moved, list(made.pointers)) == list(made.pointers.values())


def test_a_kernel_whose_relocations_are_not_found_is_not_moved() -> None:
    made = synthetic.make(relocation="relr")
    found = relocate.find(as_array(made.content), made.base)
    assert found.move(as_array(made.content), 0).tobytes() == bytes(made.content)
    with pytest.raises(relocate.RelocationError, match="not found"):
        found.move(as_array(made.content), 0x200000)


def test_pointers_that_fit_no_address_better_than_others_give_no_base() -> None:
    made = synthetic.make(form="self", relocation="none")
    image = as_array(made.content).copy()
    for at in made.pointers:
        image[at : at + 8] = np.frombuffer(int(made.base + 3 * at + 1).to_bytes(8, "little"), np.uint8)
    with pytest.raises(relocate.RelocationError, match="do not agree"):
        relocate.link_base(image, kallsyms.read(image))


# real kernels


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_the_symbols_of_a_real_kernel_are_read_in_under_a_second(name: str) -> None:
    image = np.fromfile(kernel_path(name), np.uint8)
    times = []
    for _ in range(3):  # the best of three: the machine may be busy with other tests
        start = time.process_time()
        table, _, _ = located(image)
        times.append(time.process_time() - start)
    print(f"{name}: {len(table)} symbols in {min(times):.2f} s")
    assert min(times) < 1
    assert len(table) > 40_000


def judge() -> str:
    """vmlinux-to-elf (PyPI): the known reader of kallsyms, a separate program."""
    beside = Path(sys.executable).with_name("vmlinux-to-elf")
    asked = os.environ.get("PGTABLE_VMLINUX_TO_ELF") or shutil.which("vmlinux-to-elf")
    if asked or beside.exists():
        return asked or str(beside)
    return lack(
        "kernels", "no vmlinux-to-elf: install it from PyPI in its own place, name it in PGTABLE_VMLINUX_TO_ELF"
    )


def judged_symbols(path: Path, elf_path: Path) -> Counter[tuple[str, int]]:
    subprocess.run([judge(), path, elf_path], check=True, capture_output=True)
    with elf_path.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        return Counter((s.name, s["st_value"]) for s in table.iter_symbols() if s.name)


@pytest.mark.full
@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS + MORE)
def test_vmlinux_to_elf_reads_the_same_names_and_addresses(name: str, tmp_path: Path) -> None:
    path = kernel_path(name)
    judge()
    start = time.process_time()
    theirs = judged_symbols(path, tmp_path / "vmlinux")
    middle = time.process_time()
    table, base, addresses = located(np.fromfile(path, np.uint8))
    end = time.process_time()
    ours = Counter(zip(table.names, addresses, strict=True))
    # Without a relative base (7.x) the judge takes the header's image_size for the link address; ours is judged by
    # what runs there (facts 0.2) and by the pointers in the image.
    shift = 0 if table.base_at is not None else min(addresses) - min(address for _, address in theirs)
    assert shift == 0 or base % (2 << 20) == 0
    moved = Counter({(symbol, address + shift): count for (symbol, address), count in theirs.items()})
    print(f"{name}: {len(table)} symbols, base {base:#x}, ours {end - middle:.2f} s, judge {middle - start:.1f} s")
    assert ours == moved
