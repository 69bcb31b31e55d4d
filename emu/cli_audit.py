"""`pgtable audit`: rules over all that a source's tables map, each with the ranges that offend."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any
from xml.etree.ElementTree import Element, SubElement, tostring

import click

from emu import writing
from emu.cli import CommandError
from emu.cli_source import hex64, listings, opened, source_argument, source_options, stage_of, stage_option

if TYPE_CHECKING:
    from emu.sources import Source
    from pgtable.audit import Place, Places, Verdict
    from pgtable.listing import Listing
    from pgtable.memory import TableMemory

SHOWN = 8  # ranges of a rule in the text

EXAMPLE = """\b
Examples:
  pgtable audit k73.snap
  pgtable audit qmp:guest.sock --rule wx --rule alias-rwx
  pgtable audit raw:ram.bin@0x40000000 --regs regs.txt --junit audit.xml
"""


@click.command(epilog=EXAMPLE)
@source_argument(required=False)
@click.option("--rule", "names", multiple=True, metavar="NAME", help="Only this rule; counts more.")
@click.option("--junit", metavar="FILE", help="Also write the verdicts as JUnit XML, one test case a rule.")
@click.option("--list", "list_rules", is_flag=True, help="The rules, and what each says.")
@stage_option
@source_options
@click.pass_context
def audit(
    context: click.Context,
    word: str | None,
    names: tuple[str, ...],
    junit: str | None,
    list_rules: bool,
    stage: str | None,
    regs: str | None,
    reg: tuple[str, ...],
    regime: str | None,
    as_json: bool,
) -> None:
    """Judge what the tables of SOURCE map: writable code, aliases, reserved bits, unguarded tables ...

    SOURCE is a snapshot, an ELF core, a kdump file, raw:FILE@PA, qmp:SOCKET, gdb:HOST:PORT, or a kernel: see
    docs/sources.md. Where it has a Linux kernel, there are rules about that kernel too. docs/audit.md says what each
    rule means. Exit code 1: a rule failed, or nothing is mapped.
    """
    titles = _titles()
    if list_rules:
        _print_rules(titles, as_json)
        return
    if word is None:
        raise CommandError("audit needs a SOURCE (or --list)")
    unknown = [name for name in names if name not in titles]
    if unknown:
        raise CommandError(f"--rule {unknown[0]}: no such rule; pgtable audit --list shows them")
    with opened(word, regs, reg) as source:
        (memory, found), *second = listings(source, regime, stage_of(source, regime, stage))
        verdicts = _verdicts(source, memory, found, names)
        verdicts += [verdict for memory, below in second for verdict in audit_of(memory, below, names)]
    if junit:
        _write_junit(junit, word, verdicts)
    if as_json:
        click.echo(json.dumps(_object(word, found, verdicts), indent=1))
    else:
        _print(word, found, verdicts)
    context.exit(int(not len(found.runs.va) or _count(verdicts, "fail") > 0))


def _titles() -> dict[str, str]:
    """What each rule says, by its name."""
    from emu.linux_audit import LINUX_RULES
    from pgtable.audit import RULES, STAGE2_RULES

    return {rule.name: rule.title for rule in (*RULES, *LINUX_RULES, *STAGE2_RULES)}


def audit_of(memory: TableMemory, found: Listing, names: tuple[str, ...]) -> list[Verdict]:
    """The rules about tables alone."""
    from pgtable.audit import audit

    return audit(found, memory, names)


def _verdicts(source: Source, memory: TableMemory, found: Listing, names: tuple[str, ...]) -> list[Verdict]:
    from emu import linux_audit

    if found.stage == 2:
        return audit_of(memory, found, names)
    if source.image is not None and memory is source.memory:
        return linux_audit.audit(found, source.memory, source.image, names)
    return [*audit_of(memory, found, names), *linux_audit.not_asked("the source has no Linux kernel", names)]


def _count(verdicts: list[Verdict], status: str) -> int:
    return sum(verdict.status.value == status for verdict in verdicts)


# text


def _print_rules(titles: dict[str, str], as_json: bool) -> None:
    if as_json:
        raise CommandError("--list: prints text; leave out --json")
    width = max(map(len, titles))
    for name, title in titles.items():
        click.echo(f"{name:{width}}  {title}")


def _print(word: str, found: Listing, verdicts: list[Verdict]) -> None:
    click.echo(f"{'source':12}{word}: {found.regime.value}, {len(found.runs.va)} runs, {len(found.tables.pa)} tables")
    width = max(len(verdict.rule) for verdict in verdicts)
    for verdict in verdicts:
        click.echo(f"{verdict.status.value:12}{verdict.rule:{width}}  {verdict.text}")
        for line in (*_lines(verdict.places, "range"), *_lines(verdict.expected, "expected")):
            click.echo(f"{'':12}  {line}")
    click.echo(f"{'verdict':12}{_summary(found, verdicts)}")


def _lines(places: Places, what: str) -> list[str]:
    """The first ranges as text, and how many more there are."""
    shown = [f"{what} {_range(place)}" for place in places.pick(slice(SHOWN))]
    more = len(places) - len(shown)
    return [*shown, f"... and {more} more"] if more else shown


def _range(place: Place) -> str:
    where = f"{hex64(place.va)} +{place.size:#x}"
    where += "" if place.pa is None else f" -> {place.pa:#x}"
    where += "" if place.alias is None else f" (alias {hex64(place.alias)})"
    return f"{where}: {place.text}"


def _summary(found: Listing, verdicts: list[Verdict]) -> str:
    if not len(found.runs.va):
        return "nothing is mapped: nothing was judged"
    counts = ((_count(verdicts, status), text) for status, text in _COUNTS)
    return ", ".join(f"{count} {text}" for count, text in counts if count or text == "failed")


_COUNTS = (("fail", "failed"), ("pass", "passed"), ("info", "informed"), ("skip", "skipped"))


# files


def _object(word: str, found: Listing, verdicts: list[Verdict]) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "schema": "pgtable.audit/1",
        "source": word,
        "regime": found.regime.value,
        "runs": len(found.runs.va),
        "tables": len(found.tables.pa),
        "complete": found.complete,
        "failed": _count(verdicts, "fail"),
        "rules": [_rule(verdict) for verdict in verdicts],
    }


def _rule(verdict: Verdict) -> dict[str, Any]:
    return {
        "rule": verdict.rule,
        "title": verdict.title,
        "status": verdict.status.value,
        "text": verdict.text,
        "ranges": [_place(place) for place in verdict.places],
        "expected": [_place(place) for place in verdict.expected],
    }


def _place(place: Place) -> dict[str, Any]:
    return {
        "va": hex64(place.va),
        "size": place.size,
        "pa": None if place.pa is None else hex64(place.pa),
        "alias": None if place.alias is None else hex64(place.alias),
        "text": place.text,
    }


def _write_junit(path: str, word: str, verdicts: list[Verdict]) -> None:
    """One suite, one case a rule: a failure with its ranges, or skipped."""
    suite = Element("testsuite", name=f"pgtable audit {word}", tests=str(len(verdicts)), errors="0")
    suite.set("failures", str(_count(verdicts, "fail")))
    suite.set("skipped", str(_count(verdicts, "skip")))
    for verdict in verdicts:
        case = SubElement(suite, "testcase", classname="pgtable.audit", name=verdict.rule, time="0")
        lines = "\n".join(map(_range, verdict.places))
        if verdict.status.value == "fail":
            SubElement(case, "failure", message=f"{verdict.title}: {verdict.text}").text = lines
        elif verdict.status.value == "skip":
            SubElement(case, "skipped", message=verdict.text)
        elif lines:
            SubElement(case, "system-out").text = lines
    try:
        writing.write(path, tostring(suite, "utf-8", xml_declaration=True))
    except OSError as error:
        raise CommandError(f"--junit {path}: {error.strerror}") from None
