"""Boots a kernel in QEMU and keeps what it has made of its memory.

How: emu.guest runs it to the point that was asked for; there the gdb stub gives the registers and QMP the RAM.

Points (`at`): "mark" (the first process sleeps; stopped where it enters its system call, so that a task runs, holds no
lock and has nearly all of its stack), "panic", a symbol (when it is first called), or seconds after the start.
Source: QEMU's manual (QMP reference).
"""

from __future__ import annotations

import asyncio
import os
import time
from datetime import UTC, datetime
from pathlib import Path

from emu import snapshot
from emu.gdbstub import GdbStub
from emu.guest import STEP, SYSTEM_CALL, BootFailed, Guest, Options, Progress, started
from emu.image import KernelImage
from emu.kernels import is_name
from emu.snapshot import Origin, Snapshot

__all__ = ["STEP", "SYSTEM_CALL", "BootFailed", "Options", "boot"]

RAM_BASE = 0x4000_0000  # of QEMU's virt machine

_GENERAL = (*(f"x{i}" for i in range(31)), "sp", "pc", "cpsr")


def boot(options: Options, output: str | os.PathLike[str], progress: Progress = lambda _: None) -> Snapshot:
    """Boots, stops, and writes the snapshot `output`.

    Raises BootFailed, ImageError for a kernel that cannot be read, SymbolError for an `at` that is none of its names.
    """
    image = KernelImage.load(options.kernel)
    if options.at not in ("mark", "panic") and options.seconds is None:
        image.symbols[options.at]
    _need_qmp()
    with started(options, image) as guest:
        progress(f"booting {image.release} in QEMU {guest.version} ({guest.cpu})")
        with guest.debugger() as stub:
            offset = _meet(guest, stub, image, progress)
            progress(f"stopped at {options.at}, KASLR offset {offset:#x}")
            general, system = _registers(stub)
            progress("saving memory")
            ram = _save_memory(guest)
        origin = Origin(
            kernel=options.kernel if is_name(options.kernel) else os.path.abspath(options.kernel),
            release=image.release,
            sha256=snapshot.content_hash(image),
            kaslr_offset=offset,
            base=image.base + offset,
            command_line=guest.command_line,
            cpu=guest.cpu,
            seed=options.seed,
            at=options.at,
            when=datetime.now(UTC).isoformat(timespec="seconds"),
            qemu=guest.version,
        )
        return snapshot.save(output, origin, general, system, [(RAM_BASE, ram)])


def _need_qmp() -> None:
    try:
        import qemu.qmp  # noqa: F401
    except ImportError:
        raise BootFailed("the Python package qemu.qmp is missing: pip install 'pgtable[live]'") from None


# where it is to be met


def _meet(guest: Guest, stub: GdbStub, image: KernelImage, progress: Progress) -> int:
    """Runs to the point asked for; the KASLR offset."""
    options = guest.options
    if options.at == "mark":
        stub.go()
        while not guest.marked:
            guest.listen(1.0)
            guest.show(progress)
        stub.interrupt()
        offset = guest.offset(stub, image)
        guest.run_to(stub, image.symbols[SYSTEM_CALL] + offset, progress)
    elif options.seconds is not None:
        _run_for(guest, stub, options.seconds, progress)
        offset = guest.offset(stub, image)
    else:
        offset = _first_call(guest, stub, image, progress)
    return offset


def _first_call(guest: Guest, stub: GdbStub, image: KernelImage, progress: Progress) -> int:
    """To the symbol, which may run before the kernel's place is known; should that not be the expected one, calls
    from when it is known count."""
    expected = guest.expected_offset(image)
    va = image.symbols[guest.options.at] + expected
    stub.set_breakpoint(va)
    offset = guest.offset(stub, image, {va}, expected)
    if offset != expected:
        stub.clear_breakpoint(va)
        va += offset - expected
    if stub.read("pc") != va:
        guest.run_to(stub, va, progress)
    return offset


def _run_for(guest: Guest, stub: GdbStub, seconds: float, progress: Progress) -> None:
    end = time.monotonic() + seconds
    stub.go()
    while time.monotonic() < end:
        guest.listen(min(0.2, max(0.0, end - time.monotonic())))
        guest.show(progress)
    stub.interrupt()


# what is kept


def _save_memory(guest: Guest) -> Path:
    """RAM, in a file of the folder; QEMU is told to end."""
    path = guest.folder / "ram"
    asyncio.run(_dump(guest.folder / "qmp", path, guest.options.memory))
    return path


async def _dump(socket: Path, path: Path, size: int) -> None:
    from qemu.qmp import QMPClient

    client = QMPClient("boot")
    await client.connect(str(socket))
    try:
        await client.execute("pmemsave", {"val": RAM_BASE, "size": size, "filename": str(path)})
    finally:
        await client.disconnect()


def _registers(stub: GdbStub) -> tuple[dict[str, int], dict[str, int]]:
    """General registers, and all system registers of 64 bits at most."""
    general = {name: stub.read(name) for name in _GENERAL}
    system = {
        name: stub.read(name)
        for name, row in stub.registers.items()
        if name not in _GENERAL and row.bits <= 64 and name.isupper()
    }
    return general, system
