"""Where tables come from, by one word: a file that somebody has, a guest that runs, or a kernel's cold boot.

    with open_source("vmcore") as source, source.reading():
        print(translate(source.memory, source.registers, va))

The word SOURCE:
- `PATH`: a snapshot of ours, an ELF core (QEMU, kdump, /proc/kcore), a kdump-compressed file, or a kernel image (its
  cold-booted tables); found out by content, never by name;
- `debian:VERSION[-FLAVOUR]`: that kernel's cold-booted tables;
- `raw:PATH@PA[,PATH@PA...]`: raw dumps;
- `qmp:SOCKET`, `gdb:HOST:PORT`: a QEMU guest on this machine;
- `parent:NAME`: internal, the guest of the debugger that started this process (see parent.py).
Nothing is written to any of them. Rules: opening reads headers only; what reads all of RAM is asked for by name
(`found_registers`). Every failure is one sentence (SourceError).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu.sources.errors import SourceError
from emu.sources.registers import overridden, parse_register, parse_registers, read_registers
from pgtable.memory import TableMemory
from pgtable.registers import Registers

if TYPE_CHECKING:
    from emu.image import KernelImage
    from emu.sources.vmcoreinfo import VmcoreInfo

__all__ = [
    "Source",
    "SourceError",
    "found_registers",
    "open_source",
    "overridden",
    "parse_register",
    "parse_registers",
    "read_registers",
]

HEAD = 64  # bytes of a file that tell what it is


@dataclass
class Source:
    """An open source. `registers` are those it has or that its VMCOREINFO gives, None for one that has none;
    `origin` says in a few words where they come from. `image` and `symbols` (run-time addresses) where it has them.
    `cpus`: the general registers of each CPU, by name.
    """

    word: str
    kind: str
    memory: TableMemory
    registers: Registers | None = None
    origin: str = ""
    image: KernelImage | None = None
    symbols: Mapping[str, int] = field(default_factory=dict)
    cpus: tuple[Mapping[str, int], ...] = ()
    release: Callable[[], None] = lambda: None

    @contextmanager
    def reading(self) -> Iterator[None]:
        """What is read inside is of one moment: a live guest stands still, files just stay."""
        session = getattr(self.memory, "reading", None)
        if session is None:
            yield
            return
        with session():
            yield

    def close(self) -> None:
        """Gives back files and connections; a live guest runs on."""
        self.release()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def open_source(word: str, *, registers: str | Path | None = None, given: Iterable[str] = ()) -> Source:
    """The source that `word` names; `registers` (a file) and `given` (NAME=VALUE) override what it says.

    Raises SourceError.
    """
    scheme, colon, rest = word.partition(":")
    opener = _SCHEMES.get(scheme) if colon else None
    given = tuple(given)
    override = overridden(None, registers, given)  # a mistake there is told before anything is opened
    source = opener(word, rest) if opener else _open_path(word)
    if override is not None:
        source.registers = overridden(source.registers, registers, given)
        source.origin = "the command line" if not source.origin else f"{source.origin}, and the command line"
    return source


def found_registers(source: Source) -> Registers:
    """Registers for a source that has none, from its RAM: Linux's VMCOREINFO in it, else the most believable root.

    Sets them and their origin in `source`. Reads all of RAM. Raises SourceError where there is no root.
    """
    from emu.sources.find import find_roots
    from emu.sources.vmcoreinfo import find

    if source.registers is None:
        with source.reading():
            info = find(source.memory)
            if info is not None:
                _told(source, info, "VMCOREINFO found in RAM")
            if source.registers is None:
                roots = find_roots(source.memory)
                if not roots:
                    raise SourceError(f"{source.word} has no registers and no root table was found; give --regs FILE")
                source.registers, source.origin = roots[0].registers, f"the root found at {roots[0]}"
    assert source.registers is not None
    return source.registers


def _told(source: Source, info: VmcoreInfo, origin: str) -> None:
    """What a VMCOREINFO tells, if it is enough."""
    source.symbols = source.symbols or info.symbols
    try:
        source.registers, source.origin = info.registers(), f"{origin} of {info.release}"
    except SourceError:
        return


def _raw(word: str, rest: str) -> Source:
    from emu.sources.raw import open_raw

    memory = open_raw(rest)
    return Source(word, "raw dump", memory, release=memory.close)


def _qmp(word: str, rest: str) -> Source:
    from emu.sources.live import open_qmp

    memory = open_qmp(rest)
    source = Source(word, "live guest (QMP)", memory, release=memory.close)
    try:
        source.registers, source.origin = memory.registers(), "the guest's first CPU"
    except SourceError:  # its gdb stub is in use: everything else is there
        source.origin = ""
    except BaseException:
        memory.close()
        raise
    return source


def _gdb(word: str, rest: str) -> Source:
    from emu.sources.live import open_gdb

    memory = open_gdb(rest)
    try:
        regs = memory.registers()
    except BaseException:
        memory.close()
        raise
    return Source(word, "live guest (gdb)", memory, regs, "the guest's first CPU", release=memory.close)


def _parent(word: str, rest: str) -> Source:
    from emu.sources.parent import open_parent

    memory, regs, symbols = open_parent(word)
    origin = "the debugger's selected CPU"
    return Source(word, "guest of a debugger", memory, regs, origin, symbols=symbols, release=memory.close)


def _debian(word: str, rest: str) -> Source:
    return _kernel(word)


_SCHEMES = {"raw": _raw, "qmp": _qmp, "gdb": _gdb, "debian": _debian, "parent": _parent}


def _open_path(path: str) -> Source:
    from emu.sources.elfcore import ET_CORE, MAGIC
    from emu.sources.kdump import is_kdump
    from emu.sources.raw import open_file

    file = open_file(path)
    try:
        head = os.pread(file, HEAD, 0)
        if not head:
            raise SourceError(f"{path} is empty, a memory dump or a kernel is needed")
        if head.startswith(MAGIC) and int.from_bytes(head[16:18], "little") == ET_CORE:
            return _core(path, file)
        if is_kdump(head):
            return _kdump(path, file)
    except BaseException:
        os.close(file)
        raise
    os.close(file)
    return _snapshot(path) if head.startswith(_snapshot_magic()) else _kernel(path)


def _core(path: str, file: int) -> Source:
    from emu.sources.elfcore import open_core

    core = open_core(path, file)
    source = Source(path, "ELF core", core.memory, cpus=core.cpus, release=core.memory.close)
    if core.info:
        _told(source, core.info, "the VMCOREINFO note")
    return source


def _kdump(path: str, file: int) -> Source:
    from emu.sources.kdump import open_kdump

    dump = open_kdump(path, file)
    source = Source(path, "kdump-compressed", dump.memory, release=lambda: os.close(file))
    if dump.info:
        _told(source, dump.info, "the VMCOREINFO")
    return source


def _snapshot_magic() -> bytes:
    from emu.snapshot import MAGIC

    return MAGIC


def _snapshot(path: str) -> Source:
    from emu.image import ImageError
    from emu.snapshot import Snapshot, SnapshotError

    try:
        snapshot = Snapshot.load(path)
        source = Source(path, "snapshot", snapshot.memory, snapshot.registers, "the snapshot")
    except (SnapshotError, OSError) as error:
        raise SourceError(str(error)) from None
    try:
        source.image = snapshot.image
        source.symbols = source.image.symbols
    except (ImageError, SnapshotError, ValueError):
        source.image = None  # its kernel is not at hand: the tables are
    return source


def _kernel(word: str) -> Source:
    from emu.coldboot import BootError, template
    from emu.image import ImageError, KernelImage
    from emu.kernels import KernelError
    from pgtable import CPUS

    try:
        image = KernelImage.load(word)
        made = template(image, features=CPUS["max"]).thaw()
    except (ImageError, KernelError, BootError) as error:
        raise SourceError(str(error)) from None
    return Source(word, "cold-booted kernel", made.memory, made.registers, "the cold boot", image, image.symbols)
