"""Names of kernel addresses, and addresses of kernel names.

A kernel has many names more than once (`__func__.0`): asking for such a name lists the addresses and picks none, and
as a mapping the table holds only names that stand for one address.
The compiler renames functions (`.isra.0`, `.constprop.0`, `.part.0`) and Linux does (`vmalloc` became
`vmalloc_noprof`); such forms are found where a caller asks for them, never in place of the plain name.
Every symbol knows where it came from: "kallsyms", "file" (given by the user), "ksymtab", "code" or "header".
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]

SOURCES = ("kallsyms", "file", "ksymtab", "code", "header")


class SymbolError(KeyError):
    """A name that the kernel does not have, or has more than once; `addresses` are those it has."""

    def __init__(self, message: str, addresses: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.addresses = addresses

    def __str__(self) -> str:  # KeyError shows the repr of its argument
        return str(self.args[0])


class Place(NamedTuple):
    """An address as a distance behind a symbol; `str()` gives `name+0x12`."""

    name: str
    offset: int

    def __str__(self) -> str:
        return f"{self.name}+{self.offset:#x}" if self.offset else self.name


@dataclass(frozen=True, eq=False)
class Entries:
    """A list of symbols: `names`, nm letters (uint8) and link-time addresses (uint64), in any order."""

    names: list[str]
    types: U8
    addresses: U64

    @classmethod
    def empty(cls) -> Entries:
        """No entries."""
        return cls([], np.empty(0, np.uint8), np.empty(0, np.uint64))

    @classmethod
    def of(cls, rows: Mapping[str, int], letter: str = "D") -> Entries:
        """Entries of one type."""
        types = np.full(len(rows), ord(letter), np.uint8)
        return cls(list(rows), types, np.array(list(rows.values()), np.uint64))

    def __len__(self) -> int:
        return len(self.names)

    def select(self, keep: NDArray[np.bool_]) -> Entries:
        """The entries where `keep` is true."""
        names = [self.names[k] for k in np.flatnonzero(keep).tolist()]
        return Entries(names, self.types[keep], self.addresses[keep])

    def without_marks(self) -> Entries:
        """Without mapping symbols ($x, $d), which mark code and data for disassemblers."""
        return self.select(np.array([not name.startswith("$") for name in self.names], bool))

    def shifted(self, by: int) -> Entries:
        """All addresses moved by `by` bytes, modulo 2^64."""
        return Entries(self.names, self.types, self.addresses + np.uint64(by & (1 << 64) - 1))


class Symbols(Mapping[str, int]):
    """All symbols of one kernel: a mapping from each name that stands for one address to that link-time address.

    `all`, `at` and `entries` know the repeated names too. `end` is the first address behind the kernel: nothing from
    there on has a name.
    """

    def __init__(self, entries: Entries, sources: U8, end: int) -> None:
        order = np.lexsort((_rank(entries), entries.addresses))
        names = [entries.names[k] for k in order.tolist()]
        self._entries = Entries(names, entries.types[order], entries.addresses[order])
        self._sources = sources[order]
        self._end = end

    @classmethod
    def sorted(cls, entries: Entries, sources: U8, repeated: U8, end: int) -> Symbols:
        """From what `entries`, `sources` and `repeated` of another object gave."""
        self = cls.__new__(cls)
        self._entries, self._sources, self._end = entries, sources, end
        self.__dict__["repeated"] = repeated  # where cached_property keeps its value
        return self

    @classmethod
    def of(cls, parts: Mapping[str, Entries], end: int) -> Symbols:
        """Join entries by source; the order of `parts` says whose entry of a name counts."""
        names: list[str] = []
        seen: set[str] = set()
        types, addresses, sources = [], [], []
        for source, entries in parts.items():
            fresh = entries.select(np.array([n not in seen for n in entries.names], bool)) if seen else entries
            names += fresh.names
            seen.update(fresh.names)
            types.append(fresh.types)
            addresses.append(fresh.addresses)
            sources.append(np.full(len(fresh), SOURCES.index(source), np.uint8))
        joined = Entries(names, np.concatenate(types), np.concatenate(addresses))
        return cls(joined, np.concatenate(sources), end)

    # as arrays (address order), for caches and for whoever looks at all symbols at once

    @property
    def entries(self) -> Entries:
        """All symbols in address order."""
        return self._entries

    @property
    def sources(self) -> U8:
        """For each of `entries`, the index of its source in SOURCES."""
        return self._sources

    @cached_property
    def repeated(self) -> U8:
        """For each of `entries`, 1 where its name stands for several addresses, else 0."""
        rows = [k for name in self._others for k in self._rows(name) if len(self.all(name)) > 1]
        marks = np.zeros(len(self._entries), np.uint8)
        marks[rows] = 1
        return marks

    # from name to address

    @cached_property
    def _first(self) -> dict[str, int]:
        """The first entry of each name."""
        names = self._entries.names
        return dict(zip(reversed(names), range(len(names) - 1, -1, -1), strict=True))

    @cached_property
    def _others(self) -> dict[str, list[int]]:
        """The other entries of the names that have several."""
        first = np.fromiter(map(self._first.__getitem__, self._entries.names), np.int64, len(self._entries))
        table: dict[str, list[int]] = {}
        for k in np.flatnonzero(first != np.arange(len(first))).tolist():
            table.setdefault(self._entries.names[k], []).append(k)
        return table

    def _rows(self, name: str) -> list[int]:
        first = self._first.get(name)
        return [] if first is None else [first, *self._others.get(name, ())]

    def _one_row(self, name: str) -> int:
        if name not in self._first:
            raise SymbolError(f"this kernel has no symbol {name}")
        return self._first[name]

    def __getitem__(self, name: str) -> int:
        row = self._first.get(name)
        if row is not None and not self.repeated[row]:
            return int(self._entries.addresses[row])
        if row is not None:
            found = self.all(name)
            listed = ", ".join(f"{a:#x}" for a in found)
            raise SymbolError(f"{name} stands for {len(found)} addresses: {listed}", tuple(found))
        others = ", ".join(self.variants(name)[:4])
        hint = f"; it has {others}" if others else ""
        raise SymbolError(f"this kernel has no symbol {name}{hint}")

    def __iter__(self) -> Iterator[str]:
        return (name for name, row in self._first.items() if not self.repeated[row])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, name: object) -> bool:
        return name in self._first and not self.repeated[self._first[str(name)]]

    def all(self, name: str) -> list[int]:
        """Every address that `name` stands for, in ascending order; empty where there is none."""
        return sorted({int(self._entries.addresses[k]) for k in self._rows(name)})

    def variants(self, name: str) -> list[str]:
        """The names that are `name` as the compiler or the allocation profiler renamed it, sorted."""
        return sorted(n for n in self._first if n == f"{name}_noprof" or n.startswith(f"{name}."))

    def find(self, name: str) -> int:
        """The address of `name` or, where the kernel lacks it, of its only variant. Raises SymbolError."""
        others = [] if name in self._first else self.variants(name)
        return self[others[0]] if len(others) == 1 else self[name]

    def source(self, name: str) -> str:
        """Where `name` came from: one of SOURCES. Raises SymbolError."""
        return SOURCES[self._sources[self._one_row(name)]]

    def type(self, name: str) -> str:
        """The nm letter of `name` ("T", "d" ...). Raises SymbolError."""
        return chr(self._entries.types[self._one_row(name)])

    # from address to name

    @cached_property
    def _address_list(self) -> list[int]:
        addresses: list[int] = self._entries.addresses.tolist()
        return addresses

    def at(self, address: int) -> Place | None:
        """The last symbol at or below `address`, functions first; None outside the kernel."""
        k = bisect_right(self._address_list, address) - 1
        if k < 0 or address >= self._end:
            return None
        return Place(self._entries.names[k], address - self._address_list[k])

    def describe(self, address: int) -> str:
        """`name+0x12`, or the bare address where no symbol is near."""
        return str(self.at(address) or f"{address:#018x}")

    def size_of(self, name: str) -> int:
        """Bytes from `name` to the next symbol at another address (to the kernel's end for the last)."""
        address = self[name]
        k = bisect_right(self._address_list, address)
        return (self._address_list[k] if k < len(self._address_list) else self._end) - address


_LETTER_RANK = np.zeros(256, np.int64)
_LETTER_RANK[[ord(c) for c in "wWvV"]] = 1
_LETTER_RANK[ord("t")] = 2
_LETTER_RANK[ord("T")] = 3


def _rank(entries: Entries) -> NDArray[np.int64]:
    """Which of several names at one address stands for it: the highest.

    `__pi_memset`, the name for boot code before relocation, loses to `memset`, even where that is weak.
    """
    second = np.array([name.startswith("__pi_") for name in entries.names], np.int64)
    return np.asarray(2 * _LETTER_RANK[entries.types] - 5 * second)
