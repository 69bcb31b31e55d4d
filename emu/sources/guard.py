"""Lets a guest go on when the process that stopped it is gone.

A `finally` covers errors and Ctrl-C; nothing in a process covers its being killed. So a second process waits at the
end of a pipe: while it has been told that the guest is stopped, the pipe's end means that the guest must be resumed,
over a connection of its own.
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import suppress

STOPPED, RUNNING = b"s", b"r"

# Run by a bare interpreter: standard library only. Arguments: how ("qmp" or "gdb"), then the address.
_SCRIPT = """
import json, os, socket, sys
state = b"r"
while True:
    data = os.read(0, 64)
    if not data:
        break
    state = data[-1:]
if state != b"s":
    sys.exit()
how, *address = sys.argv[1:]
s = socket.socket(socket.AF_INET if len(address) == 2 else socket.AF_UNIX)
s.settimeout(10)
s.connect((address[0], int(address[1])) if len(address) == 2 else address[0])
if how == "gdb":
    s.sendall(b"+$D#44")
    s.recv(64)
else:
    lines = s.makefile("r")
    lines.readline()
    for command in ("qmp_capabilities", "cont"):
        s.sendall(json.dumps({"execute": command}).encode() + b"\\n")
        while "return" not in (line := lines.readline()) and line:
            pass
"""


class Guard:
    """The second process. `how`: "qmp" or "gdb"; `address`: a unix socket's path, or host and port."""

    def __init__(self, how: str, address: str | tuple[str, int]) -> None:
        parts = [address] if isinstance(address, str) else [address[0], str(address[1])]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _SCRIPT, how, *parts],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a Ctrl-C at the terminal is not for it
        )

    def tell(self, state: bytes) -> None:
        """STOPPED before the guest is stopped, RUNNING after it runs again."""
        with suppress(OSError):
            assert self._process.stdin
            self._process.stdin.write(state)
            self._process.stdin.flush()

    def close(self) -> None:
        """Ends it; a guest that is still stopped is resumed."""
        with suppress(OSError):
            assert self._process.stdin
            self._process.stdin.close()
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
