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

# Run by a bare interpreter: standard library only. Arguments: how ("qmp" or "gdb"), then the address. It tries again
# for a while: the dead reader's connection may not have ended yet, and both servers take one client at a time.
_SCRIPT = """
import json, os, socket, sys, time
state = b"r"
while True:
    data = os.read(0, 64)
    if not data:
        break
    state = data[-1:]
how, *address = sys.argv[1:]

def resume():
    with socket.socket(socket.AF_INET if len(address) == 2 else socket.AF_UNIX) as s:
        s.settimeout(3)
        s.connect((address[0], int(address[1])) if len(address) == 2 else address[0])
        lines = s.makefile("rb")
        if how == "gdb":
            s.sendall(b"+$D;1#b0")
            seen = b""
            while b"$OK" not in seen:
                byte = lines.read(1)
                if not byte:
                    return False
                seen += byte
            return True
        lines.readline()
        for command in ("qmp_capabilities", "cont"):
            s.sendall(json.dumps({"execute": command, "id": "guard-" + command}).encode() + b"\\n")
            while ("guard-" + command).encode() not in (line := lines.readline()):
                if not line:
                    return False
        return True

end = time.monotonic() + 30
while state == b"s" and time.monotonic() < end:
    try:
        if resume():
            break
    except (ConnectionRefusedError, FileNotFoundError):  # the guest is gone
        break
    except OSError:
        pass
    time.sleep(0.1)
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
            self._process.wait(35)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
