"""Corrupt tables in the suite: 2,000 samples of the campaign in tests/corrupt.py, 150 of them in the fast tier."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.corrupt import Figures, run
from tests.pgtable.hand import SEED


def checked(first: int, count: int, record_property: Callable[[str, object], None]) -> Figures:
    figures = run(first, count)
    record_property(f"{count} corrupt trees", f"faults {dict(figures.faults)}, slowest {figures.slowest}")
    assert not figures.failures, figures.failures[:5]
    assert figures.reached > 0.3 * figures.samples
    return figures


def test_a_sample_of_corrupt_trees(record_property: Callable[[str, object], None]) -> None:
    checked(SEED * 1_000_000, 150, record_property)


@pytest.mark.full
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", range(4))
def test_2000_corrupt_trees(part: int, record_property: Callable[[str, object], None]) -> None:
    figures = checked(part * 500, 500, record_property)
    kinds = {"translation", "permission", "access flag", "address size", "external abort on the walk"}
    assert kinds <= set(figures.faults)
    assert {"loop", "shared table", "no memory", "reserved"} <= set(figures.findings)
