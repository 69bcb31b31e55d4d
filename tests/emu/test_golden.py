"""The compiled set_memory_valid of today's kernels against the stored measurements (tests/kernel_model/goldens.py)."""

from __future__ import annotations

import pytest

from emu.check import ALLOCATORS
from emu.machine import CallResult, Machine
from emu.trace import Barrier, Maintenance
from tests.kernel_model.goldens import IDS, ROWS, Vector, base_va, page_size, prepare
from tests.kernels import kernel_image

pytestmark = pytest.mark.kernels


def order(result: CallResult) -> tuple[str, ...]:
    """TLBI, DSB and ISB in order, as the stored vectors spell them; a DMB says nothing to the walker."""
    spelled = []
    for event in result.events or ():
        if isinstance(event, Maintenance):
            operand = "" if event.va is None else f", {event.operand:#x}"
            spelled.append(f"tlbi {event.operation.lower()}{operand}")
        elif isinstance(event, Barrier) and not event.name.startswith("dmb"):
            spelled.append(event.name)
    return tuple(spelled)


@pytest.mark.parametrize(("kernel", "vector"), ROWS, ids=IDS)
def test_the_compiled_function_does_what_was_measured(kernel: str, vector: Vector) -> None:
    image = kernel_image(kernel)
    machine = Machine.boot(image, ng=vector.ng)
    asked: list[int] = []
    for name in ALLOCATORS:
        if name in image.symbols:
            machine.stub(name, lambda _: asked.append(1) or 0)
    expected = prepare(vector, machine.tables, base_va(kernel))

    address = base_va(kernel) + vector.page * page_size(kernel) + vector.offset
    result = machine.call("set_memory_valid", address, vector.pages, vector.enable, record="order").ok()

    assert result.signed == vector.value
    assert {c.pa: c.new for c in result.changes} == expected
    assert order(result) == vector.order
    assert len(result.warnings) == vector.warns
    assert bool(asked) == vector.allocates
