"""kernel_model against stored measurements of real kernels, so that it is judged where no kernel can be had."""

from __future__ import annotations

import pytest

from kernel_model import pageattr
from kernel_model.levels import Levels
from kernel_model.mm import Barrier, Kernel, Tlbi, Warn
from kernel_model.names import Bits
from kernel_model.variants import by_name
from pgtable import Format, Granule, PhysicalMemory
from pgtable.build import TableBuilder
from tests.kernel_model.goldens import IDS, ROWS, Vector, base_va, page_size, prepare

# Kernel: the model's row, and how its build counts levels (page shift, levels, VA bits, VA bits of the run).
BUILDS = {
    "debian:6.1": ("6.1", Levels(12, 4, 48, 48)),
    "debian:6.12": ("6.12", Levels(12, 5, 52, 48)),
    "debian:7.3": ("7.x", Levels(12, 5, 52, 48)),
    "debian:7.2-16k": ("7.x", Levels(14, 4, 52, 47)),
}


@pytest.mark.parametrize(("kernel", "vector"), ROWS, ids=IDS)
def test_the_model_does_what_was_measured(kernel: str, vector: Vector) -> None:
    name, levels = BUILDS[kernel]
    memory = PhysicalMemory((0x4000_0000, 1 << 20))
    fmt = Format(Granule(levels.page_shift))
    tables = TableBuilder(memory, (0x4000_0000, 1 << 20), fmt=fmt, va_bits=levels.va_bits, upper=True)
    expected = prepare(vector, tables, base_va(kernel))
    asked: list[int] = []
    bits = Bits.of(fmt, by_name(name), ng_mappings=vector.ng)
    model = Kernel(memory, tables.root, levels, bits, allocate=lambda: asked.append(1))
    before = memory.mark()

    address = base_va(kernel) + vector.page * page_size(kernel) + vector.offset
    value = pageattr.set_memory_valid(model, address, vector.pages, vector.enable)

    changed = memory.changes(before)
    assert value == vector.value
    assert dict(zip(changed.pa.tolist(), changed.new.tolist(), strict=True)) == expected
    assert tuple(str(e) for e in model.events if isinstance(e, Tlbi | Barrier)) == vector.order
    assert sum(isinstance(e, Warn) for e in model.events) == vector.warns
    assert bool(asked) == vector.allocates
