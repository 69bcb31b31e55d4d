"""`pgtable explain`: a descriptor or a register value that somebody has in hand, bit by bit."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from emu.cli import CommandError

if TYPE_CHECKING:
    from pgtable.describe import Explanation

WIDTH = 80  # where the output is no terminal
OOPS_LEVELS = {"pgd": -1, "p4d": 0, "pud": 1, "pmd": 2, "pte": 3}  # as the kernel's "[VA] pgd=..., p4d=..., ..." line
COLOURS = {"head": "bold", "one": "bold", "changed": "yellow", "fault": "red", "wrong": "red", "suspicious": "yellow"}


@click.command()
@click.argument("words", nargs=-1, required=True, metavar="WORD|REGISTER=VALUE...")
@click.option("--level", type=int, help="The descriptor's level, -1 to 3 [guessed, and the reason is said].")
@click.option("--granule", metavar="4k|16k|64k", help="Translation granule [TCR's, else 4k].")
@click.option("--ds", is_flag=True, help="52-bit addresses with 4k and 16k: TCR.DS = 1 (LPA2).")
@click.option("--d128", is_flag=True, help="WORD is a 128-bit descriptor (FEAT_D128); not judged.")
@click.option("--stage", type=int, default=1, show_default=True, help="1 or 2.")
@click.option("--fwb", is_flag=True, help="HCR_EL2.FWB = 1, for stage 2.")
@click.option("--regime", default="EL10", show_default=True, metavar="EL10|EL20|EL2|EL3", help="Translation regime.")
@click.option("--mair", metavar="VALUE", help="MAIR_ELx [Linux's].")
@click.option("--tcr", metavar="VALUE", help="TCR_ELx: granule, DS, HA, HD, address size.")
@click.option("--va", metavar="VA", help="An address that the descriptor translates.")
@click.option("--table", "tables", multiple=True, metavar="WORD", help="A table descriptor above it; once for each.")
@click.option("--kernel", metavar="VARIANT", help="Linux's names too: 6.1, 6.12, 7.x ...")
@click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schema).")
def explain(words: tuple[str, ...], as_json: bool, **options: Any) -> None:
    """What a descriptor or a register value says: each bit, what it allows, what looks wrong.

    A WORD is 0x... or 16 hex digits as the kernel prints them. Several words are compared. REGISTER=VALUE is
    explained by itself (ESR_EL1 with FAR_EL1), or counts for the words that are given (SCTLR_EL1, TCR_EL1, MAIR_EL1
    ...). The line "[VA] pgd=..., p4d=..., pud=..., pmd=..., pte=..." of a kernel's oops is taken as it is.

    \b
    Examples:
      pgtable explain 0x00e8000040000f03 --kernel 7.x
      pgtable explain 00e8000040000783 00e8000040000703
      pgtable explain ESR_EL1=0x96000047 FAR_EL1=0xffff800012345678
    """
    try:
        request = read(words, options)
        found, above = request.explained()
    except ValueError as error:
        raise CommandError(str(error)) from None
    if as_json:
        click.echo(json.dumps(as_object(found, above), indent=1))
        return
    _show(found, above)


class Request(NamedTuple):
    """What was asked: words with their levels, registers in order, and the options."""

    words: list[tuple[int, int | None]]
    registers: list[tuple[str, int]]
    oops: bool
    options: dict[str, Any]

    def explained(self) -> tuple[list[Explanation], list[Explanation]]:
        """What is explained in full, and the tables of an oops above it. Raises ValueError."""
        from pgtable import explain
        from pgtable.registers import NAMES

        if self.options["d128"]:
            return list(self._wide()), []
        context = {name: value for name, value in self.registers if name in NAMES and self.words}
        shared = self._shared(context)
        names = self._names()
        alone = [pair for pair in self.registers if pair[0] not in context]
        if not self.oops:
            found = [names(explain(word, self.options["level"], **shared)) for word, _ in self.words]
            return [*found, *self._registers(alone)], []
        *tables, (last, level) = self.words
        shared["tables"] = [*shared["tables"], *(word for word, _ in tables)]
        above = [names(explain(word, at, **shared | {"tables": []})) for word, at in tables]
        return [names(explain(last, level, **shared)), *self._registers(alone)], above

    def _wide(self) -> Iterator[Explanation]:
        """128-bit descriptors; what does not go with them is refused."""
        from pgtable.describe128 import explain128

        o = self.options
        others = [name for name in ("ds", "mair", "tcr", "va", "tables", "kernel") if o[name]]
        if self.oops or self.registers or others:
            names = ", ".join(f"--{name.removesuffix('s') if name == 'tables' else name}" for name in others)
            raise ValueError(
                f"--d128 goes with words, --level, --granule, --stage, --fwb, --regime: not {names or 'more'}"
            )
        for word, _ in self.words:
            granule = o["granule"] or "4K"
            yield explain128(word, o["level"], granule=granule, stage=o["stage"], fwb=o["fwb"], regime=o["regime"])

    def _shared(self, context: dict[str, int]) -> dict[str, Any]:
        """The keyword arguments of pgtable.explain for every word."""
        from pgtable.registers import HCR_EL2

        o = self.options
        el = {"EL10": 1, "EL20": 2, "EL2": 2, "EL3": 3}.get(o["regime"], 1)
        for name, text in ((f"MAIR_EL{el}", o["mair"]), (f"TCR_EL{el}", o["tcr"])):
            if text is not None:
                context[name] = number(text, name, decimal=True)
        fwb = o["fwb"] or bool(HCR_EL2["FWB"].get(context.get("HCR_EL2", 0)))
        keywords = {name: o[name] for name in ("granule", "stage", "regime", "va")}
        tables = [number(text, "table") for text in o["tables"]]
        return context | keywords | {"fwb": fwb, "tables": tables, "ds": o["ds"] or None}

    def _names(self) -> Any:
        """Adds Linux's names where a kernel was given."""
        if self.options["kernel"] is None:
            return lambda found: found
        from kernel_model.describe import describe
        from kernel_model.variants import by_name

        variant = by_name(self.options["kernel"])
        return lambda found: describe(found, variant)

    def _registers(self, pairs: list[tuple[str, int]]) -> Iterator[Explanation]:
        from pgtable.describe_registers import explain_register
        from pgtable.descriptors import Granule

        granule = Granule.named(self.options["granule"]) if self.options["granule"] else None
        form: dict[str, Any] = {"granule": granule, "e2h": self.options["regime"] == "EL20", "wide": self.options["ds"]}
        count, values = Counter(name for name, _ in pairs), dict(pairs)
        for name, value in pairs:
            far = values.get(f"FAR_{name[4:]}") if name.startswith("ESR") and count[name] == 1 else None
            if not (name.startswith("FAR") and count[f"ESR_{name[4:]}"] == 1):
                yield explain_register(name, value, far=far, **form)


