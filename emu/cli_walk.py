"""`pgtable walk`: one address through the tables of any source, step by step, and what decided."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from emu.cli import CommandError
from emu.cli_source import (
    address,
    hex64,
    opened,
    regime_of,
    registers_of,
    source_argument,
    source_options,
    stage1_registers,
    stage_of,
    stage_option,
)

if TYPE_CHECKING:
    from emu.sources import Source
    from pgtable import Access, Stage2Walk, Walk
    from pgtable.params import Regime

EXAMPLE = """\b
Examples:
  pgtable walk k73.snap 0xffff800080000000
  pgtable walk debian:7.3 linux_banner --write
  pgtable walk raw:ram.bin@0x40000000 --regs regs.txt 0x11008 --el0
"""


@click.command(epilog=EXAMPLE)
@source_argument()
@click.argument("vas", metavar="VA...", nargs=-1, required=True)
@click.option("--write", "kind", flag_value="write", help="A store (default: a load).")
@click.option("--fetch", "kind", flag_value="fetch", help="An instruction fetch.")
@click.option("--atomic", "kind", flag_value="atomic", help="A read-modify-write instruction.")
@click.option("--el0", is_flag=True, help="By EL0.")
@click.option("--at", "operation", metavar="OP", help="The AT instruction: S1E1R, S1E0W, S1E1RP ...; gives PAR_EL1.")
@stage_option
@source_options
def walk(
    word: str,
    vas: tuple[str, ...],
    kind: str | None,
    el0: bool,
    operation: str | None,
    stage: str | None,
    regs: str | None,
    reg: tuple[str, ...],
    regime: str | None,
    as_json: bool,
) -> None:
    """Walk the tables of SOURCE for each VA and show every descriptor, the result, and which bit decided a fault.

    SOURCE is a snapshot, an ELF core, a kdump file, raw:FILE@PA, qmp:SOCKET, gdb:HOST:PORT, or a kernel: see
    docs/sources.md. VA is 0x..., 16 hex digits, or SYMBOL[+OFFSET]. A walk that faults is an answer: exit code 0.
    """
    if operation and (kind or el0 or regime or stage):
        raise CommandError(
            f"--at {operation}: says itself what is accessed; leave out --write, --fetch, --el0, --regime, --stage"
        )
    with opened(word, regs, reg) as source:
        wanted = [address(text, source) for text in vas]
        if stage is not None and stage_of(source, regime, stage) == "1":
            source.registers = stage1_registers(registers_of(source))
        if stage == "2":
            _print_stage2(word, [_stage2(source, ipa, kind or "read", el0) for ipa in wanted], as_json)
            return
        found = [_walked(source, va, kind or "read", el0, operation, regime_of(regime)) for va in wanted]
        names = [named(source.symbols, va) for va in wanted]
    if as_json:
        rows = [_json(walk, par) for walk, par in found]
        click.echo(json.dumps({"schema": "pgtable.walk/1", "source": word, "walks": rows}, indent=1))
        return
    click.echo("\n\n".join(_text(walk, par, name) for (walk, par), name in zip(found, names, strict=True)))


def _walked(
    source: Source, va: int, kind: str, el0: bool, operation: str | None, regime: Regime | None
) -> tuple[Walk, int | None]:
    """The walk and, of an AT instruction, PAR_EL1 (None where it takes an exception instead)."""
    from pgtable import ExternalAbort, at_walk, translate
    from pgtable.at import par_of_walk

    memory, regs = source.memory, registers_of(source)
    if operation is None:
        return translate(memory, regs, va, _access(kind, el0, regime), regime=regime), None
    try:
        found = at_walk(memory, regs, operation.upper(), va)
        return found, par_of_walk(found)
    except ExternalAbort as abort:
        return abort.walk, None
    except ValueError as error:
        raise CommandError(f"--at {operation}: {error}") from None


def _stage2(source: Source, ipa: int, kind: str, el0: bool) -> Stage2Walk:
    """Stage 2's walk of an IPA."""
    from pgtable.stage2 import Stage2Params, stage2_walk

    return stage2_walk(source.memory.fetch, Stage2Params.of(registers_of(source)), ipa, _access(kind, el0, None))


