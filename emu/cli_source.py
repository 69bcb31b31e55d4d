"""What every command with a SOURCE shares: its options, opening it, addresses as words.

Rules of this file: a source without registers gets them from its RAM, and stderr says from where; a live guest stands
still while a command reads; every mistake is one sentence and exit code 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click
from click.shell_completion import CompletionItem

from emu.cli import CommandError

if TYPE_CHECKING:
    from emu.sources import Source
    from pgtable.listing import Listing
    from pgtable.memory import TableMemory
    from pgtable.params import Regime
    from pgtable.registers import Registers

F = TypeVar("F", bound=Callable[..., Any])

REGIMES = ("EL10", "EL20", "EL2", "EL3")
_BARE = re.compile(r"[0-9a-fA-F]{16}")
_SYMBOL = re.compile(r"([A-Za-z_.$][\w.$]*)(?:\+(\w+))?")

registers_file = click.option(
    "--regs",
    "regs",
    metavar="FILE",
    help="Registers: NAME=VALUE lines, or a JSON object.",
    shell_complete=lambda context, parameter, incomplete: [CompletionItem(incomplete, type="file")],
)
register = click.option("--reg", "reg", multiple=True, metavar="NAME=VALUE", help="One register; counts more.")
regime_option = click.option("--regime", type=click.Choice(REGIMES), help="The translation regime [EL10].")
json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object (docs/schema).")


STAGES = ("1", "2", "both")
stage_option = click.option(
    "--stage",
    type=click.Choice(STAGES),
    help="Stage 1 alone, stage 2 (addresses are IPAs), or both [both where HCR_EL2 has stage 2 on].",
)


def source_argument(name: str = "word", metavar: str = "SOURCE", *, required: bool = True) -> Callable[[F], F]:
    """The argument SOURCE, which a shell can complete."""
    return click.argument(name, metavar=metavar, required=required, shell_complete=complete_source)


def complete_source(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What SOURCE may become, for click."""
    from emu.cli_completion import sources

    return sources(incomplete)


def source_options(command: F) -> F:
    """--regs, --reg, --regime and --json."""
    for option in (json_option, regime_option, register, registers_file):
        command = option(command)
    return command


@contextmanager
def opened(
    word: str, regs: str | None = None, reg: tuple[str, ...] = (), *, registers: bool = True
) -> Iterator[Source]:
    """The source that `word` names, with registers, standing still; where they come from is said on stderr.

    `registers`: they are looked for in RAM where the source has none.
    """
    from emu.kernels import KernelError, fetch, is_name
    from emu.sources import SourceError, found_registers, open_source

    try:
        if is_name(word):
            fetch(word, progress=lambda message: click.echo(message, err=True))
        source = open_source(word, registers=regs, given=reg)
    except (SourceError, KernelError) as error:
        raise CommandError(str(error)) from None
    with source:
        try:
            if registers and source.registers is None:
                found_registers(source)
                click.echo(f"registers: {source.origin}", err=True)
            with source.reading():
                yield source
        except SourceError as error:
            raise CommandError(str(error)) from None


def registers_of(source: Source) -> Registers:
    """The registers of an opened source."""
    assert source.registers is not None
    return source.registers


def regime_of(name: str | None) -> Regime | None:
    """The regime of --regime; None where it was not given."""
    from pgtable.params import Regime

    return Regime(name) if name else None


def stage_of(source: Source, regime: str | None, stage: str | None) -> str:
    """The stage that is meant: --stage, or what the registers say. Raises CommandError for one that is not on."""
    from pgtable.params import stage2_on

    on = stage2_on(registers_of(source)) and regime in (None, "EL10")
    if stage in ("2", "both") and not on:
        raise CommandError(f"--stage {stage}: HCR_EL2 has stage 2 off, or the regime has none (--reg HCR_EL2=VALUE)")
    return stage or ("both" if on else "1")


def stage1_registers(regs: Registers) -> Registers:
    """The same with stage 2 off: what a guest sees whose RAM this is."""
    from pgtable.registers import HCR_EL2

    return regs.replace(HCR_EL2=regs.HCR_EL2 & ~HCR_EL2.mask("VM", "DC"))


def listings(source: Source, regime: str | None, stage: str) -> list[tuple[TableMemory, Listing]]:
    """What the tables map, stage by stage, each with the memory that its tables are in."""
    from pgtable.listing import listing
    from pgtable.listing_stage2 import stage2_listing
    from pgtable.nested_many import GuestMemory
    from pgtable.stage2 import Stage2Params

    memory, regs = source.memory, registers_of(source)
    if stage == "1":
        return [(memory, listing(memory, stage1_registers(regs), regime=regime_of(regime)))]
    second = (memory, stage2_listing(memory, regs))
    if stage == "2":
        return [second]
    guest = GuestMemory(memory, Stage2Params.of(regs))
    return [(guest, listing(guest, regs, regime=regime_of(regime))), second]


def word(text: str, what: str) -> int:
    """A 64-bit number: 0x..., or 16 bare hex digits as the kernel prints them."""
    try:
        value = int(text, 16) if _BARE.fullmatch(text) else int(text, 0)
    except ValueError:
        raise CommandError(f"{what} {text}: must be 0x... or 16 hex digits") from None
    if not 0 <= value < 1 << 64:
        raise CommandError(f"{what} {text}: must be 64 bits")
    return value


def address(text: str, source: Source, what: str = "VA") -> int:
    """A virtual address: a number as `word` reads it, or SYMBOL[+OFFSET] where the source has symbols."""
    named = _SYMBOL.fullmatch(text)
    if named is None or _BARE.fullmatch(text):
        return word(text, what)
    base = source.symbols.get(named[1])
    if base is None:
        none = "" if source.symbols else f", and {source.word} has no symbols"
        raise CommandError(f"{what} {text}: neither a number nor a symbol{none}")
    return base + (word(named[2], f"offset of {what}") if named[2] else 0)


def hex64(value: int) -> str:
    """An address, word or mask as JSON shows it."""
    return f"{value:#018x}"


def span(text: str, what: str) -> tuple[int, int]:
    """The first and the last address of FROM-TO (TO is behind the last) or FROM+SIZE."""
    from pgtable.where import number

    low, plus, size = text.partition("+")
    low, minus, high = (low, "", "") if plus else text.partition("-")
    if not plus and not minus:
        raise CommandError(f"{what} {text}: must be FROM-TO or FROM+SIZE")
    first = word(low.strip(), what)
    try:
        end = first + number(size.strip(), what) if plus else word(high.strip(), what) or 1 << 64
    except ValueError as error:
        raise CommandError(str(error)) from None
    if not first < end <= 1 << 64:
        raise CommandError(f"{what} {text}: must have a first address below its end")
    return first, end - 1
