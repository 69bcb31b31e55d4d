"""The gdb remote protocol, as much of it as QEMU's stub needs: registers by name, memory, breakpoints, stop and go.

Rules of this file:
- Registers are found by the names of the target description, never by numbers; QEMU has its system registers there,
  here with the Arm ARM's names.
- A guest that is connected to stands still until `go`.
Source: the manual of GDB, appendix "GDB Remote Serial Protocol".
"""

from __future__ import annotations

import re
import select
import socket
import time
from functools import cached_property
from typing import Any, NamedTuple

CHUNK = 0x800  # bytes of a memory or description request
TIMEOUT = 20.0  # seconds that an answer may take

# Older QEMUs' names for registers where they are not the Arm ARM's.
_NAMES = {"SCTLR": "SCTLR_EL1", "VBAR": "VBAR_EL1", "CPACR": "CPACR_EL1", "CNTKCTL": "CNTKCTL_EL1"}


class GdbError(OSError):
    """The stub said no, something else, or nothing; the message is one sentence."""


class Register(NamedTuple):
    """A row of the target description."""

    number: int
    bits: int


class GdbStub:
    """A connection to the stub at a unix socket `path`, or at (host, port)."""

    def __init__(self, address: str | tuple[str, int]) -> None:
        family = socket.AF_UNIX if isinstance(address, str) else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT)
        self._buffer = b""
        try:
            self._socket.connect(address)
            if family == socket.AF_INET:
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._greet()
            self.registers: dict[str, Register] = self._describe()
        except BaseException:
            self._socket.close()
            raise

    def fileno(self) -> int:
        """For select: readable when a running guest has stopped."""
        return self._socket.fileno()

    def close(self) -> None:
        """Ends the connection; the guest stays as it is."""
        self._socket.close()

    def _greet(self) -> None:
        """Older QEMUs first tell that the guest has been stopped."""
        answer = self.ask("qSupported:qXfer:features:read+")
        while not answer.startswith("PacketSize"):
            answer = self.receive(TIMEOUT)

    # packets

    def ask(self, text: str) -> str:
        """The answer to one packet. Raises GdbError for an error or none in time."""
        self._send(text)
        answer = self.receive(TIMEOUT)
        if re.fullmatch(r"E\w\w", answer):
            raise GdbError(f"the gdb stub answers {answer} to {text[:40]}")
        return answer

    def _send(self, text: str) -> None:
        data = text.encode("latin-1")
        self._socket.sendall(b"$%s#%02x" % (data, sum(data) & 0xFF))

    def receive(self, timeout: float) -> str:
        """The next packet, unasked for or a part of an answer. Raises GdbError if none comes in `timeout` seconds."""
        packet = self._next(timeout)
        if packet is None:
            raise GdbError(f"the gdb stub has not answered for {timeout:g} seconds")
        return packet

    def _next(self, timeout: float) -> str | None:
        """The next packet, None if none comes in time."""
        deadline = time.monotonic() + timeout
        while True:
            packet = re.search(rb"\$([^#]*)#..", self._buffer)
            if packet:
                self._buffer = self._buffer[packet.end() :]
                self._socket.sendall(b"+")
                return _unescaped(packet[1]).decode("latin-1")
            if not select.select([self._socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            more = self._socket.recv(1 << 16)
            if not more:
                raise GdbError("the gdb stub has closed the connection")
            self._buffer += more

    # registers and memory

    def _describe(self) -> dict[str, Register]:
        found: dict[str, Register] = {}
        top, number = self._document("target.xml"), 0
        included = re.findall(r'<xi:include href="([^"]+)"', top)
        for text in [top, *map(self._document, included)]:
            for attributes in re.findall(r"<reg ([^>]*)/>", text):
                row: dict[str, str] = dict(re.findall(r'(\w+)="([^"]*)"', attributes))
                try:
                    number, bits, name = int(row.get("regnum", number)), int(row["bitsize"]), row["name"]
                except (KeyError, ValueError):
                    raise GdbError(f"the gdb stub describes a register as {attributes[:80]!r}") from None
                found[_NAMES.get(name, name)] = Register(number, bits)
                number += 1
        return found

    def _document(self, name: str) -> str:
        text, more = "", True
        while more:
            answer = self.ask(f"qXfer:features:read:{name}:{len(text):x},{CHUNK:x}")
            more = answer.startswith("m")
            text += answer[1:]
        return text

    def read(self, name: str) -> int:
        """A register's value. Raises KeyError for a name that the target has not."""
        return int.from_bytes(self._bytes(f"p{self.registers[name].number:x}"), "little")

    def _bytes(self, question: str) -> bytes:
        """The answer that is hexadecimal."""
        answer = self.ask(question)
        try:
            return bytes.fromhex(answer)
        except ValueError:
            raise GdbError(f"the gdb stub answers {answer[:40]!r} to {question[:40]}") from None

    def read_general(self) -> dict[str, int]:
        """The general registers, PC and PSTATE ("cpsr") at once."""
        data, at, values = self._bytes("g"), 0, {}
        for name, bits in self._in_order:
            if at + bits // 8 > len(data):
                break
            values[name] = int.from_bytes(data[at : at + bits // 8], "little")
            at += bits // 8
        return values

    @cached_property
    def _in_order(self) -> list[tuple[str, int]]:
        rows = sorted(self.registers.items(), key=lambda item: item[1].number)
        return [(name, row.bits) for name, row in rows]

    def write(self, name: str, value: int) -> None:
        """Sets a register of the standing guest. Raises KeyError for a name that the target has not."""
        number, bits = self.registers[name]
        self.ask(f"P{number:x}={value.to_bytes(bits // 8, 'little').hex()}")

    def memory(self, address: int, n: int, *, physical: bool = False) -> bytes:
        """`n` bytes at a virtual address of the guest, as it is now, or at a physical one."""
        if physical:
            self.ask("Qqemu.PhyMemMode:1")
        try:
            steps = range(0, n, CHUNK)
            return b"".join(self._bytes(f"m{address + i:x},{min(CHUNK, n - i):x}") for i in steps)
        finally:
            if physical:
                self.ask("Qqemu.PhyMemMode:0")

    # stop and go

    def set_breakpoint(self, va: int) -> None:
        """The guest will stop before the instruction at `va`."""
        self.ask(f"Z0,{va:x},4")

    def clear_breakpoint(self, va: int) -> None:
        """No more."""
        self.ask(f"z0,{va:x},4")

    def go(self) -> None:
        """The guest runs on; `wait` or `interrupt` next."""
        self._send("c")

    def step(self) -> None:
        """The guest runs one instruction."""
        self.ask("s")

    def wait(self, timeout: float) -> bool:
        """Whether the running guest has stopped within `timeout` seconds."""
        return self._next(timeout) is not None

    def interrupt(self) -> None:
        """Stops the running guest where it is."""
        self._socket.sendall(b"\x03")
        self.receive(TIMEOUT)

    def __enter__(self) -> GdbStub:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _unescaped(data: bytes) -> bytes:
    """Bytes that follow a brace come back, and repeated ones are written out."""
    plain = re.sub(rb"}(.)", lambda m: bytes([m[1][0] ^ 0x20]), data, flags=re.S)
    return re.sub(rb"(.)\*(.)", lambda m: m[1] * (m[2][0] - 28), plain, flags=re.S)
