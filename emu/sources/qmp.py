"""QEMU's machine protocol over a unix socket, as far as reading a guest needs it: stop, cont, monitor commands.

One request is under way at a time, and answers are matched by their `id`: what was left of an interrupted request is
skipped. (The package qemu.qmp is asynchronous, which a reader that must resume the guest in a `finally` is not.)
Source: QEMU's docs/interop/qmp-spec.
"""

from __future__ import annotations

import json
import socket
from typing import Any

from emu import jsontext
from emu.sources.errors import SourceError

TIMEOUT = 20.0  # seconds that an answer may take


class Qmp:
    """A connection to the QMP server at the unix socket `path`. Raises SourceError."""

    def __init__(self, path: str, timeout: float = TIMEOUT) -> None:
        self.path = path
        self._buffer = b""
        self._number = 0
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(timeout)
        try:
            self._socket.connect(path)
            if "QMP" not in self._line():
                raise SourceError(f"{path} does not speak QMP (start QEMU with -qmp unix:PATH,server=on,wait=off)")
            self.ask("qmp_capabilities")
        except TimeoutError:
            self._socket.close()
            raise SourceError(f"{path} says nothing: another program is its one QMP client") from None
        except OSError as error:
            self._socket.close()
            raise SourceError(f"{path} is no QMP socket that can be used ({error.strerror or error})") from None
        except BaseException:
            self._socket.close()
            raise

    def close(self) -> None:
        """Ends the connection; the guest stays as it is."""
        self._socket.close()

    def _line(self) -> dict[str, Any]:
        """The next message; what cannot be read is passed over."""
        while True:
            line, end, rest = self._buffer.partition(b"\n")
            if not end:
                more = self._socket.recv(1 << 16)
                if not more:
                    raise OSError("QEMU has closed the connection")
                self._buffer += more
                continue
            self._buffer = rest
            try:
                message = jsontext.loads(line)
            except ValueError:
                continue
            if isinstance(message, dict):
                return message

    def ask(self, command: str, **arguments: Any) -> Any:
        """What `command` returns. Raises SourceError where QEMU refuses, OSError where it does not answer."""
        self._number += 1
        request = {"execute": command, "arguments": arguments, "id": self._number}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._line()
            if message.get("id") == self._number:
                if "error" in message:
                    raise SourceError(f"QEMU refuses {command}: {message['error'].get('desc', 'no reason given')}")
                return message.get("return")

    def monitor(self, line: str) -> str:
        """What the human monitor prints for a command."""
        return str(self.ask("human-monitor-command", **{"command-line": line})).replace("\r", "")
