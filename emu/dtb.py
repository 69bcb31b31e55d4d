"""Flattened device trees: a property's value replaced in place.

Source: the Devicetree Specification, chapter 5 (header, structure block, strings block).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

MAGIC = 0xD00DFEED
HEADER = 40
_BEGIN, _END_NODE, _PROPERTY, _NOTHING, _END = 1, 2, 3, 4, 9


class Property(NamedTuple):
    """A property: the path of its node, its name, where its value is."""

    node: str
    name: str
    start: int
    size: int


def properties(blob: bytes | bytearray) -> Iterator[Property]:
    """All properties in order. Raises ValueError for what is no device tree."""
    try:
        yield from _properties(blob)
    except (struct.error, IndexError):
        raise ValueError("the device tree is cut short or damaged") from None


def _properties(blob: bytes | bytearray) -> Iterator[Property]:
    magic, _, at, strings = struct.unpack_from(">4I", blob)
    if magic != MAGIC:
        raise ValueError("no flattened device tree")
    path: list[str] = []
    while True:
        (token,) = struct.unpack_from(">I", blob, at)
        at += 4
        if token == _BEGIN:
            name = _text(blob, at)
            path.append(name)
            at += len(name) // 4 * 4 + 4
        elif token == _END_NODE:
            path.pop()
        elif token == _PROPERTY:
            size, offset = struct.unpack_from(">2I", blob, at)
            yield Property("/".join(path) or "/", _text(blob, strings + offset), at + 8, size)
            at += 8 + (size + 3) // 4 * 4
        elif token == _END:
            return
        elif token != _NOTHING:
            raise ValueError(f"device tree token {token} at {at - 4:#x}")


def replace(blob: bytes, values: dict[str, bytes]) -> tuple[bytes, set[str]]:
    """The tree with the values of "/node/property" replaced, each by one of its own length; and which were there."""
    out, done = bytearray(blob), set()
    for found in properties(blob):
        key = f"{found.node}/{found.name}"
        if key in values:
            if len(values[key]) < found.size:
                raise ValueError(f"{key} has {found.size} bytes, not {len(values[key])}")
            out[found.start : found.start + found.size] = values[key][: found.size]
            done.add(key)
    return bytes(out), done


def packed(blob: bytes) -> bytes:
    """The tree without the room behind its last block: QEMU doubles what it is given, and Linux takes 2 MiB."""
    if len(blob) < HEADER:
        raise ValueError(f"a device tree of {len(blob)} bytes has no header")
    _, _, structs, strings, _, _, _, _, size, struct_size = struct.unpack_from(">10I", blob)
    end = max(strings + size, structs + struct_size)
    if end > len(blob):
        raise ValueError("the device tree is cut short or damaged")
    return blob[:4] + struct.pack(">I", end) + blob[8:end]


def _text(blob: bytes | bytearray, at: int) -> str:
    return bytes(blob[at : blob.index(b"\0", at)]).decode("latin-1")
