"""C structures of a running kernel, read and printed by its BTF.

    area = machine.types["vm_struct"].at(va)
    area["size"], area["pages"]         # int: pointers too; structures inside are values of their own
    print(area)

Rules of this file:
- Memory is read once, when `at` is called; what pointers point to is not read.
- What can be told from the type is told: characters as text, enumerators by name, function pointers by symbol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from emu import btf
from emu.btf import Btf, BtfError, Member

ELEMENTS = 8  # of an array that are shown
DEPTH = 3  # of structures inside structures that are shown
_SIGNED = 1  # of an INT's encoding
_U64 = (1 << 64) - 1

Read = Callable[[int, int], bytes]


@dataclass(frozen=True)
class Types:
    """The types of one kernel: `types["vm_struct"]`; `read(va, n)` gives bytes, `describe(va)` a name for code."""

    btf: Btf
    read: Read
    describe: Callable[[int], str]

    def __getitem__(self, name: str) -> Type:
        """The structure or union (or typedef of one) of that name. Raises BtfError."""
        self.btf.members(name)
        return Type(self, name)

    def returned(self, function: str) -> Type | None:
        """What the structure is that `function` returns a pointer to; None where BTF says something else or nothing."""
        name = self.btf.returns(function)
        return Type(self, name) if name and self.btf.has(name) and self._is_record(name) else None

    def _is_record(self, name: str) -> bool:
        try:
            return bool(self.btf.members(name))
        except BtfError:
            return False


@dataclass(frozen=True)
class Type:
    """A structure or union by name."""

    types: Types
    name: str

    @property
    def size(self) -> int:
        """sizeof, in bytes."""
        return self.types.btf.size(self.name)

    def at(self, va: int) -> Value:
        """The structure at a kernel address, as it is now. Raises ValueError where it cannot be read."""
        return Value(self.types, self.types.btf.id_of(self.name), va, self.types.read(va, self.size))


@dataclass(frozen=True)
class Value:
    """The bytes of a structure that was at `va`."""

    types: Types
    type_id: int
    va: int
    data: bytes

    @cached_property
    def members(self) -> tuple[Member, ...]:
        """Its members; those of a member without a name count as its own."""
        return tuple(self._flat(self.type_id, 0))

    def _flat(self, type_id: int, base: int) -> Iterator[Member]:
        for m in self.types.btf.members_of(type_id):
            place = Member(m.name, base + m.offset, m.size, m.bits, m.type_id, m.bit)
            if m.name:
                yield place
            elif self.types.btf.kind(m.type_id) in (btf.STRUCT, btf.UNION):
                yield from self._flat(m.type_id, base + m.offset)

    def __getitem__(self, name: str) -> int | Value:
        """A member: a number (pointers are addresses, arrays of characters their bytes as one), or a structure."""
        for m in self.members:
            if m.name == name:
                return self._member(m)
        raise KeyError(f"{self.types.btf.name_of(self.type_id)} has no member {name}")

    def _member(self, m: Member) -> int | Value:
        if self.types.btf.kind(m.type_id) in (btf.STRUCT, btf.UNION):
            return Value(self.types, m.type_id, self.va + m.offset, self._bytes(m))
        return self._number(m)

    def _bytes(self, m: Member) -> bytes:
        return self.data[m.offset : m.offset + m.size]

    def _number(self, m: Member) -> int:
        number = int.from_bytes(self._bytes(m), "little")
        width = m.bits or 8 * m.size
        if m.bits:
            number = number >> m.bit & (1 << width) - 1
        signed = self.types.btf.encoding(m.type_id) & _SIGNED
        return number - (1 << width) if signed and width and number >> width - 1 else number

    # as text

    def __str__(self) -> str:
        return "\n".join([f"struct {self.types.btf.name_of(self.type_id)} at {self.va:#x}", *self._lines(1)])

    def _lines(self, depth: int) -> Iterator[str]:
        for m in self.members:
            found = self._member(m)
            if not isinstance(found, Value):
                yield f"{'  ' * depth}{m.name} = {self._text(m, found)}"
            elif depth >= DEPTH:
                yield f"{'  ' * depth}{m.name} = {{...}}"
            else:
                yield f"{'  ' * depth}{m.name}:"
                yield from found._lines(depth + 1)

    def _text(self, m: Member, number: int) -> str:
        types = self.types.btf
        kind = types.kind(m.type_id)
        if kind == btf.PTR:
            return self._pointer(number)
        if kind == btf.ARRAY:
            return self._array(m)
        if kind in (btf.ENUM, btf.ENUM64):
            names = {value: name for name, value in types.enumerators(m.type_id)}
            return names.get(number, str(number))
        return str(number) if abs(number) < 1024 else f"{number:#x}"

    def _pointer(self, number: int) -> str:
        name = self.types.describe(number) if number else ""
        return f"{number:#x} ({name})" if name and not name.startswith("0x") else f"{number:#x}"

    def _array(self, m: Member) -> str:
        types = self.types.btf
        element, count = types.array(m.type_id)
        data, size = self._bytes(m), types.size_of(element)
        if size == 1 and types.kind(element) == btf.INT:
            text = data.split(b"\0")[0]
            return repr(text.decode("latin-1")) if text.isascii() else data[: ELEMENTS * 4].hex()
        if types.kind(element) in (btf.STRUCT, btf.UNION) or not size:
            return f"[{count} x {types.name_of(element) or 'struct'}]"
        shown = [int.from_bytes(data[size * i : size * i + size], "little") for i in range(min(count, ELEMENTS))]
        return f"[{', '.join(f'{n:#x}' for n in shown)}{', ...' if count > ELEMENTS else ''}]"
