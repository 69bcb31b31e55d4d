"""The RAM and registers of a running QEMU guest, on this machine: `qmp:SOCKET` and `gdb:HOST:PORT`. Nothing is written.

Rules of this file:
- The guest stands still only inside `LiveMemory.reading()`, and what was read is kept only as long: outside, each read
  is such a moment of its own. What stopped the guest resumes it, on errors and Ctrl-C too, and guard.py when killed.
- Over QMP a guest that stood still before is left so. The gdb stub stops a guest on connection and does not tell
  whether it ran: it runs afterwards.
- Only RAM is read (QEMU's `info mtree -f` says where it is): reading a device may change it.
Sources: QEMU's documentation of the monitor and the gdb stub; facts measured on QEMU 7.2.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from emu.gdbstub import GdbError, GdbStub
from emu.sources.errors import SourceError
from emu.sources.guard import RUNNING, STOPPED, Guard
from emu.sources.qmp import Qmp
from emu.sources.ram import CHUNK, PagedMemory
from emu.sources.registers import SHORT
from pgtable.bits import Flags, Words
from pgtable.memory import PAGE
from pgtable.registers import NAMES, Registers

AHEAD = 16  # pages that one read over QMP brings: tables lie close together
PACKET = 0x800  # bytes of a memory request to the gdb stub
DETACH = "D;1"  # a stub that gdb has used before wants the process's number
LOOPBACK = ("127.0.0.1", "localhost", "::1")
Ranges = list[tuple[int, int]]

_VIEW = re.compile(r"^FlatView #\d+\n(.*?)(?=^FlatView|\Z)", re.MULTILINE | re.DOTALL)
_RAM = re.compile(r"^ +([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, (?:ram|ramd|rom)\):", re.MULTILINE)


class Vm(Protocol):
    """A guest that can be stopped, read and resumed. `ranges`: (PA, bytes) of its RAM."""

    ranges: Ranges
    ahead: int  # pages that one read should bring

    def pause(self) -> None:
        """Stops the guest, if it runs."""
        ...

    def resume(self) -> None:
        """Lets the guest run, if it was stopped by `pause`."""
        ...

    def read(self, pa: int, n: int) -> bytes:
        """`n` bytes of RAM at `pa`."""
        ...

    def registers(self) -> Registers:
        """The registers of the first CPU."""
        ...

    def monitor(self, line: str) -> str:
        """What QEMU's monitor prints for a command."""
        ...

    def close(self) -> None:
        """Lets the guest run and ends the connection."""
        ...