def _print_stage2(word: str, found: list[Stage2Walk], as_json: bool) -> None:
    if as_json:
        rows = [_stage2_json(walk) for walk in found]
        click.echo(json.dumps({"schema": "pgtable.walk/1", "source": word, "walks": rows}, indent=1))
        return
    click.echo("\n\n".join(map(str, found)))


def _stage2_json(found: Stage2Walk) -> dict[str, Any]:
    """A walk of stage 2 as `--json` prints it."""
    from pgtable.faults import Fault
    from pgtable.why_stage2 import stage2_bits

    fmt, result = found.params.fmt, found.result
    return {
        "ipa": hex64(found.ipa),
        "of": "stage 1 table" if found.s1ptw else "access",
        "steps": [
            {"level": level, "pa": hex64(pa), "word": hex64(word), "kind": fmt.kind(word, level).name.lower()}
            for level, pa, word in found.raw
        ],
        "pa": None if isinstance(result, Fault) else hex64(result.pa),
        "fault": str(result) if isinstance(result, Fault) else None,
        "because": [text for *_, text in stage2_bits(found)],
    }


def _both(found: Walk) -> dict[str, Any]:
    """What a walk through both stages says besides."""
    from pgtable.nested import NestedWalk

    if not isinstance(found, NestedWalk):
        return {}
    walks = [*found.tables, *([found.stage2] if found.stage2 else [])]
    return {
        "ipa": None if found.ipa is None else hex64(found.ipa),
        "hpfar": hex64(found.hpfar),
        "stage2": [_stage2_json(walk) for walk in walks],
    }


def _access(kind: str, el0: bool, regime: Regime | None) -> Access:
    from pgtable import Access, AccessType
    from pgtable.params import Regime

    el = (regime or Regime.EL10).el
    if el0 and regime is not None and not regime.has_el0:
        raise CommandError(f"--el0: the regime {regime.value} has no EL0")
    return Access(AccessType(kind), 0 if el0 else el)


def named(symbols: Any, va: int) -> str:
    """Where `va` is by the source's symbols: "linux_banner", "schedule+0x10"; "" where they do not say."""
    at = getattr(symbols, "at", None)
    return str(at(va) or "") if at else ""


def _text(found: Walk, par: int | None, name: str) -> str:
    head, *rest = str(found).splitlines()
    lines = [f"{head}{f' ({name})' if name else ''}", *rest]
    return "\n".join(lines if par is None else [*lines, f"    PAR_EL1 {par:#x}"])


def _json(found: Walk, par: int | None) -> dict[str, Any]:
    return {
        "va": hex64(found.va),
        "access": found.access.type.value,
        "el": found.access.el,
        "regime": found.params.regime.value,
        "granule": found.params.fmt.granule.label,
        "steps": [_step(found, step) for step in found.steps],
        "result": _translation(found),
        "fault": _fault(found),
        "par": None if par is None else hex64(par),
        **_both(found),
    }


def _step(found: Walk, step: Any) -> dict[str, Any]:
    layout = found.params.fmt.layout(step.word, step.level)
    return {
        "level": step.level,
        "table": hex64(step.pa - 8 * step.entry),
        "entry": step.entry,
        "pa": hex64(step.pa),
        "word": hex64(step.word),
        "kind": step.kind.name.lower(),
        "fields": {field.name: f"{field.get(step.word):#x}" for field in layout},
    }


def _translation(found: Walk) -> dict[str, Any] | None:
    from pgtable.registers import SH
    from pgtable.walk import Translation
    from pgtable.why import rights

    result = found.result
    if not isinstance(result, Translation):
        return None
    return {
        "pa": hex64(result.pa),
        "level": result.level,
        "permissions": rights(result.perms, found.params.regime),
        "memory": str(result.attributes),
        "attr": f"{result.attr:#04x}",
        "shareability": SH[result.sh],
        "global": not result.nG,
    }


def _fault(found: Walk) -> dict[str, Any] | None:
    from pgtable.nested import deciders

    fault = found.fault
    if fault is None:
        return None
    return {
        "type": fault.type.value,
        "level": fault.level,
        "code": f"{fault.code:#04x}",
        "esr": hex64(fault.esr(found.access, target_el=2 if fault.stage == 2 else None)),
        "far": hex64(found.va),
        "because": [
            {
                "level": d.level,
                "pa": None if d.pa is None else hex64(d.pa),
                "entry": d.entry,
                "field": d.field,
                "text": d.text,
            }
            for d in deciders(found)
        ],
    }
