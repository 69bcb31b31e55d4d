"""Small programs of our own, for a machine without a kernel: source, assembled words and listing side by side.

`NAME.S` is the source, `NAME.hex` its words, one a line, `NAME.lst` what capstone makes of them; a test checks that
the three agree, and re-assembles where an assembler is at hand. `python -m emu.snippets` makes the last two again.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from emu import writing

ASSEMBLER = "aarch64-linux-gnu-as"
ORIGIN = 0


class SnippetError(ValueError):
    """A snippet that is not there, or that the assembler refuses."""


@dataclass(frozen=True)
class Snippet:
    """An assembled program: instruction words and the assembly text they came from."""

    name: str
    words: tuple[int, ...]
    source: str

    def __bytes__(self) -> bytes:
        return b"".join(word.to_bytes(4, "little") for word in self.words)

    def listing(self) -> str:
        """What capstone makes of the words, a line each."""
        from emu.exceptions import disassemble

        lines = (f"{4 * i:4x}: {word:08x}  {disassemble(word, 4 * i)}" for i, word in enumerate(self.words))
        return "\n".join(lines) + "\n"


def names() -> list[str]:
    """The snippets that come with the package."""
    return sorted(f.name[:-2] for f in resources.files(__name__).iterdir() if f.name.endswith(".S"))


def load(name: str) -> Snippet:
    """A snippet by name; raises SnippetError, which lists the names."""
    if name not in names():
        raise SnippetError(f"snippet {name}: there is none, only {', '.join(names())}")
    here = resources.files(__name__)
    words = tuple(int(line, 16) for line in here.joinpath(f"{name}.hex").read_text().split())
    return Snippet(name, words, here.joinpath(f"{name}.S").read_text())


def assemble(source: str, name: str = "snippet") -> Snippet:
    """Assembles AArch64 text with GNU as; raises SnippetError with its message, or where it is not installed."""
    program, objcopy = shutil.which(ASSEMBLER), shutil.which(ASSEMBLER.replace("-as", "-objcopy"))
    if not program or not objcopy:
        raise SnippetError(f"no {ASSEMBLER} on PATH: install the Debian package binutils-aarch64-linux-gnu")
    with tempfile.TemporaryDirectory() as folder:
        text, obj, flat = (Path(folder) / f for f in ("s.S", "s.o", "s.bin"))
        text.write_text(source)
        done = subprocess.run(
            [program, "-march=armv8.5-a", "-o", obj, text], capture_output=True, text=True, check=False
        )
        if done.returncode:
            first = next((line for line in done.stderr.splitlines() if "Error" in line), done.stderr.strip())
            raise SnippetError(f"{name}: {first.partition(':')[2].strip() or first}")
        subprocess.run([objcopy, "-O", "binary", "-j", ".text", obj, flat], check=True, capture_output=True)
        data = flat.read_bytes()
    words = tuple(int.from_bytes(data[i : i + 4], "little") for i in range(0, len(data), 4))
    return Snippet(name, words, source)


def remake() -> None:
    """Assembles every snippet again and writes its words and listing beside its source."""
    for name in names():
        here = Path(str(resources.files(__name__)))
        made = assemble((here / f"{name}.S").read_text(), name)
        writing.write(here / f"{name}.hex", "".join(f"{word:08x}\n" for word in made.words))
        writing.write(here / f"{name}.lst", made.listing())
        print(f"{name}: {len(made.words)} instructions", file=sys.stderr)
