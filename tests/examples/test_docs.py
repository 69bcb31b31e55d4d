"""Every code block of README.md and docs/ is run and prints what is shown; how, and what is left out: blocks.py."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest

from emu.cli import COMMANDS, cli
from tests.examples.blocks import (
    PAGES,
    ROOT,
    Block,
    Page,
    blocks,
    indented,
    marks,
    matches,
    need,
    needs_snapshot,
    normalised,
)

FENCED = {"python", "console", "text", "setup", "json", "yaml", "toml", "ini", "diff", "c", "asm"}
MOST_NOT_RUN = 12
IDS = [str(page.relative_to(ROOT)) for page in PAGES]
ALL = [block for page in PAGES for block in blocks(page)]


@pytest.mark.parametrize("page", [pytest.param(p, id=i, marks=marks(p)) for p, i in zip(PAGES, IDS, strict=True)])
def test_the_blocks_of_a_page_do_what_is_shown(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need(page)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    ran = Page(page, tmp_path, booted=needs_snapshot(page))
    ran.run()
    assert not ran.wrong, "\n\n".join(ran.wrong)


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_says_its_language(page: Path) -> None:
    assert {block.language for block in blocks(page)} <= FENCED
    assert not indented(page), "indented blocks have no language"
    assert page.read_text().count("\n```") % 2 == 0


def test_few_blocks_are_not_run_and_each_says_why(record_property: pytest.RecordProperty) -> None:
    left_out = [f"{block.where}: {block.reason}" for block in ALL if block.reason]
    record_property("blocks of the docs that are not run", "\n".join(left_out))
    print(*left_out, sep="\n")
    assert len(left_out) <= MOST_NOT_RUN, left_out
    assert all(len(line.partition(": ")[2]) > 20 for line in left_out)


def command_of(words: list[str]) -> tuple[click.Command | None, str]:
    """The command that `pgtable WORDS` calls, through groups."""
    context = click.Context(cli)
    command = cli.get_command(context, words[0])
    if isinstance(command, click.Group) and len(words) > 1:
        return command.commands.get(words[1]), " ".join(words[:2])
    return command, words[0]


def synopses() -> list[tuple[Block, str]]:
    """Commands in blocks and in code spans that nobody runs."""
    found = []
    for block in ALL:
        if block.language == "text" or block.reason:
            whole = re.sub(r"\n +", " ", block.body)
            found += [(block, line) for line in re.findall(r"^(?:\$ |\(gdb\) )?pgtable (.*)$", whole, re.M)]
    for page in PAGES:
        spans = re.findall(r"`pgtable ([a-z][^`]*)`", page.read_text())
        found += [(Block(page, 0, "span", span), span) for span in spans]
    return found


@pytest.mark.parametrize(("block", "line"), synopses(), ids=lambda value: str(value)[:50])
def test_a_synopsis_has_options_that_there_are(block: Block, line: str) -> None:
    words = re.sub(r"\\?\|", " ", line.partition("#")[0]).split()
    if not re.fullmatch(r"[a-z][a-z0-9-]*", words[0]):
        return
    assert words[0] in COMMANDS, f"{block.where}: no command {words[0]}"
    command, name = command_of(words)
    if command is None:
        return
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    asked = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-]*", line))
    assert asked <= known | {"--help", "--version"}, f"{block.where}: pgtable {name}"


def test_the_runner_sees_what_is_wrong(tmp_path: Path) -> None:
    page = ROOT / "docs" / "made-up.md"
    made = Page(page, tmp_path)
    made.python(Block(page, 1, "python", "print(1)\n", output="2\n"))
    made.python(Block(page, 1, "python", "1 / 0\n"))
    made.console(Block(page, 1, "console", "$ echo a\nb\n$ exit 2\n$ (exit 1)\n$ echo '1\n> 2'\n1\n...\n"))
    assert len(made.wrong) == 5
    assert matches(normalised("a\n...\nc"), ["a", "b", "c"])
    assert normalised("0xffff800081 12K of 4", booted=True) == normalised("0xffff80008120304c 3M of 0x5", booted=True)
    assert normalised("rw- 4K", booted=True) != normalised("r-- 4K", booted=True)
    assert not matches(normalised("a\n...\nd"), ["a", "b", "c"])
