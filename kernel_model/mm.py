"""What the kernel functions act on: memory, the address space, and the events that they cause.

Rules of this file:
- Entry pointers are PAs of descriptors. Every read goes to memory again, as the kernel's does.
- What a processor would see is recorded in `Kernel.events`, in the kernel's order; memory is written in place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from kernel_model.levels import U64, Levels
from kernel_model.names import Bits
from kernel_model.variants import Variant
from pgtable.memory import PhysicalMemory

EINVAL, ENOMEM, EBUSY = 22, 12, 16


class Tlbi(NamedTuple):
    """A TLBI: its name and operand (0 for none)."""

    operation: str
    operand: int = 0

    def __str__(self) -> str:
        return f"tlbi {self.operation.lower()}" + (f", {self.operand:#x}" if self.operand else "")


class Barrier(NamedTuple):
    """A DSB or ISB, by name."""

    name: str

    def __str__(self) -> str:
        return self.name


class Write(NamedTuple):
    """A store of a descriptor."""

    pa: int
    value: int

    def __str__(self) -> str:
        return f"[{self.pa:#x}] = {self.value:#018x}"


class Warn(NamedTuple):
    """A WARN, by the function that has it."""

    function: str

    def __str__(self) -> str:
        return f"WARN in {self.function}"


Event = Tlbi | Barrier | Write | Warn


class Bug(Exception):  # noqa: N818  the kernel's name: BUG() does not go on
    """The kernel would have hit BUG()."""


class Runaway(Exception):  # noqa: N818  what the loop does
    """A loop that the kernel would not have ended; says where."""


@dataclass
class Kernel:
    """One kernel at one moment: its variant, levels, bits, memory, `init_mm`'s root, and what it has done.

    `allocate()` gives the PA of a zeroed page for a table, None when there is none (-ENOMEM).
    """

    memory: PhysicalMemory
    pgd: int  # PA of init_mm.pgd
    levels: Levels
    bits: Bits
    allocate: Callable[[], int | None] = lambda: None
    table_flags: int = 0  # what a kernel table descriptor has besides VALID and TYPE
    events: list[Event] = field(default_factory=list)
    steps: int = 0
    step_limit: int = 10_000_000

    @property
    def variant(self) -> Variant:
        """The variant whose rules apply."""
        return self.bits.variant

    def read(self, pa: int) -> int:
        """READ_ONCE of a descriptor."""
        return self.memory.fetch(pa)

    def write(self, pa: int, value: int) -> None:
        """WRITE_ONCE of a descriptor."""
        self.memory.store(pa, value & U64)
        self.events.append(Write(pa, value & U64))

    def barrier(self, *names: str) -> None:
        """DSB or ISB, in order."""
        self.events.extend(Barrier(name) for name in names)

    def warn(self, function: str) -> None:
        """WARN_ON that fired."""
        self.events.append(Warn(function))

    def step(self, where: str) -> None:
        """Counts a loop iteration; raises Runaway when a loop has no end."""
        self.steps += 1
        if self.steps > self.step_limit:
            raise Runaway(f"{where}: no end after {self.step_limit} steps")