def read(arguments: tuple[str, ...], options: dict[str, Any]) -> Request:
    """The arguments taken apart; raises ValueError, which names the one that is wrong."""
    words: list[tuple[int, int | None]] = []
    registers: list[tuple[str, int]] = []
    options = options | {"va": number(options["va"], "VA") if options["va"] is not None else None}
    oops = False
    for part in (part for argument in arguments for part in re.split(r"[,\s]+", argument) if part):
        name, equals, value = part.partition("=")
        if part.startswith("["):
            options["va"] = number(part.strip("[]"), "VA")
        elif not equals:
            words.append((number(part, "word", width=128 if options["d128"] else 64), None))
        elif name in OOPS_LEVELS:
            oops = True
            words.append((number(value, name), OOPS_LEVELS[name]))
        else:
            registers.append((_register(name), number(value, _register(name), decimal=True)))
    if not words and not registers:
        raise ValueError("there is nothing to explain: give a word or REGISTER=VALUE")
    if oops:
        words = list(_real_levels(words, options))
    return Request(words, registers, oops, options)


def _register(text: str) -> str:
    """A register's name; in small letters and without _EL1 too. Raises ValueError."""
    from pgtable.describe_registers import KNOWN

    for name in (text.upper(), f"{text.upper()}_EL1"):
        if name in KNOWN:
            return name
    raise ValueError(f"register {text}: there is none, only {', '.join(KNOWN)}")


def _real_levels(words: list[tuple[int, int | None]], options: dict[str, Any]) -> Iterator[tuple[int, int | None]]:
    """The levels that the granule has: above them the kernel prints a folded level again, or an unrelated slot."""
    from pgtable.descriptors import LAST_LEVEL, Granule
    from pgtable.findings import LOWEST_LEVEL

    granule = Granule.named(options["granule"] or "4K")
    lowest = LOWEST_LEVEL[granule] - (granule is Granule.K4 and options["ds"])
    levels = [lowest - 1 if level is None else level for _, level in words]
    for (word, given), level, below in zip(words, levels, [*levels[1:], LAST_LEVEL + 1], strict=True):
        if given is None:
            raise ValueError(f"word {word:#018x}: cannot be given beside pgd=, p4d=, pud=, pmd=, pte=")
        if below > lowest:
            yield word, max(level, lowest)


