"""`pgtable call`: a kernel function, by default on cold-booted tables; and what all commands with --kernel share."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from emu.cli import CommandError, examples

if TYPE_CHECKING:
    from emu.check import Report
    from emu.image import KernelImage
    from emu.machine import CallResult, Machine

_KERNEL = click.option(
    "--kernel", "source", required=True, metavar="KERNEL", help="A kernel file, or debian:VERSION[-FLAVOUR]."
)
_SYMBOLS = click.option(
    "--symbols", type=click.Path(), help="ELF, System.map or kallsyms text to use in place of the image's symbols."
)
_JSON = click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schema).")


@contextmanager
def bad_input() -> Iterator[None]:
    """Errors that are the user's input become one sentence and exit code 2."""
    from emu.coldboot import BootError
    from emu.image import ImageError, SymbolError
    from emu.kernels import KernelError
    from emu.snapshot import SnapshotError
    from kernel_model.variants import UnknownVariant
    from pgtable.build import MapError

    try:
        yield
    except (ImageError, KernelError, BootError, SymbolError, UnknownVariant, MapError, SnapshotError) as error:
        raise CommandError(str(error)) from None


def load_image(source: str, symbols: str | None) -> KernelImage:
    """The kernel that --kernel names, fetched with progress if need be."""
    from emu.image import KernelImage
    from emu.kernels import fetch, is_name

    with bad_input():
        if is_name(source):
            kernel = fetch(source, progress=lambda message: click.echo(message, err=True))
            image = KernelImage.load(kernel, symbols=symbols)
            image.name = source
            return image
        return KernelImage.load(source, symbols=symbols)


@click.command(
    epilog=examples(
        "pgtable call set_memory_valid lin:0x48000000 1 0 --kernel debian:6.12",
        "pgtable call --snapshot k73.snap vmalloc 8192, find_vm_area '$1'",
        "pgtable call --snapshot k73.snap vmalloc 8192, set_memory_ro '$1' 2 --save after.snap",
    )
)
@click.argument("function")
@click.argument("arguments", nargs=-1)
@click.option("--kernel", "source", metavar="KERNEL", help="A kernel file, or debian:VERSION[-FLAVOUR].")
@click.option("--snapshot", "snapshot", metavar="FILE", help="A booted kernel (`pgtable snapshot boot`) instead.")
@_SYMBOLS
@click.option("--order", is_flag=True, help="Also barriers and table writes, in order (slower).")
@click.option("--timeout", default=10.0, show_default=True, type=click.FloatRange(min=0), help="Seconds of CPU time.")
@click.option("--save", metavar="FILE", help="With --snapshot: keep what the calls left as a new snapshot.")
@click.option("--trace", metavar="FILE", help="Judge the TLB maintenance; FILE: a new one for all events, JSON lines.")
@_JSON
@click.pass_context
def call(
    ctx: click.Context,
    function: str,
    arguments: tuple[str, ...],
    source: str | None,
    snapshot: str | None,
    symbols: str | None,
    order: bool,
    timeout: float,
    save: str | None,
    trace: str | None,
    as_json: bool,
) -> None:
    """Call FUNCTION of a kernel, a symbol or an address, with up to eight integer ARGUMENTS: numbers, symbols, or
    lin:PA for a linear address. Numbers below 0 come after `--`.

    With --kernel on cold-booted tables, with --snapshot on a kernel that has booted; there also "strings", and several
    calls with a comma between them, where `$1` is what the first returned. Exit code 1 if a call does not return.
    """
    if (source is None) == (snapshot is None):
        raise CommandError("call: give --kernel KERNEL or --snapshot FILE")
    if snapshot is not None:
        if symbols is not None:
            raise CommandError("call: --symbols goes with --kernel; a snapshot has its kernel's own")
        from emu.cli_snapshot import call_on

        words = (function, *arguments)
        done = call_on(snapshot, words, order=order, timeout=timeout, as_json=as_json, save=save, trace=trace)
        ctx.exit(0 if done else 1)
    if save is not None:
        raise CommandError("call: --save goes with --snapshot")
    assert source
    if len(arguments) > 8:
        raise CommandError(f"{len(arguments)} arguments: a call passes at most 8 in registers")
    image = load_image(source, symbols)
    result = _called(image, function, arguments, order=order, timeout=timeout, trace=trace)
    text = {"schema": "pgtable.call/1", **call_json(function, result)} if as_json else None
    click.echo(json.dumps(text, indent=1) if text else "\n".join(result_lines(function, result)))
    ctx.exit(1 if result.stop else 0)


def _called(
    image: KernelImage, function: str, arguments: tuple[str, ...], *, order: bool, timeout: float, trace: str | None
) -> CallResult:
    """The call on a cold machine."""
    from emu.machine import Machine

    target = number(function) if re.fullmatch("0x[0-9a-fA-F]+", function) else function
    with bad_input():
        machine = Machine.boot(image)
        values = [_argument(text, machine) for text in arguments]
    with bad_input(), traced(machine, trace):
        return machine.call(target, *values, timeout=timeout, record="order" if order else "changes")


@contextmanager
def traced(machine: Machine, path: str | None) -> Iterator[None]:
    """The machine has a trace into a new file meanwhile, if one is named. Raises CommandError for a file that is there,
    or that cannot be written."""
    from emu.tracing import Trace

    if path is None:
        yield
        return
    try:
        trace = Trace(path)
    except FileExistsError:
        raise CommandError(f"--trace {path}: it is there already, name another file") from None
    except OSError as error:
        raise CommandError(f"--trace {path}: {error.strerror or error}") from None
    with trace:
        machine.attach(trace)
        yield


