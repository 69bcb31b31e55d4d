"""Structure offsets, sizes and enum values from the BTF section of a kernel image.

BTF is a list of type records of varying length, numbered from 1, and one block of strings. A record's place is
only known after all records before it, so the places are worked out once (`index`, which callers may keep); all
else is read when asked, from the bytes.

Offsets and sizes are in bytes. Names are the C names without `struct`, `union` or `enum`; a typedef's name will
do as well. Source: Documentation/bpf/btf.rst of Linux.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]

MAGIC = b"\x9f\xeb\x01\x00"  # magic 0xeb9f, version 1, no flags
HEADER = struct.Struct("<HBBIIIII")
POINTER_SIZE = 8

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF = range(1, 9)
VOLATILE, CONST, RESTRICT, FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT = range(9, 17)
DECL_TAG, TYPE_TAG, ENUM64 = range(17, 20)

# Words behind the three of every record: so many, and so many more for each of its `vlen` parts.
_FIXED = {INT: 1, ARRAY: 3, VAR: 1, DECL_TAG: 1}
_PER_PART = {STRUCT: 3, UNION: 3, ENUM: 2, FUNC_PROTO: 2, DATASEC: 3, ENUM64: 3}
_SAME_AS = frozenset((TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG))
_SIZED = frozenset((INT, STRUCT, UNION, ENUM, FLOAT, DATASEC, ENUM64))
_RECORDS = frozenset((STRUCT, UNION))
DEEPEST = 64  # types behind each other, records inside each other: more is a circle


class BtfError(LookupError):
    """The image has no BTF, or its BTF does not have what was asked for."""


@dataclass(frozen=True)
class Member:
    """A member of a struct or union: `offset` in bytes; `bits` is a bit field's width, else 0, and `bit` its lowest
    bit, counted from `offset`."""

    name: str
    offset: int
    size: int
    bits: int
    type_id: int
    bit: int = 0


@dataclass(frozen=True)
class _Type:
    name: str
    kind: int
    vlen: int
    kflag: bool
    size_or_type: int
    at: int  # word behind the record's first three


def find(image: U8) -> tuple[int, int] | None:
    """(start, end) of the BTF section in `image` (uint8), found by its header; None where there is none."""
    spans = ((hit.start(), _section_end(image, hit.start())) for hit in re.finditer(re.escape(MAGIC), image.data))
    # Should a chance hit look like a header, the real section is the longer one.
    return max((span for span in spans if span[1]), key=lambda span: span[1] - span[0], default=None)


def _section_end(image: U8, start: int) -> int:
    """The end of the section whose header is at `start`; 0 where this is no header."""
    raw = image[start : start + HEADER.size].tobytes()
    if start % 4 or len(raw) < HEADER.size:
        return 0
    _, _, _, header, type_off, type_len, str_off, str_len = HEADER.unpack(raw)
    end = start + header + str_off + str_len
    sane = header >= HEADER.size and header % 4 == 0 and type_off % 4 == 0 and type_len % 4 == 0
    if not sane or str_off < type_off + type_len or str_len < 2 or end > len(image):
        return 0
    strings = start + header + str_off
    return end if image[strings] == 0 and image[end - 1] == 0 else 0


class Btf:
    """The types of one kernel.

    `section` are the bytes of its BTF section (uint8); `index` is what `index` of an earlier object was.
    Raises BtfError when the section cannot be read to its end.
    """

    def __init__(self, section: U8, index: U32 | None = None) -> None:
        _, _, _, header, type_off, type_len, str_off, str_len = HEADER.unpack(section[: HEADER.size].tobytes())
        types = section[header + type_off : header + type_off + type_len]
        self._words: U32 = np.frombuffer(types.tobytes(), "<u4")
        self._strings = section[header + str_off : header + str_off + str_len].tobytes()
        self._index = index
        self._by_name: dict[str, list[int]] = {}

    @property
    def index(self) -> U32:
        """Where each type's record starts, in words (uint32; entry 0 is type 1)."""
        if self._index is None:
            self._index = _build_index(self._words)
        return self._index

    def __len__(self) -> int:
        return len(self.index)

    def size(self, name: str) -> int:
        """sizeof(name)."""
        return self._size_of(self._named(name))

    def offset(self, name: str, path: str) -> int:
        """offsetof(name, path); `path` may go through structs and unions inside ("mmap_lock.count")."""
        return self.member(name, path).offset

    def has(self, name: str, path: str | None = None) -> bool:
        """Whether there is a type `name` and, where `path` is given, whether it has that member."""
        try:
            self.member(name, path) if path else self._named(name)
        except BtfError:
            return False
        return True

    def member(self, name: str, path: str) -> Member:
        """The member that `path` names, its offset counted from the start of `name`."""
        type_id, base, found = self._named(name), 0, None
        for part in path.split("."):
            found = self._find_member(type_id, part)
            if found is None:
                raise BtfError(f"{name} has no member {path} in this kernel's BTF")
            base += found.offset
            type_id = found.type_id
        assert found is not None
        return Member(path, base, found.size, found.bits, found.type_id)

    def members(self, name: str) -> list[Member]:
        """The members of a struct or union in order; one without a name keeps the name ""."""
        return list(self._members(self._plain(self._named(name))))

    def enum(self, name: str) -> dict[str, int]:
        """The enumerators of `enum name` and their values."""
        found = self._type(self._plain(self._named(name)))
        if found.kind not in (ENUM, ENUM64):
            raise BtfError(f"{name} is not an enum in this kernel's BTF")
        return dict(self._enumerators(found))

    # by number, for readers of values

    def id_of(self, name: str) -> int:
        """The number of the type called `name`, without its typedefs. Raises BtfError."""
        return self._plain(self._named(name))

    def name_of(self, type_id: int) -> str:
        """The name of a type, "" where it has none."""
        return self._type(type_id).name

    def kind(self, type_id: int) -> int:
        """The kind of the type behind typedefs and qualifiers (INT, PTR ...)."""
        return self._type(self._plain(type_id)).kind if type_id else 0

    def members_of(self, type_id: int) -> list[Member]:
        """The members of a struct or union."""
        return list(self._members(self._plain(type_id)))

    def size_of(self, type_id: int) -> int:
        """The size of a type in bytes."""
        return self._size_of(type_id)

    def array(self, type_id: int) -> tuple[int, int]:
        """An array's element type and its length."""
        at = self._type(self._plain(type_id)).at
        return int(self._words[at]), int(self._words[at + 2])

    def encoding(self, type_id: int) -> int:
        """An integer's encoding (1: signed, 2: character, 4: truth value); 1 for a signed enum; 0 for others."""
        plain = self._type(self._plain(type_id))
        if plain.kind in (ENUM, ENUM64):
            return int(plain.kflag)
        return int(self._words[plain.at]) >> 24 & 15 if plain.kind == INT else 0

    def enumerators(self, type_id: int) -> list[tuple[str, int]]:
        """An enum's names and values."""
        return list(self._enumerators(self._type(self._plain(type_id))))

    def returns(self, function: str) -> str:
        """The name of the struct or union that `function` returns a pointer to; "" for all else."""
        for type_id in self._ids(function):
            if self._type(type_id).kind == FUNC:
                result = self._type(self._type(type_id).size_or_type).size_or_type
                if result and self.kind(result) == PTR:
                    target = self._type(self._plain(result)).size_or_type
                    return self.name_of(self._plain(target)) if self.kind(target) in _RECORDS else ""
        return ""

    # records

    def _type(self, type_id: int) -> _Type:
        if not 1 <= type_id <= len(self.index):
            raise BtfError(f"this kernel's BTF has no type number {type_id}")
        at = int(self.index[type_id - 1])
        name, info, rest = (int(w) for w in self._words[at : at + 3])
        kind, vlen, kflag = _split_info(info)
        return _Type(self._string(name), kind, vlen, kflag, rest, at + 3)

    def _string(self, at: int) -> str:
        end = self._strings.find(b"\0", at)
        if end < 0:
            raise BtfError(f"this kernel's BTF has no name at {at:#x}")
        return self._strings[at:end].decode("utf-8", "replace")

    def _named(self, name: str) -> int:
        """The type called `name`: a definition before a typedef."""
        ids = self._by_name.get(name)
        if ids is None:
            ids = self._by_name[name] = self._look_up(name)
        if not ids:
            raise BtfError(f"this kernel's BTF has no type {name}")
        return ids[0]

    def _look_up(self, name: str) -> list[int]:
        ids = self._ids(name)
        kinds = {int(i): self._type(int(i)).kind for i in ids}
        wanted = _SIZED | {TYPEDEF}
        return sorted((i for i in kinds if kinds[i] in wanted), key=lambda i: (kinds[i] == TYPEDEF, i))

    def _ids(self, name: str) -> list[int]:
        """Every type of that name, functions too."""
        at = self._strings.find(b"\0" + name.encode() + b"\0") + 1
        if not name or not at:
            return []
        found: list[int] = (np.flatnonzero(self._words[self.index] == at) + 1).tolist()
        return found

    def _plain(self, type_id: int) -> int:
        """The type behind typedefs and qualifiers."""
        for _ in range(DEEPEST):
            found = self._type(type_id)
            if found.kind not in _SAME_AS:
                return type_id
            type_id = found.size_or_type
        raise BtfError(f"type number {type_id} of this kernel's BTF leads back to itself")

    def _size_of(self, type_id: int) -> int:
        count = 1
        for _ in range(DEEPEST):
            plain = self._type(self._plain(type_id))
            if plain.kind == PTR:
                return count * POINTER_SIZE
            if plain.kind != ARRAY:
                return count * plain.size_or_type if plain.kind in _SIZED else 0
            type_id, _, length = (int(w) for w in self._words[plain.at : plain.at + 3])
            count *= length
        raise BtfError(f"type number {type_id} of this kernel's BTF is an array of itself")

    def _members(self, type_id: int) -> Iterator[Member]:
        outer = self._type(type_id)
        if outer.kind not in _RECORDS:
            raise BtfError(f"{outer.name or 'a type without a name'} has no members in this kernel's BTF")
        for name, member_type, place in self._parts(outer, 3):
            bits, place = (place >> 24, place & 0xFFFFFF) if outer.kflag else (0, place)
            size = self._size_of(member_type)
            yield Member(self._string(name), place // 8, size, bits, member_type, place % 8)

    def _find_member(self, type_id: int, name: str, depth: int = 0) -> Member | None:
        """The member `name`, also inside members without a name."""
        if depth > DEEPEST:
            raise BtfError(f"type number {type_id} of this kernel's BTF is inside itself")
        plain = self._plain(type_id)
        if self._type(plain).kind not in _RECORDS:
            return None
        members = list(self._members(plain))
        for m in members:
            if m.name == name:
                return m
        for m in members:
            inner = self._find_member(m.type_id, name, depth + 1) if not m.name else None
            if inner:
                return Member(name, m.offset + inner.offset, inner.size, inner.bits, inner.type_id)
        return None

    def _enumerators(self, found: _Type) -> Iterator[tuple[str, int]]:
        wide = found.kind == ENUM64
        for name, low, *high in self._parts(found, 3 if wide else 2):
            value, width = (low | high[0] << 32, 64) if wide else (low, 32)
            signed = found.kflag and value >> width - 1
            yield self._string(name), value - (1 << width) if signed else value

    def _parts(self, outer: _Type, width: int) -> list[list[int]]:
        block = self._words[outer.at : outer.at + width * outer.vlen]
        parts: list[list[int]] = block.reshape(-1, width).tolist()
        return parts


def _split_info(info: int) -> tuple[int, int, bool]:
    return info >> 24 & 0x1F, info & 0xFFFF, bool(info >> 31)


def _build_index(words: U32) -> U32:
    # Plain ints in a list: indexing numpy one word at a time would take ten times as long.
    infos: list[int] = words.tolist()
    fixed = [3 + _FIXED.get(kind, 0) for kind in range(32)]
    per_part = [_PER_PART.get(kind, 0) for kind in range(32)]
    known = ENUM64
    places: list[int] = []
    add, at, end = places.append, 0, len(infos)
    while at < end:
        add(at)
        info = infos[at + 1] if at + 1 < end else 0
        kind = info >> 24 & 0x1F
        if not 0 < kind <= known:
            raise BtfError(f"this kernel's BTF has a record of unknown kind {kind}")
        at += fixed[kind] + per_part[kind] * (info & 0xFFFF)
    if at != end:
        raise BtfError("this kernel's BTF ends inside a record")
    return np.array(places, np.uint32)
