"""`pgtable gdb-script`: the script that gives gdb these commands (emu/gdb_script.py), for this installation."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path

import click

from emu import writing
from emu.cli import CommandError

EXAMPLE = """\b
Examples:
  pgtable gdb-script -o pgtable.py
  gdb-multiarch -ex 'target remote :1234' -ex 'source pgtable.py' -ex 'pgtable walk $pc --fetch'
  gdb-multiarch -ex "python import os; exec(os.popen('pgtable gdb-script').read())"
"""


@click.command("gdb-script", epilog=EXAMPLE)
@click.option("-o", "output", metavar="FILE", help="Where to; gdb wants a name that ends in .py [stdout].")
def gdb_script(output: str | None) -> None:
    """Print a Python script for gdb's `source`: pgtable's commands on the guest that gdb holds.

    Inside gdb, connected to QEMU's stub: pgtable walk VA..., dump, find, audit, diff SOURCE, map -o FILE, and explain,
    each with the options that it has here and without SOURCE. They read through gdb. gdb's Python needs no packages:
    the script starts this installation. See docs/gdb.md.
    """
    if output is None:
        click.echo(script(), nl=False)
        return
    if not output.endswith(".py"):
        raise CommandError(f"-o {output}: must end in .py, or gdb takes its lines for commands of gdb")
    try:
        writing.write(output, script())
    except OSError as error:
        raise CommandError(f"-o {output}: {error.strerror}") from None


# gdb runs all scripts in one namespace: this one has its own.
_FRAME = """\
# Commands of pgtable {version} for gdb: source this file, then `help pgtable`.
exec(compile(r'''{text}''', "pgtable", "exec"), {{"__name__": "pgtable"}})
"""


def script() -> str:
    """The script with this interpreter and these packages."""
    here = Path(__file__).parent
    values = {"PYTHON": sys.executable, "MODULES": str(here.parent)}
    text = (here / "gdb_script.py").read_text()
    for name, value in values.items():
        text = text.replace(f'\n{name} = ""', f"\n{name} = {value!r}", 1)
    return _FRAME.format(version=version("pgtable"), text=text)
