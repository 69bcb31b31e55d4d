"""set_memory_valid of 1 GiB in QEMU TCG: the embedded snippet in a bare guest, whole processes timed.

The tables are those of `Machine.bare`, loaded at the same PAs. A process of 1 call is taken from one of 1 + `calls`:
what is left is `calls` calls. `python -m benchmarks.tcg` assembles the guest again.
"""

from __future__ import annotations

import struct
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import seconds
from emu import Machine, snippets
from pgtable import Registers
from pgtable.registers import TTBR

HERE = Path(__file__).parent
GIB = 1 << 30
PAGES = GIB >> 12
LIMIT = 120  # seconds


def timer(program: str, calls: int) -> Callable[[], float]:
    """Nanoseconds a page, by pairs of processes."""

    def figure() -> float:
        with tempfile.TemporaryDirectory() as folder:
            few, many = (_command(program, Path(folder), n) for n in (1, 1 + calls))
            taken = [seconds(lambda line=line: _run(line)) for line in (few, many)]  # type: ignore[misc]
        return (taken[1] - taken[0]) * 1e9 / (calls * PAGES)

    return figure


def _run(line: list[str]) -> None:
    done = subprocess.run(line, capture_output=True, text=True, timeout=LIMIT, check=False)
    if done.returncode:
        raise RuntimeError(f"QEMU: {done.stderr.strip() or done.returncode}")


def _command(program: str, folder: Path, calls: int) -> list[str]:
    """The line that runs the guest, its memory in files of `folder`."""
    machine = Machine.bare(ram=GIB + (256 << 20))
    plan, regs = machine.plan, machine.registers()
    code = machine.plan.code_pa
    machine.user.map(code, code, plan.page_size, level=3, PXN=0)
    guest = guest_words()
    function = code + (len(guest) + 96 + 15 & -16)
    machine.memory.write(code, guest + _parameters(regs, plan.linear + (64 << 20), calls, function, plan.stack))
    machine.memory.write(function, bytes(snippets.load("set_memory_valid")))
    parts = [("code", code, plan.page_size), ("upper", *machine.tables.used), ("lower", *machine.user.used)]
    line = [program, "-machine", "virt", "-cpu", "cortex-a57", "-m", "2048", "-display", "none", "-nodefaults"]
    for name, pa, size in parts:
        path = folder / f"{name}{calls}"
        path.write_bytes(machine.memory.read(pa, size))
        line += ["-device", f"loader,file={path},addr={pa:#x},force-raw=on"]
    return [*line, "-device", f"loader,addr={code:#x},cpu-num=0"]


def _parameters(regs: Registers, va: int, calls: int, function: int, stack: int) -> bytes:
    tables = TTBR["BADDR"].mask
    return struct.pack(
        "<10Q",
        regs.MAIR_EL1,
        regs.TCR_EL1,
        regs.TTBR0_EL1 & tables,
        regs.TTBR1_EL1 & tables,
        regs.SCTLR_EL1,
        va,
        PAGES,
        calls,
        function,
        stack,
    )


def guest_words() -> bytes:
    """The guest's code."""
    return b"".join(int(line, 16).to_bytes(4, "little") for line in (HERE / "guest.hex").read_text().split())


def main() -> None:
    """Assembles guest.S into guest.hex."""
    made = snippets.assemble((HERE / "guest.S").read_text(), "guest")
    (HERE / "guest.hex").write_text("".join(f"{word:08x}\n" for word in made.words))


if __name__ == "__main__":
    main()
