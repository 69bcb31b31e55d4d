"""The reference of the command line, made from click's own objects."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path

import click

from docs._site.text import code, plain, table
from emu.cli import COMMANDS, cli

SCHEMAS = Path(__file__).resolve().parents[1] / "schema"


def every_command() -> Iterator[tuple[str, click.Command]]:
    """("kernel list", its command), in alphabetical order."""
    context = click.Context(cli)
    for name in sorted(COMMANDS):
        command = cli.get_command(context, name)
        assert command
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", each) for sub, each in sorted(command.commands.items()))
        else:
            yield name, command


def _halves(text: str) -> tuple[str, str]:
    """A help text without its examples, and the examples."""
    said, _, examples = inspect.cleandoc(text.replace("\b", "")).partition("Examples:\n")
    return said.strip(), "\n".join(line.strip() for line in examples.strip().splitlines())


def _default(option: click.Option, context: click.Context) -> str:
    value = option.get_default(context)
    shown = option.show_default and not option.is_flag and isinstance(value, int | float | str)
    return f" Default: {code(str(value))}." if shown else ""


def options(command: click.Command, context: click.Context) -> str:
    """The table of a command's options."""
    rows = []
    for parameter in command.get_params(context):
        if isinstance(parameter, click.Option) and not parameter.hidden and "--help" not in parameter.opts:
            value = "" if parameter.is_flag else f" {parameter.make_metavar(context)}"
            names = ", ".join((*parameter.opts, *parameter.secondary_opts)) + value
            rows.append((code(names), plain(parameter.help or "") + _default(parameter, context)))
    return table(("Option", ""), rows) if rows else ""


def one(name: str, command: click.Command) -> str:
    """A command's section."""
    context = click.Context(command, info_name=f"pgtable {name}")
    usage = " ".join([f"pgtable {name}", *command.collect_usage_pieces(context)])
    said, inside = _halves(command.help or "")
    _, below = _halves(command.epilog or "")
    parts = [f"## {name}\n", f"```text\n{usage}\n```\n", plain(said) + "\n", options(command, context)]
    examples = inside or below
    parts += [f"```text\n{examples}\n```\n"] if examples else []
    schema = SCHEMAS / f"{name.replace(' ', '-')}.json"
    parts += [f"What `--json` prints: [{schema.stem}](schemas.md#{schema.stem})\n"] if schema.exists() else []
    return "\n".join(parts)


def all_commands() -> str:
    """Every command, with a list of them first."""
    found = list(every_command())
    groups = {name: COMMANDS[name][1] for name in sorted(COMMANDS)}
    rows = []
    for name, line in groups.items():
        ones = [each for each, _ in found if each.partition(" ")[0] == name]
        rows.append((", ".join(f"[{each}](#{each.replace(' ', '-')})" for each in ones), plain(line)))
    return table(("Command", ""), rows) + "\n" + "\n".join(one(name, command) for name, command in found)


# ---- what --json prints


def _type(part: dict[str, object]) -> str:
    """The type of a property in a few words."""
    if "$ref" in part:
        return str(part["$ref"]).rpartition("/")[2]
    if "const" in part:
        return json.dumps(part["const"])
    if "enum" in part:
        return " or ".join(json.dumps(value) for value in part["enum"])  # type: ignore[attr-defined]
    for several in ("oneOf", "anyOf"):
        if several in part:
            return " or ".join(_type(each) for each in part[several])  # type: ignore[attr-defined]
    if part.get("type") == "array":
        return f"array of {_type(part.get('items') or {'type': 'anything'})}"  # type: ignore[arg-type]
    kind = part.get("type", "anything")
    return " or ".join(kind) if isinstance(kind, list) else str(kind)


def _properties(schema: dict[str, object]) -> str:
    """The table of an object's properties; those that may be missing are in italics."""
    required = schema.get("required") or ()
    rows = []
    for name, part in schema["properties"].items():  # type: ignore[attr-defined]
        shown = code(name) if name in required else f"*{code(name)}*"  # type: ignore[operator]
        rows.append((shown, plain(_type(part)), plain(str(part.get("description", "")))))
    return table(("Key", "Type", ""), rows)


def all_schemas() -> str:
    """Every schema: its keys, and those of the objects in it."""
    parts = []
    for path in sorted(SCHEMAS.glob("*.json")):
        schema = json.loads(path.read_text())
        title = f": `{schema['title']}`" if "title" in schema else ""
        said = schema.get("description", "")
        link = f"[{path.name}](../schema/{path.name}){title}\n"
        parts += [f"## {path.stem}\n", link, plain(said) + "\n" if said else "", _properties(schema)]
        for name, part in schema.get("$defs", {}).items():
            if "properties" in part:
                parts += [f"`{name}`:\n", _properties(part)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts))
