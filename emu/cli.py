"""The command `pgtable`. Subcommands are loaded when they are called: `pgtable explain` imports no engine.

Rules of the command line (docs/cli.md): stdout is the answer only, progress and warnings go to stderr; --json prints
one object; exit code 0 done, 1 the verdict is no, 2 bad input or a missing tool, 130 interrupted.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import IO, Any

import click
from click.shell_completion import CompletionItem

# Command: where it is, and its line in `pgtable --help` (so that help loads nothing).
COMMANDS = {
    "audit": ("emu.cli_audit:audit", "Judge what a source's tables map: rules, each with the ranges that offend."),
    "call": ("emu.cli_run:call", "Call a function of a cold-booted or booted kernel and show what it did."),
    "callers": ("emu.cli_callers:callers", "Who calls a function of a compiled kernel, and who takes its address."),
    "census": ("emu.cli_census:census", "Boot a kernel and count who changes permissions of kernel memory."),
    "check": ("emu.cli_check:check", "Run kernel functions and compare them with the model's prediction."),
    "compare": ("emu.cli_compare:compare", "Run the same random tables through two kernels: a behavioural changelog."),
    "explain": ("emu.cli_explain:explain", "What a descriptor or a register value says, bit by bit."),
    "completion": ("emu.cli_completion:completion", "Print what makes bash, zsh or fish complete these commands."),
    "diff": ("emu.cli_diff:diff", "What two sources map differently: added, removed, changed, by field."),
    "dump": ("emu.cli_dump:dump", "List what a source's tables map, merged and filtered; or as Linux's ptdump."),
    "find": ("emu.cli_find:find", "Which VAs reach a PA, where a table is referred to, where a word is."),
    "fuzz": ("emu.cli_fuzz:fuzz", "A campaign: very many random cases of the model against QEMU and real kernels."),
    "gdb-script": ("emu.cli_gdb:gdb_script", "Print a script that gives gdb these commands on the guest it holds."),
    "judge": ("emu.cli_judge:judge", "Compare the hardware model with QEMU: stored answers, or fresh random cases."),
    "kernel": ("emu.cli_kernel:kernel", "Fetch Debian's arm64 kernels by name and say what is in a kernel file."),
    "locks": ("emu.cli_locks:locks", "Which lock each page walk asks for, in releases and in the thread's variants."),
    "map": ("emu.cli_map:map_command", "Draw what a source maps: an HTML page to zoom and search in, or an SVG."),
    "race": ("emu.cli_race:race", "Run kernel functions against each other in every order, and judge the tables."),
    "walk": ("emu.cli_walk:walk", "Walk any source's tables for an address: every step, and which bit decided."),
    "snapshot": ("emu.cli_snapshot:snapshot", "Boot a kernel in QEMU and keep it; what a snapshot holds."),
}


def _loaded(place: str) -> Any:
    """What is at "module:name"."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


class LazyGroup(click.Group):
    """A group whose commands are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, in alphabetical order."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = _loaded(COMMANDS[cmd_name][0])
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list in --help, from the table above."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """The names, from the table above, and the options."""
        names = [
            CompletionItem(name, help=COMMANDS[name][1]) for name in sorted(COMMANDS) if name.startswith(incomplete)
        ]
        return [*names, *click.Command.shell_complete(self, ctx, incomplete)]


def examples(*lines: str) -> str:
    """The last part of a command's --help."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


LONGEST = 1000  # characters of a sentence: a name in it may be anything


class CommandError(click.ClickException):
    """Bad input or a missing tool: one sentence on stderr, exit code 2."""

    exit_code = 2

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))

    def show(self, file: IO[Any] | None = None) -> None:
        """Prints the sentence."""
        click.echo(f"pgtable: error: {self.message}", file=file, err=file is None)


def one_line(text: str) -> str:
    """`text` without line ends and control characters, which a file's content or an argument may have, and not long."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text[: LONGEST + 1])
    return shown if len(shown) <= LONGEST else f"{shown[:LONGEST]}..."


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="pgtable")
def cli() -> None:
    """An AArch64 page-table laboratory: real arm64 kernel code run on tables, and judged."""


def main() -> None:
    """The console script."""
    try:
        if "_PGTABLE_COMPLETE" in os.environ:
            _loaded("emu.cli_completion:register")()
        code = cli(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.UsageError as error:
        text = error.format_message()  # of a group without a command: its help
        click.echo(text if text.startswith("Usage:") else f"pgtable: error: {one_line(text)}", err=True)
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("pgtable: interrupted", err=True)
        sys.exit(130)
    except BrokenPipeError:
        _give_up_stdout()
        sys.exit(0)
    except (OSError, MemoryError) as error:
        _give_up_stdout()
        click.echo(f"pgtable: error: {one_line(_said(error))}", err=True)
        sys.exit(2)


def _said(error: OSError | MemoryError) -> str:
    if isinstance(error, MemoryError):
        return "there is not enough memory"
    return f"{error.filename or 'writing'}: {error.strerror or error}"


def _give_up_stdout() -> None:
    """What could not be written is not tried again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
