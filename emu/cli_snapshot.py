"""`pgtable snapshot`, and `pgtable call --snapshot`: kernels that have booted.

Arguments of a call are C-like: numbers, symbols (`linux_banner`, `&init_mm+8`), "strings" in double quotes, lin:PA, and
`$1`, what the first call of the line returned. Calls are separated by a comma, alone or at the end of a word:

    pgtable call --snapshot k.snap vmalloc 8192, set_memory_ro '$1' 2, vfree '$1'
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from emu.cli import CommandError, examples
from emu.cli_run import bad_input, call_json, number, result_lines, traced

if TYPE_CHECKING:
    from emu.machine import CallResult
    from emu.snapshot import Snapshot
    from emu.warm import Resolved, WarmMachine

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30}
_TERM = re.compile(r"(&?[A-Za-z_$][\w.$]*)(?:([+-])(\w+))?")
_ERRORS = 4095  # pointers above -4096 are error numbers (include/linux/err.h, MAX_ERRNO)


@click.group("snapshot")
def snapshot() -> None:
    """Boot a kernel in QEMU and keep its memory and registers; say what a snapshot holds."""


@snapshot.command(epilog=examples("pgtable snapshot boot --kernel debian:7.3 -o k73.snap"))
@click.option("--kernel", required=True, metavar="KERNEL", help="A kernel file, or debian:VERSION[-FLAVOUR].")
@click.option("-o", "--output", required=True, type=click.Path(dir_okay=False), help="The snapshot's file.")
@click.option("--cpu", help="QEMU's CPU model [default: cortex-a57, for 16K pages cortex-a76].")
@click.option("--memory", default="256M", show_default=True, help="RAM.")
@click.option("--cmdline", default="", help="More for the kernel's command line.")
@click.option("--kaslr/--no-kaslr", default=True, show_default=True, help="A random place for the kernel, by the seed.")
@click.option("--seed", default=1, show_default=True, help="Decides the seeds in the device tree.")
@click.option("--at", default="mark", show_default=True, metavar="mark|panic|SYMBOL|SECONDS", help="Where to stop.")
@click.option("--timeout", default=120.0, show_default=True, type=click.FloatRange(min=0), help="Seconds for the boot.")
@click.option("--qemu", metavar="PATH", help="A qemu-system-aarch64 other than the one on PATH.")
def boot(output: str, kernel: str, memory: str, cmdline: str, **options: Any) -> None:
    """Boot KERNEL and save its memory and registers.

    It stops alive, when the first process sleeps in a system call; or at the first call of SYMBOL, or after SECONDS.
    """
    from emu.boot import BootFailed, Options
    from emu.boot import boot as boot_kernel

    if not Path(output).resolve().parent.is_dir():
        raise CommandError(f"{output}: there is no folder {Path(output).parent}")
    wanted = Options(kernel, memory=memory_size(memory), command_line=cmdline, **options)
    with bad_input(), steps_on_stderr() as progress:
        fetched(kernel, progress)
        try:
            made = boot_kernel(wanted, output, progress)
        except BootFailed as error:
            raise CommandError(str(error)) from None
        except OSError as error:
            raise CommandError(f"{output}: {error.strerror or error}") from None
    click.echo(_text(_facts(made)))


@snapshot.command(epilog=examples("pgtable snapshot info k73.snap"))
@click.argument("path", type=click.Path(), metavar="FILE")
@click.option("--json", "as_json", is_flag=True, help="One JSON object, schema pgtable.snapshot-info/1.")
def info(path: str, as_json: bool) -> None:
    """What the snapshot FILE holds."""
    from emu.snapshot import Snapshot

    with bad_input():
        facts = _facts(Snapshot.load(path))
    if as_json:
        click.echo(json.dumps({"schema": "pgtable.snapshot-info/1", **facts}, indent=1))
    else:
        click.echo(_text(facts))


def _facts(found: Snapshot) -> dict[str, Any]:
    origin = {k: f"{v:#018x}" if k in ("base", "kaslr_offset") else v for k, v in asdict(found.origin).items()}
    stat = found.path.stat()
    return {
        "path": str(found.path),
        "size": stat.st_size,
        "on_disk": stat.st_blocks * 512,
        **origin,
        "ram": [{"base": f"{part.base:#018x}", "size": part.size} for part in found.parts],
        "general": _words(found.general),
        "system": _words(found.system),
    }


def _words(values: Mapping[str, int]) -> dict[str, str]:
    return {name: f"{value:#018x}" for name, value in values.items()}


_SHOWN = ("TTBR0_EL1", "TTBR1_EL1", "TCR_EL1", "MAIR_EL1", "SCTLR_EL1", "VBAR_EL1", "SP_EL0", "TPIDR_EL1")


def _text(facts: Mapping[str, Any]) -> str:
    """The facts as lines; of the registers, those that matter most."""
    lines = [f"{key:13} {value}" for key, value in facts.items() if isinstance(value, (str, int))]
    lines += [f"{'ram':13} {row['base']}, {row['size'] >> 20} MiB" for row in facts["ram"]]
    lines += [f"{name:13} {facts['general'][name]}" for name in ("pc", "sp")]
    return "\n".join([*lines, *(f"{n:13} {facts['system'][n]}" for n in _SHOWN if n in facts["system"])])


def memory_size(text: str) -> int:
    """The bytes that 256M or 1G says. Raises CommandError."""
    found = re.fullmatch(r"(\d+)([KMG]?)", text, re.I)
    size = int(found[1]) << _UNITS[found[2].upper()] if found else 0
    if size < 64 << 20 or size % (1 << 20):
        raise CommandError(f"memory {text}: must be whole MiB, at least 64M, as 256M or 1G")
    return size


def fetched(kernel: str, progress: Callable[[str], None]) -> None:
    """The kernel is in the cache, with progress if it must be fetched."""
    from emu.kernels import fetch, is_name

    if is_name(kernel):
        fetch(kernel, progress=progress)


@contextmanager
def steps_on_stderr() -> Iterator[Callable[[str], None]]:
    """Messages to stderr: one line that changes on a terminal; elsewhere a line each, without the guest's console."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status("") as status:
            yield lambda message: status.update(message.replace("[", r"\["))
    else:
        yield lambda message: None if message.startswith("console: ") else click.echo(message, err=True)


