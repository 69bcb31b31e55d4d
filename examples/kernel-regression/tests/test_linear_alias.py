"""set_memory_ro() on a part of a vmalloc area: which linear aliases become read-only.

Until 2025 it was those of the whole area, whatever was asked (change_memory_common, arch/arm64/mm/pageattr.c): data of
the area's other users could no longer be written through the linear map. Since then only those of the pages asked for.
"""

from __future__ import annotations

import pytest

from emu.assertions import assert_only_changed
from emu.booted import VmArea
from emu.warm import WarmMachine

PAGES = 6


def area(machine: WarmMachine) -> VmArea:
    return VmArea.at(machine, machine.call("vmalloc", PAGES * machine.plan.page_size).ok().value)


@pytest.mark.pgtable_kernels(">=7")
def test_only_the_aliases_of_the_pages_asked_for(booted: WarmMachine) -> None:
    found = area(booted)
    result = booted.call("set_memory_ro", found.va(1), 2)
    assert_only_changed(result, found.vas(1, 2) | found.aliases(1, 2), AP=(0, 2), DBM=(1, 0))


@pytest.mark.pgtable_kernels("<6.18")
def test_the_test_above_sees_the_bug_where_it_is(booted: WarmMachine) -> None:
    found = area(booted)
    result = booted.call("set_memory_ro", found.va(1), 2)
    with pytest.raises(AssertionError, match=f"{PAGES + 2} descriptors changed, 4 expected"):
        assert_only_changed(result, found.vas(1, 2) | found.aliases(1, 2), AP=(0, 2), DBM=(1, 0))
    assert_only_changed(result, found.vas(1, 2) | found.aliases(), AP=(0, 2), DBM=(1, 0))


def test_writable_again_every_alias_is_as_before(booted: WarmMachine) -> None:
    found = area(booted)
    before = [booted.translate(va) for va in found.linear]
    booted.call("set_memory_ro", found.va(0), PAGES).ok()
    booted.call("set_memory_rw", found.va(0), PAGES).ok()
    assert [booted.translate(va).result for va in found.linear] == [walk.result for walk in before]
