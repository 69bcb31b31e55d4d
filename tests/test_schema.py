"""docs/schema: one JSON Schema for each command's --json, strict in what it takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest

from emu.cli import COMMANDS, cli

SCHEMAS = Path(__file__).resolve().parents[1] / "docs" / "schema"
FILES = sorted(SCHEMAS.glob("*.json"))


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object in a schema, itself included."""
    if isinstance(schema, dict):
        yield schema
    for value in schema.values() if isinstance(schema, dict) else schema if isinstance(schema, list) else ():
        yield from parts(value)


def commands() -> Iterator[tuple[str, click.Command]]:
    """("kernel-list", its command) for each that there is."""
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command
        if isinstance(command, click.Group):
            yield from ((f"{name}-{sub}", each) for sub, each in command.commands.items())
        else:
            yield name, command


@pytest.mark.parametrize("path", FILES, ids=[path.stem for path in FILES])
def test_a_schema_is_valid_names_itself_and_lets_nothing_else_in(path: Path) -> None:
    schema = json.loads(path.read_text())
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["properties"]["schema"] == {"const": f"pgtable.{path.stem}/1"}
    assert next(iter(schema["properties"])) == "schema"
    for part in parts(schema):
        if part.get("type") == "object":
            assert "additionalProperties" in part, part
            assert not part.get("properties") or part["additionalProperties"] is False, part
    assert "schema" in schema["required"]


def test_every_command_that_prints_json_has_a_schema_and_no_schema_is_without_one() -> None:
    with_json = {name for name, command in commands() if any("--json" in option.opts for option in command.params)}
    with_json |= {"check-ptdump", "bench"}  # check ptdump --snapshot; make bench
    assert with_json == {path.stem for path in FILES}
