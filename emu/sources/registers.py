"""Registers as a user gives them: `--regs FILE` and `--reg NAME=VALUE`, for every command that takes a SOURCE.

A file holds lines NAME=VALUE (`#` starts a comment) or one JSON object. NAME is the Arm ARM's, VALUE what int(x, 0)
reads; gdb's short names of QEMU (SCTLR, VBAR) are known too. What is given overrides what the source says.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from emu import jsontext
from emu.sources.errors import SourceError
from pgtable.registers import NAMES, Registers

LARGEST = 1 << 20  # no register file is larger
SHORT = {"SCTLR": "SCTLR_EL1", "HCR": "HCR_EL2", "SCR": "SCR_EL3"}  # what QEMU's gdb stub calls them


def parse_register(text: str) -> tuple[str, int]:
    """(NAME, VALUE) of one `NAME=VALUE`. Raises SourceError."""
    name, equals, value = text.partition("=")
    if not equals:
        raise SourceError(f"register {text!r} is not NAME=VALUE, for example TTBR1_EL1=0x40001000")
    return _checked(name.strip(), value.strip())


def _checked(name: str, value: str | int) -> tuple[str, int]:
    name = SHORT.get(name, name)
    if name not in NAMES:
        raise SourceError(f"{name} is not a register that a translation reads; those are {', '.join(sorted(NAMES))}")
    try:
        number = int(value, 0) if isinstance(value, str) else int(value)
    except ValueError:
        raise SourceError(f"{name}={value} is not a number (0x... or decimal)") from None
    if not 0 <= number < 1 << 64:
        raise SourceError(f"{name}={value} does not fit into 64 bits")
    return name, number


def parse_registers(text: str, name: str = "the register text") -> dict[str, int]:
    """The registers in `text`, lines or JSON; `name` is what an error calls it. Raises SourceError."""
    if text.lstrip().startswith("{"):
        try:
            found = jsontext.loads(text)
        except ValueError as error:
            raise SourceError(f"{name} begins like JSON but is not ({error})") from None
        for key, value in found.items():
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise SourceError(f'{name}: {key} must be a number or a text like "0x..."')
        return dict(_checked(key, value) for key, value in found.items())
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    return dict(parse_register(line) for line in lines if line)


def read_registers(path: str | Path) -> dict[str, int]:
    """The registers in the file `path`. Raises SourceError."""
    try:
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise SourceError(f"{path} cannot be read ({error.strerror}); a file of lines NAME=VALUE is needed") from None
    if len(content) > LARGEST or b"\0" in content:
        raise SourceError(f"{path} is no text; a file of lines NAME=VALUE or one JSON object is needed")
    return parse_registers(content.decode("utf-8", "replace"), str(path))


def overridden(base: Registers | None, file: str | Path | None = None, given: Iterable[str] = ()) -> Registers | None:
    """`base` with what a register file and then `NAME=VALUE` texts say; None where nobody said anything.

    Raises SourceError.
    """
    values = read_registers(file) if file is not None else {}
    values.update(parse_register(text) for text in given)
    if not values:
        return base
    return Registers(None, **values) if base is None else base.replace(**values)
