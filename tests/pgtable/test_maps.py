"""The named maps: each good one translates, each bad twin faults, by the Arm ARM's rules, and one bit lies between."""

from __future__ import annotations

import pytest

from pgtable import translate
from tests.maps import TWINS


@pytest.mark.parametrize("name", TWINS)
def test_the_good_map_translates_and_its_twin_with_one_bit_flipped_faults(name: str) -> None:
    twins = TWINS[name]
    good, bad = twins.good(), twins.bad()
    assert translate(good.memory, good.regs, good.va, twins.access).ok
    fault = translate(bad.memory, bad.regs, bad.va, twins.access).fault
    assert fault is not None
    assert (fault.type.value, fault.level) == (twins.type, twins.level)


@pytest.mark.parametrize("name", TWINS)
def test_twins_differ_in_exactly_one_bit(name: str) -> None:
    good, bad = TWINS[name].good(), TWINS[name].bad()
    assert good.memory.keys() == bad.memory.keys()
    assert good.regs.features == bad.regs.features
    differences = [good.va ^ bad.va]
    differences += [good.memory[pa] ^ bad.memory[pa] for pa in good.memory]
    differences += [good.regs[name] ^ bad.regs[name] for name in good.regs]
    assert sum(d.bit_count() for d in differences) == 1
