"""Made-up QEMUs for tests of live sources: a QMP server and a gdb stub over a PhysicalMemory, each in a thread."""

from __future__ import annotations

import json
import re
import socket
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pgtable import PhysicalMemory

XML = """<target><architecture>aarch64</architecture><feature name="org.test">
<reg name="x0" bitsize="64"/>{rows}</feature></target>"""


def mtree(memory: PhysicalMemory) -> str:
    """`info mtree -f` of a machine with this RAM, a device between and a device's own view before."""
    rows = [f"  {r.base:016x}-{r.base + r.size - 1:016x} (prio 0, ram): ram\r\n" for r in memory.regions]
    device = "  0000000009000000-0000000009000fff (prio 0, i/o): pl011\r\n"
    return (
        f'FlatView #0\r\n AS "I/O", root: io\r\n Root memory region: io\r\n{device}\r\n'
        f'FlatView #1\r\n AS "cpu-memory-0", root: system\r\n AS "memory", root: system\r\n{device}{"".join(rows)}\r\n'
        f'FlatView #2\r\n AS "none", root: none\r\n  No rendered FlatView\r\n'
    )


class FakeVm:
    """What both servers share: memory, registers, whether it runs, what happened to it."""

    server: socket.socket

    def __init__(self, memory: PhysicalMemory, registers: Mapping[str, int] | None = None) -> None:
        self.memory = memory
        self.registers = dict(registers or {})
        self.running = True
        self.log: list[str] = []
        self.lock = threading.Lock()

    def serve(self, server: socket.socket) -> None:
        self.server = server
        server.listen(2)
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection, suppress(OSError):
                self.talk(connection)

    def talk(self, connection: socket.socket) -> None:
        raise NotImplementedError

    def close(self) -> None:
        self.server.shutdown(socket.SHUT_RDWR)  # wakes accept
        self.server.close()

    def switch(self, running: bool) -> None:
        with self.lock:
            if running != self.running:
                self.log.append("cont" if running else "stop")
            self.running = running


class FakeQmp(FakeVm):
    """A QMP server at a unix socket. `files`: pmemsave works; `chardevs`: labels that query-chardev tells."""

    def __init__(
        self, memory: PhysicalMemory, path: Path, *, files: bool = True, chardevs: tuple[str, ...] = ()
    ) -> None:
        super().__init__(memory)
        self.files = files
        self.chardevs = chardevs
        self.reads = 0
        server = socket.socket(socket.AF_UNIX)
        server.bind(str(path))
        self.serve(server)

    def talk(self, connection: socket.socket) -> None:
        lines = connection.makefile("rb")
        connection.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n{"event": "RESUME"}\r\n')
        for line in lines:
            request = json.loads(line)
            arguments = request.get("arguments", {})
            answer = self.answer(request["execute"], arguments)
            key = "error" if isinstance(answer, dict) and "desc" in answer else "return"
            connection.sendall(json.dumps({key: answer, "id": request.get("id")}).encode() + b"\r\n")

    def answer(self, command: str, arguments: dict[str, Any]) -> Any:
        if command in ("stop", "cont"):
            self.switch(command == "cont")
        if command == "query-status":
            return {"running": self.running}
        if command == "query-chardev":
            return [{"label": label, "filename": ""} for label in self.chardevs]
        if command == "pmemsave":
            return self.save(arguments)
        if command == "human-monitor-command":
            return self.monitor(arguments["command-line"])
        return {}

    def save(self, arguments: dict[str, Any]) -> dict[str, str]:
        if not self.files:
            return {"class": "GenericError", "desc": "Could not open file"}
        self.reads += 1
        Path(arguments["filename"]).write_bytes(self.memory.read(arguments["val"], arguments["size"]))
        return {}

    def monitor(self, line: str) -> str:
        if line == "info mtree -f":
            return mtree(self.memory)
        match = re.fullmatch(r"xp /(\d+)gx (0x[0-9a-f]+)", line)
        if match is None:
            return f"unknown command: '{line}'\r\n"
        self.reads += 1
        words = self.memory.words(int(match[2], 0), int(match[1])).tolist()
        pairs = (words[i : i + 2] for i in range(0, len(words), 2))
        return "".join(f"{i:016x}: {' '.join(f'0x{w:016x}' for w in pair)}\r\n" for i, pair in enumerate(pairs))


class FakeStub(FakeVm):
    """A gdb stub at a TCP port, as QEMU's: connecting stops, detaching resumes. `physical`: it knows PhyMemMode."""

    def __init__(self, memory: PhysicalMemory, registers: Mapping[str, int], *, physical: bool = True) -> None:
        super().__init__(memory, registers)
        self.physical = physical
        server = socket.socket()
        server.bind(("127.0.0.1", 0))
        self.port = server.getsockname()[1]
        self.serve(server)

    def talk(self, connection: socket.socket) -> None:
        self.switch(False)
        data = b""
        while more := connection.recv(4096):
            data += more
            while packet := re.search(rb"\$([^#]*)#..", data):
                data = data[packet.end() :]
                for answer in self.answers(packet[1].decode()):
                    connection.sendall(b"+$%s#%02x" % (answer.encode(), sum(answer.encode()) & 255))

    def answers(self, text: str) -> list[str]:
        names = list(self.registers)
        if text.startswith("qSupported"):
            return ["PacketSize=1000;qXfer:features:read+"]
        if text.startswith("qXfer:features:read:target.xml"):
            at, size = (int(x, 16) for x in text.rpartition(":")[2].split(","))
            rows = "".join(f'<reg name="{n}" bitsize="64" regnum="{i + 1}"/>' for i, n in enumerate(names))
            part = XML.format(rows=rows)[at : at + size]
            return ["m" + part if len(part) == size else "l" + part]
        if text.startswith("Qqemu.PhyMemMode"):
            return ["OK" if self.physical else ""]
        if text.startswith("p"):
            return [self.registers[names[int(text[1:], 16) - 1]].to_bytes(8, "little").hex()]
        if text.startswith("m"):
            return [self.memory.read(*(int(x, 16) for x in text[1:].split(","))).hex()]
        if text.startswith("qRcmd"):
            return [*("O" + line.encode().hex() for line in mtree(self.memory).splitlines(True)), "OK"]
        if text == "D;1":
            self.switch(True)
            return ["OK"]
        return [""]