def number(text: str, what: str, *, decimal: bool = False, width: int = 64) -> int:
    """A value of `width` bits: 0x..., all hex digits as the kernel prints them, if asked decimal too. ValueError."""
    digits = width // 4
    hexadecimal = re.fullmatch(rf"0[xX][0-9a-fA-F]+(_[0-9a-fA-F]+)*|[0-9a-fA-F]{{{digits}}}", text)
    if not hexadecimal and not (decimal and re.fullmatch("[0-9]+", text)):
        raise ValueError(f"{what} {text}: not a number (0x..., or {digits} hex digits)")
    value = int(text, 16 if hexadecimal else 10)
    if value >> width:
        raise ValueError(f"{what} {text}: has {value.bit_length()} bits, and there are {width}")
    return value


# text


def _show(found: list[Explanation], above: list[Explanation]) -> None:
    from pgtable.figure import ASCII, LINES, side_by_side, text

    terminal = sys.stdout.isatty()
    width = max(shutil.get_terminal_size().columns, 40) if terminal else WIDTH
    paint = _paint if terminal and "NO_COLOR" not in os.environ else lambda _, piece: piece
    box = LINES if (sys.stdout.encoding or "").lower().startswith("utf") else ASCII
    alike = len(found) > 1 and len({one.name for one in found}) == 1
    parts = [side_by_side(found, width, paint)] if alike else [text(one, width, box, paint) for one in found]
    tables = [_table_line(one) for one in above]
    click.echo("\n\n".join(["\n".join(tables), *parts] if tables else parts))


def _table_line(one: Explanation) -> str:
    """An entry of an oops above the last one, in one line."""
    place = one.place
    assert place
    target = "" if place.address is None else f" -> PA {place.address:#x}, {one.facts.get('below', '')}"
    return f"L{place.level:<2} {one.word:#018x} {place.kind.name.lower()}{target}"


def _paint(style: str, piece: str) -> str:
    colour = COLOURS.get(style)
    return click.style(piece, bold=True) if colour == "bold" else click.style(piece, fg=colour) if colour else piece


# JSON


def as_object(found: list[Explanation], above: list[Explanation]) -> dict[str, Any]:
    """What --json prints: every word, and for words of one kind the fields in which they differ."""
    alike = len(found) > 1 and len({one.name for one in found}) == 1
    names = dict.fromkeys(row.field.name for one in found for row in one.fields) if alike else {}
    differ = {name: [_value(one, name) for one in found] for name in names}
    return {
        "schema": "pgtable.explain/1",
        "words": [_word(one) for one in found],
        "tables": [_word(one) for one in above],
        "differences": {name: values for name, values in differ.items() if len(set(values)) > 1},
    }


def _value(one: Explanation, name: str) -> str | None:
    return f"{one[name].value:#x}" if name in one.layout else None


def _word(one: Explanation) -> dict[str, Any]:
    from pgtable.bits import hex_word

    fields = [
        {
            "field": row.field.name,
            "bits": row.field.bits,
            "value": f"{row.value:#x}",
            "meaning": row.meaning,
            "reserved": row.field.reserved,
            "linux": list(row.linux),
        }
        for row in one.fields
    ]
    return {
        "word": hex_word(one.word, one.layout.width),
        "register": one.name or None,
        "layout": one.layout.name,
        "title": one.title,
        "descriptor": _place(one),
        "fields": fields,
        "facts": dict(one.facts),
        "findings": [finding._asdict() for finding in one.findings],
        "assumptions": list(one.assumptions),
    }


def _place(one: Explanation) -> dict[str, Any] | None:
    place = one.place
    if place is None:
        return None
    return {
        "kind": place.kind.name.lower(),
        "level": place.level,
        "guessed": place.reason or None,
        "granule": place.granule.label,
        "ds": place.ds,
        "stage": place.stage,
        "regime": place.regime.value,
        "address": None if place.address is None else f"{place.address:#018x}",
        "size": place.size,
        "rights": dict(place.rights),
    }
