"""Areas of vmalloc() as permission changes see them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from kernel_model import pageattr
from kernel_model.mm import Called
from kernel_model.vmalloc import PagesOverrun, VmFlags, VmStruct, find_vm_area, get_vm_area_size
from tests.kernel_model.bench import Bench

AREA, PAGE = 0xFFFF_8000_9000_0000, 0x1000
SIX_PAGES = VmStruct(AREA, 7 * PAGE, pages=tuple(range(0, 6 * PAGE, PAGE)))


def test_an_area_is_found_by_any_address_in_it_and_in_its_guard_page() -> None:
    kernel = Bench("debian:7.3")._kernel()
    behind = replace(SIX_PAGES, addr=AREA + 7 * PAGE)
    kernel.vm_areas = [behind, SIX_PAGES]
    assert find_vm_area(kernel, AREA - 1) is None
    for addr in (AREA, AREA + 0x123, AREA + 7 * PAGE - 1):
        assert find_vm_area(kernel, addr) is SIX_PAGES
    assert find_vm_area(kernel, AREA + 7 * PAGE) is behind


def test_the_guard_page_counts_unless_there_is_none() -> None:
    assert get_vm_area_size(SIX_PAGES, PAGE) == 6 * PAGE
    assert get_vm_area_size(replace(SIX_PAGES, flags=VmFlags.VM_ALLOC | VmFlags.VM_NO_GUARD), PAGE) == 7 * PAGE


def test_pages_are_those_of_the_area_unless_told_otherwise() -> None:
    assert SIX_PAGES.nr_pages == 6
    assert replace(SIX_PAGES, nr_pages=2).nr_pages == 2
    with pytest.raises(PagesOverrun, match=re.escape("pages[6] of the area at 0xffff800090000000: 6 are known")):
        SIX_PAGES.page(6)


def test_an_area_may_end_with_the_address_space() -> None:
    assert VmStruct(-PAGE & (1 << 64) - 1, PAGE).end == 0


def test_reading_behind_pages_is_told_where_the_kernel_would_use_what_is_there() -> None:
    kernel = Bench("debian:7.3")._kernel()
    kernel.vm_areas = [SIX_PAGES]
    with pytest.raises(PagesOverrun):
        pageattr.set_memory_ro(kernel, AREA, 7)
    assert pageattr.set_memory_nx(kernel, AREA, 7) == 0


@pytest.mark.parametrize("name", ["debian:6.1", "debian:6.12", "debian:7.3"])
@pytest.mark.parametrize(
    ("addr", "pages", "value"),
    [(AREA, 0, 0), (AREA + 7 * PAGE, 0, -22), (AREA, 7, 0), (AREA, 8, -22), (AREA - PAGE, 1, -22), (AREA, -1, None)],
)
def test_the_checks_and_their_order(name: str, addr: int, pages: int, value: int | None) -> None:
    kernel = Bench(name)._kernel()
    kernel.vm_areas = [SIX_PAGES]
    got = pageattr.set_memory_x(kernel, addr, pages)
    assert got == (-22 if value is None else value)  # -1 page ends below its start: the area has it, the walk has not
    assert (Called("vm_unmap_aliases") in kernel.events) == (value is None or (value == 0 and pages > 0))