# call --snapshot


def call_on(
    path: str,
    words: tuple[str, ...],
    *,
    order: bool,
    timeout: float,
    as_json: bool,
    save: str | None,
    trace: str | None = None,
) -> bool:
    """Runs the calls in `words` on a snapshot and prints what each did; True if all returned.

    `save`: the file for a snapshot of what they left; none is written where one did not return. `trace`: the file for
    their trace.
    """
    from emu.snapshot import Snapshot

    with bad_input():
        loaded = Snapshot.load(path)
        machine = loaded.machine(mmu="model" if loaded.lpa2 else "cpu")
    with bad_input(), traced(machine, trace):
        done: list[tuple[str, CallResult, str]] = []
        for function, *arguments in _calls(words):
            target = _resolved(machine, function)
            values = [_argument(text, machine, [result.value for _, result, _ in done]) for text in arguments]
            if len(values) > 8:
                raise CommandError(f"{function}: {len(values)} arguments: a call passes at most 8 in registers")
            result = machine.call(target.address, *values, timeout=timeout, record="order" if order else "changes")
            done.append((function, result, _structure(machine, target, result)))
            if result.stop:
                break
    _show(done, as_json)
    stopped = done[-1][1].stop
    if save is not None and stopped:
        click.echo(f"{save} is not written: {done[-1][0]} did not return", err=True)
    elif save is not None:
        _save(machine, save)
    return not stopped


def _save(machine: WarmMachine, path: str) -> None:
    try:
        machine.save_to(path)
    except ValueError as error:
        raise CommandError(f"--save: {error}") from None
    except OSError as error:
        raise CommandError(f"--save {path}: {error.strerror or error}") from None


def _calls(words: tuple[str, ...]) -> list[list[str]]:
    """The words of each call: a comma, alone or at the end of a word that is no string, ends one."""
    calls: list[list[str]] = [[]]
    for word in words:
        ends = word.endswith(",") and not re.fullmatch('".*"', word, re.S)
        if word.removesuffix(",") or not ends:
            calls[-1].append(word.removesuffix(",") if ends else word)
        if ends:
            calls.append([])
    if not all(calls):
        raise CommandError("a call without a function: commas stand between calls")
    return calls


def _resolved(machine: WarmMachine, function: str) -> Resolved:
    """The function, and a word on stderr where the kernel calls it otherwise."""
    from emu.warm import Resolved

    if re.fullmatch("0x[0-9a-fA-F]+", function):
        return Resolved(function, function, number(function))
    found = machine.resolve(function)
    if found.found != function:
        click.echo(f"{function} is {found.found} in this kernel", err=True)
    return found


def _argument(text: str, machine: WarmMachine, results: list[int]) -> int | str:
    if re.fullmatch('".*"', text, re.S):
        return text[1:-1].encode("latin-1", "backslashreplace").decode("unicode_escape")
    if text.startswith("lin:"):
        return machine.plan.linear_va(number(text[4:], text))
    term = _TERM.fullmatch(text)
    if term is None:
        return number(text)
    base, sign, offset = term.groups()
    shift = number(offset, text) if offset else 0
    return _base(base, text, machine, results) + (-shift if sign == "-" else shift)


def _base(name: str, text: str, machine: WarmMachine, results: list[int]) -> int:
    if name.startswith("$"):
        index = int(name[1:]) if name[1:].isdigit() else 0
        if not 1 <= index <= len(results):
            raise CommandError(f"argument {text}: {len(results)} calls have returned before, $1 is the first")
        return results[index - 1]
    if not name.startswith("&") and name not in machine.snapshot.image.symbols:
        return number(text)
    return machine.symbol(name.removeprefix("&"))


def _structure(machine: WarmMachine, target: Resolved, result: CallResult) -> str:
    """The structure that the result points to, where BTF says that it does."""
    from emu.btf import BtfError

    try:
        kind = machine.types.returned(target.found)
        if result.stop or kind is None or not result.value or result.value >= (1 << 64) - _ERRORS:
            return ""
        return str(kind.at(result.value))
    except (BtfError, ValueError, LookupError):
        return ""


def _show(done: list[tuple[str, CallResult, str]], as_json: bool) -> None:
    if as_json:
        rows = [{**call_json(name, result), "struct": text.splitlines() or None} for name, result, text in done]
        click.echo(json.dumps({"schema": "pgtable.call/1", **rows[-1], "earlier": rows[:-1]}, indent=1))
        return
    for i, (name, result, text) in enumerate(done):
        lines = result_lines(name, result)
        lines += [f"{'' if k else 'struct':12}{line}" for k, line in enumerate(text.splitlines())]
        click.echo("\n".join(([""] if i else []) + lines))
