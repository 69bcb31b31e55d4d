"""What mkdocstrings is given of a docstring: lists are lists, and a class made of fields says what they are."""

from __future__ import annotations

import re
from typing import Any

import griffe

RECORDS = ("NamedTuple", "TypedDict")
ENUMS = ("Enum", "IntEnum", "StrEnum", "Flag", "IntFlag")


def _lists(text: str) -> str:
    """A blank line before the first item of a list, without which Markdown takes it for more of the sentence."""
    return re.sub(r"(?m)^(?!\s*- )(\s*\S.*)\n(?=\s*- )", r"\1\n\n", text)


def _fields(cls: griffe.Class) -> str:
    """The fields of a record, or the members of an enumeration, as code; "" for another class."""
    mine = (a for name, a in cls.attributes.items() if not name.startswith("_") and not a.is_alias)
    own = [a for a in mine if "property" not in a.labels]
    bases = {str(base).rpartition(".")[2].partition("[")[0] for base in cls.bases}
    if bases & set(ENUMS):
        return "\n".join(f"{a.name} = {a.value}" for a in own if a.value is not None)
    if "dataclass" not in cls.labels and not bases & set(RECORDS):
        return ""
    said = [f"{a.name}: {a.annotation}" + ("" if a.value is None else f" = {a.value}") for a in own if a.annotation]
    return "\n".join(said)


class Docstrings(griffe.Extension):
    """For every object of the packages."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """griffe's event: everything is loaded."""
        self._object(pkg)

    def _object(self, obj: griffe.Object) -> None:
        if isinstance(obj, griffe.Class) and obj.docstring and (said := _fields(obj)):
            first, _, rest = obj.docstring.value.partition("\n\n")
            obj.docstring.value = f"{first}\n\n```python\n{said}\n```\n\n{rest}"
        if obj.docstring:
            obj.docstring.value = _lists(obj.docstring.value)
        for member in obj.members.values():
            if not member.is_alias and isinstance(member, griffe.Object):
                self._object(member)