def _argument(text: str, machine: Any) -> int:
    if text.startswith("lin:"):
        return int(machine.plan.linear_va(number(text[4:], text)))
    name, _, offset = text.partition("+")
    if machine.image and name in machine.image.symbols:
        return int(machine.image.symbols[name]) + (number(offset, text) if offset else 0)
    return number(text)


def number(text: str, argument: str = "") -> int:
    """The number in `text`, all of `argument` or a part of it. Raises CommandError."""
    argument = argument or text
    try:
        value = int(text, 0)
    except ValueError:
        raise CommandError(f"argument {argument}: neither a number, lin:PA nor a symbol of this kernel") from None
    if not -(1 << 63) <= value < 1 << 64:
        raise CommandError(f"argument {argument}: does not fit 64 bits")
    return value


# text


def report_text(reports: list[Report]) -> str:
    """A check as text: each call, then the verdict on all."""
    lines = [f"kernel      {reports[0].release}", f"model       {reports[0].variant}"]
    for report in reports:
        lines += ["", f"call        {report.call} = {report.real.value}", *result_lines("", report.result)[1:]]
        lines += ["model says  " + _model_summary(report)]
        lines += ["walk        " + "\n            ".join(report.walk or ("nothing: the range is empty",))]
        lines += [f"difference  {d}" for d in report.differences]
    count = sum(len(report.differences) for report in reports)
    return "\n".join([*lines, "", f"verdict     {count} difference{'' if count == 1 else 's'}"])


def _model_summary(report: Report) -> str:
    p = report.predicted
    parts = [f"returns {p.value}", f"{len(p.words)} descriptors changed", f"{len(p.maintenance)} TLBI"]
    return ", ".join([*parts, f"{len(p.order)} events in order"])


SHOWN = 16  # changes and events shown in full; more are counted


def result_lines(function: str, result: CallResult) -> list[str]:
    """What a call did, as lines."""
    lines = [f"call        {function} = {result.signed} ({result.value:#x})"]
    lines += _listed("changed", [str(c) for c in result.changes[:SHOWN]], len(result.changes))
    events = [str(e) for e in (result.events if result.events is not None else result.maintenance)]
    lines += _listed("in order" if result.events is not None else "TLB", events[:SHOWN], len(events))
    lines += _listed("warnings", [str(w) for w in result.warnings], len(result.warnings))
    lines += _listed("findings", [str(finding) for finding in result.findings], len(result.findings))
    lines += [f"{'' if i else 'printed':12}{text}" for i, text in enumerate("\n".join(result.printed).splitlines())]
    if result.stop:
        lines.append("stopped     " + str(result.stop).replace("\n", "\n            "))
    return lines


def _listed(title: str, rows: list[str], count: int) -> list[str]:
    if not count:
        return [] if title in ("warnings", "findings") else [f"{title:12}nothing"]
    more = [f"... {count - len(rows)} more"] if count > len(rows) else []
    return [f"{title if not i else '':12}{row}" for i, row in enumerate([*rows, *more])]


# JSON


def call_json(function: str, result: CallResult) -> dict[str, Any]:
    """What a call did, as `--json` prints it."""
    from emu.tracing import finding_json

    found = {"findings": [finding_json(finding) for finding in result.findings]} if result.findings else {}
    printed = {"printed": list(result.printed)} if result.printed else {}
    return {
        "function": function,
        "value": f"{result.value:#018x}",
        "signed": result.signed,
        **_result_parts(result),
        **printed,
        **found,
    }


def _result_parts(result: CallResult) -> dict[str, Any]:
    return {
        "changes": [change.as_json() for change in result.changes],
        "maintenance": [{"operation": m.operation, "operand": f"{m.operand:#018x}"} for m in result.maintenance],
        "events": None if result.events is None else [str(event) for event in result.events],
        "warnings": [
            {"site": w.site, "file": w.file, "line": w.line, "once": w.once, "repeat": w.repeat}
            for w in result.warnings
        ],
        "stop": None if result.stop is None else {"kind": result.stop.kind, "message": result.stop.message},
    }


def report_json(reports: list[Report]) -> dict[str, Any]:
    """A check as `--json` prints it: the first call's changes at the top, every call in full below."""
    return {
        "schema": "pgtable.check/1",
        "kernel": reports[0].kernel,
        "release": reports[0].release,
        "model": reports[0].variant,
        "function": reports[0].call.function,
        "differences": [difference.as_json() for report in reports for difference in report.differences],
        "changes": [change.as_json() for change in reports[0].result.changes],
        "calls": [_call_json(report) for report in reports],
    }


def _call_json(report: Report) -> dict[str, Any]:
    predicted = report.predicted
    return {
        "arguments": [f"{report.call.addr:#018x}", report.call.numpages, report.call.enable],
        "value": report.real.value,
        **_result_parts(report.result),
        "events": [str(event) for event in report.real.order],  # in the model's words, to be compared with its own
        "predicted": {
            "value": predicted.value,
            "changes": len(predicted.words),
            "maintenance": [{"operation": t.operation, "operand": f"{t.operand:#018x}"} for t in predicted.maintenance],
            "events": [str(event) for event in predicted.order],
        },
        "walk": list(report.walk),
        "differences": [difference.as_json() for difference in report.differences],
    }