def ram_ranges(text: str) -> Ranges:
    """Where RAM is, by QEMU's `info mtree -f`: (PA, bytes), in order, whole pages."""
    view = next((body for body in _VIEW.findall(text) if re.search(r'^ AS "memory"', body, re.MULTILINE)), "")
    rows = [(int(start, 16), int(end, 16) + 1) for start, end in _RAM.findall(view)]
    found: Ranges = []
    for start, end in sorted((-(-start // PAGE) * PAGE, end & -PAGE) for start, end in rows):
        if found and sum(found[-1]) == start:
            found[-1] = (found[-1][0], end - found[-1][0])
        elif end > start:
            found.append((start, end - start))
    if not found:
        raise SourceError("QEMU's monitor does not say where the guest has RAM (info mtree -f)")
    return found


class LiveMemory(PagedMemory):
    """A guest's RAM, read page by page while the guest stands still."""

    def __init__(self, vm: Vm) -> None:
        super().__init__(self._one, vm.ranges)
        self.vm = vm
        self._depth = 0

    def close(self) -> None:
        """Resumes the guest and ends the connection."""
        self.forget()
        self.vm.close()

    @contextmanager
    def reading(self) -> Iterator[None]:
        """The guest stands still inside; pages read are kept until the end."""
        self._depth += 1
        try:
            if self._depth == 1:
                self.vm.pause()
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.forget()
                self.vm.resume()

    def registers(self) -> Registers:
        """The registers of the guest's first CPU. Raises SourceError."""
        with self.reading():
            return self.vm.registers()

    def _one(self, pa: int) -> bytes | None:
        """The page at `pa`; those behind it, which come with it, are kept too."""
        end = next(base + size for base, size in self.ranges if base <= pa < base + size)
        data = self.vm.read(pa, min(self.vm.ahead * PAGE, end - pa))
        for at in range(PAGE, len(data), PAGE):
            self.kept.setdefault(pa + at, np.frombuffer(data[at : at + PAGE], np.uint64))
        return data[:PAGE]

    def page(self, pa: int) -> Words | None:
        """As PagedMemory.page."""
        with self.reading():
            return super().page(pa)

    def words(self, pa: int, n: int) -> Words:
        """As PagedMemory.words, of one moment."""
        with self.reading():
            return super().words(pa, n)

    def gather(self, pas: Words) -> tuple[Words, Flags]:
        """As PagedMemory.gather, of one moment."""
        with self.reading():
            return super().gather(pas)

    def tables(self, pas: Words, n: int) -> tuple[Words, Flags]:
        """As PagedMemory.tables, of one moment."""
        with self.reading():
            return super().tables(pas, n)

    def chunks(self, size: int = CHUNK) -> Iterator[tuple[int, Words]]:
        """As PagedMemory.chunks, of one moment: the guest stands still until the last one is taken."""
        with self.reading():
            for base, length in self.ranges:
                for pa in range(base, base + length, size):
                    yield pa, np.frombuffer(self.vm.read(pa, min(size, base + length - pa)), np.uint64)


def stub_registers(stub: GdbStub) -> Registers:
    """The registers of the guest's first CPU that a translation reads. Raises SourceError where TCR_EL1 is missing."""
    names = {SHORT.get(name, name): name for name in stub.registers}
    if "TCR_EL1" not in names:
        raise SourceError("the gdb stub gives no system registers (QEMU's does, for AArch64 guests)")
    return Registers(None, **{name: stub.read(names[name]) for name in NAMES if name in names})


class GdbVm:
    """A guest behind a gdb stub: each pause is a connection, each resumption a detachment."""

    ahead = 1

    def __init__(self, address: str | tuple[str, int]) -> None:
        self.address = address
        self._stub: GdbStub | None = None
        self._guard: Guard | None = None
        self.pause()
        try:
            self.ranges = ram_ranges(self.monitor("info mtree -f"))
        except BaseException:
            self.close()
            raise
        self.resume()

    @property
    def stub(self) -> GdbStub:
        """The connection. Raises SourceError while the guest runs."""
        if self._stub is None:
            raise SourceError("the guest is running: it can be read inside reading() only")
        return self._stub

    def pause(self) -> None:
        """Connects, which stops the guest. Raises SourceError."""
        if self._stub is None:
            self._guard = self._guard or Guard("gdb", self.address)
            self._guard.tell(STOPPED)
            try:
                self._stub = GdbStub(self.address)
                self._physical()
            except BaseException as error:
                self.close()
                if isinstance(error, OSError):
                    raise SourceError(f"no gdb stub can be used at {self._name} ({error})") from None
                raise

    @property
    def _name(self) -> str:
        return self.address if isinstance(self.address, str) else "{}:{}".format(*self.address)

    def _physical(self) -> None:
        """Memory requests are for physical addresses from here on."""
        if self.stub.ask("Qqemu.PhyMemMode:1") != "OK":
            raise GdbError("it does not read physical memory, as QEMU's does")

    def resume(self) -> None:
        """Detaches, which lets the guest run."""
        if self._stub is not None:
            try:
                self._stub.ask("Qqemu.PhyMemMode:0")
                self._stub.ask(DETACH)
            except OSError:
                self._release()
            self._stub.close()
            self._stub = None
            if self._guard is not None:
                self._guard.tell(RUNNING)

    def _release(self) -> None:
        """Lets the guest go over another connection: the guard does that."""
        if self._guard is not None:
            if self._stub is not None:
                self._stub.close()
            self._guard.close()
            self._guard = None

    def read(self, pa: int, n: int) -> bytes:
        """`n` bytes of RAM at `pa`."""
        parts = (self.stub.ask(f"m{pa + i:x},{min(PACKET, n - i):x}") for i in range(0, n, PACKET))
        return b"".join(bytes.fromhex(part) for part in parts)

    def registers(self) -> Registers:
        """The registers of the first CPU."""
        return stub_registers(self.stub)

    def monitor(self, line: str) -> str:
        """What QEMU's monitor prints for a command."""
        text, answer = "", self.stub.ask(f"qRcmd,{line.encode().hex()}")
        while answer.startswith("O") and answer != "OK":
            text += bytes.fromhex(answer[1:]).decode("latin-1")
            answer = self.stub.receive(20.0)
        return text.replace("\r", "")

    def close(self) -> None:
        """Lets the guest run and ends the guard, which sees to it where something went wrong."""
        if self._stub is not None:
            self.resume()
        if self._guard is not None:
            self._guard.close()
            self._guard = None


class QmpVm:
    """A guest behind a QMP socket. RAM comes by `pmemsave` through a file, by `xp` where QEMU cannot write it."""

    ahead = AHEAD

    def __init__(self, path: str) -> None:
        self.path = path
        self.qmp = Qmp(path)
        self._folder = tempfile.TemporaryDirectory(prefix="pgtable-qmp-")
        self._file = Path(self._folder.name) / "ram"
        self._guard: Guard | None = None
        self._ours = False  # it was we who stopped the guest
        self._by_file = True
        try:
            self.ranges = ram_ranges(self.monitor("info mtree -f"))
        except BaseException:
            self.close()
            raise

    def pause(self) -> None:
        """Stops the guest, if it runs."""
        if not self._ours and self.qmp.ask("query-status")["running"]:
            self._guard = self._guard or Guard("qmp", self.path)
            self._guard.tell(STOPPED)
            self._ours = True
            self.qmp.ask("stop")

    def resume(self) -> None:
        """Lets the guest run, if it was we who stopped it."""
        if self._ours:
            try:
                self.qmp.ask("cont")
            except (OSError, SourceError):
                self._reconnect()
                self.qmp.ask("cont")
            self._ours = False
            if self._guard is not None:
                self._guard.tell(RUNNING)

    def _reconnect(self) -> None:
        self.qmp.close()
        self.qmp = Qmp(self.path)

    def read(self, pa: int, n: int) -> bytes:
        """`n` bytes of RAM at `pa`."""
        if self._by_file:
            with suppress(SourceError, FileNotFoundError, PermissionError):
                self.qmp.ask("pmemsave", val=pa, size=n, filename=str(self._file))
                data = self._file.read_bytes()
                self._file.unlink()
                if len(data) == n:
                    return data
            self._by_file = False
        return b"".join(self._printed(pa + i, min(PAGE, n - i)) for i in range(0, n, PAGE))

    def _printed(self, pa: int, n: int) -> bytes:
        lines = self.monitor(f"xp /{n // 8}gx {pa:#x}").splitlines()
        words = [int(word, 16) for line in lines for word in line.partition(":")[2].split()]
        if len(words) != n // 8:
            raise SourceError(f"QEMU's monitor does not print the RAM at {pa:#x}")
        return np.array(words, np.uint64).tobytes()

    def registers(self) -> Registers:
        """The registers of the first CPU of a guest that is stopped.

        They come from a gdb stub that is opened for the moment; where there is one, it is left alone.
        """
        if any(row["label"] == "gdb" for row in self.qmp.ask("query-chardev")):
            raise SourceError(
                f"the guest of {self.path} already has a gdb stub: use gdb:HOST:PORT, or --regs FILE with its registers"
            )
        path = Path(self._folder.name) / "gdb"
        self.monitor(f"gdbserver unix:{path},server=on,wait=off")
        try:
            with GdbStub(str(path)) as stub:  # it is not told to detach: that would resume the guest
                return stub_registers(stub)
        except OSError as error:
            raise SourceError(f"the gdb stub of {self.path} cannot be used ({error})") from None
        finally:
            self.monitor("gdbserver none")

    def monitor(self, line: str) -> str:
        """What the monitor prints for a command."""
        return self.qmp.monitor(line)

    def close(self) -> None:
        """Lets the guest run if we stopped it, and ends the connection."""
        with suppress(OSError, SourceError):
            self.resume()
        self.qmp.close()
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        self._folder.cleanup()


def open_qmp(path: str) -> LiveMemory:
    """The RAM of the guest whose QMP socket is `path`. Raises SourceError."""
    return LiveMemory(QmpVm(path))


def open_gdb(text: str) -> LiveMemory:
    """The RAM of the guest whose gdb stub is at `text`, HOST:PORT on this machine. Raises SourceError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise SourceError(f"gdb:{text} is not gdb:HOST:PORT, for example gdb:127.0.0.1:1234")
    host = host.strip("[]") or LOOPBACK[0]
    if host not in LOOPBACK:
        raise SourceError(f"gdb:{text} is another machine: only stubs on this one are read ({', '.join(LOOPBACK)})")
    return LiveMemory(GdbVm((LOOPBACK[0], int(port))))
