"""From the flat bytes of an Image to all that is known about the kernel, and that to and from plain arrays.

The order matters: kallsyms gives symbols as offsets, the relocations or those offsets give the link address, the
symbols say where the relocations are, and only relocated bytes give the variables that kallsyms lacks.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from emu import btf, kallsyms, recover, relocate, symbolfile
from emu.btf import Btf, BtfError
from emu.container import Flat, ImageError
from emu.layout import KernelLayout, LayoutError, derive
from emu.symbols import Entries, Symbols

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]
Span = tuple[int, int]

_BANNER = re.compile(rb"Linux version (\d\S*) [^\0\n]*")


@dataclass(frozen=True, eq=False)
class Reading:
    """What was read from one image; `data` (uint8) is relocated to `base`.

    `btf_span` are the offsets of its BTF section, None where it has none, and `btf_index` is that of emu.btf.
    """

    release: str
    banner: str
    base: int
    size: int
    layout: KernelLayout
    data: U8
    symbols: Symbols
    btf_span: Span | None
    btf_index: U32

    def btf(self) -> Btf | None:
        """The types, read lazily from `data`."""
        return Btf(self.data[slice(*self.btf_span)], self.btf_index) if self.btf_span else None


def read(name: str, flat: Flat, listed: Entries | None = None) -> Reading:
    """Read the kernel `flat`, which the user called `name`; `listed` are symbols to use in place of its own.

    Raises ImageError.
    """
    release, banner = _banner(name, flat.data)
    try:
        base, parts = _locate(flat, listed)
        size = flat.image_size
        symbols = Symbols.of(parts, base + size)
        data = relocations(flat.data, base, symbols).move(flat.data, 0)
        data.flags.writeable = False
        span = btf.find(data)
        types = Btf(data[slice(*span)]) if span else None
        symbols = _complete(parts, symbols, data, base, size, types)
        layout = derive(data, base, flat.page_shift, types, symbols)
        index = types.index if types else np.empty(0, np.uint32)
    except kallsyms.KallsymsError:
        raise ImageError(
            f"{name} has no readable kallsyms tables (cut short, or built without CONFIG_KALLSYMS), "
            "so its symbols are needed as a file"
        ) from None
    except (relocate.RelocationError, LayoutError, BtfError, symbolfile.SymbolFileError) as error:
        raise ImageError(f"{name} cannot be used: {error}") from None
    return Reading(release, banner, base, size, layout, data, symbols, span, index)


def _banner(name: str, data: U8) -> tuple[str, str]:
    found = _BANNER.search(data.data)
    if found is None:
        raise ImageError(
            f"{name} has the header of an arm64 Image, but no Linux version text; it is cut short or no Linux"
        )
    return found.group(1).decode("latin-1"), found.group(0).decode("latin-1")


# symbols and the link address


def _locate(flat: Flat, listed: Entries | None) -> tuple[int, dict[str, Entries]]:
    """The link address and the symbols by source."""
    try:
        base, parts = _own_symbols(flat)
    except kallsyms.KallsymsError:
        return _without_kallsyms(flat, listed)
    if listed is not None:
        parts = {"file": symbolfile.at_link_address(listed, base, flat.image_size, parts["kallsyms"])}
    return base, parts


def _own_symbols(flat: Flat) -> tuple[int, dict[str, Entries]]:
    table = kallsyms.read(flat.data)
    base = relocate.link_base(flat.data, table)
    shift = relocate.symbol_shift(flat.data, table, base)
    parts = {"kallsyms": Entries(table.names, table.types, table.offsets.astype(np.uint64) + np.uint64(base + shift))}
    if len(flat.entries) and flat.base is not None:
        # An ELF made from an image may carry a wrong address (vmlinux-to-elf on 7.x); the image itself is right.
        parts["file"] = flat.entries.shifted(base - flat.base)
    return base, parts


def _without_kallsyms(flat: Flat, listed: Entries | None) -> tuple[int, dict[str, Entries]]:
    entries = flat.entries if listed is None else listed
    if not len(entries):
        raise kallsyms.KallsymsError("no symbols at all")
    base = flat.base
    if base is None:
        base = symbolfile.link_base(entries, flat.data, flat.image_size)
    return base, {"file": symbolfile.at_link_address(entries, base, flat.image_size, None)}


def relocations(data: U8, base: int, symbols: Mapping[str, int]) -> relocate.Relocations:
    """The relocations of `data` (uint8, linked at `base`), found with the help of its symbols."""
    return relocate.find(data, base, _span(symbols, base, "rela"), _span(symbols, base, "relr"))


def _span(symbols: Mapping[str, int], base: int, kind: str) -> Span | None:
    start, end = symbols.get(f"__pi_{kind}_start"), symbols.get(f"__pi_{kind}_end")
    return (start - base, end - base) if start is not None and end is not None else None


def _complete(
    parts: dict[str, Entries], symbols: Symbols, data: U8, base: int, size: int, types: Btf | None
) -> Symbols:
    """With what the image shows besides: its own edges, exported and well-known variables."""
    more = dict(parts)
    edges = {"_text": base, "_end": base + size}
    more["header"] = Entries.of({n: a for n, a in edges.items() if n not in symbols}, "T")
    if "init_mm" not in symbols or "memstart_addr" not in symbols:
        exported = recover.ksymtab(data, base, size)
        more["ksymtab"] = Entries.of(exported)
        reader = recover.Reader(data, base, lambda n: exported.get(n) or symbols.get(n), types)
        more["code"] = Entries.of(recover.unexported(reader))
    added = any(len(more[source]) for source in more.keys() - parts.keys())
    return Symbols.of(more, base + size) if added else symbols


# to and from what the cache keeps


def memorise(reading: Reading) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Facts (for JSON) and arrays from which `recall` makes the reading again."""
    entries = reading.symbols.entries
    facts = {key: getattr(reading, key) for key in ("release", "banner", "base", "size", "btf_span")}
    arrays: dict[str, NDArray[Any]] = {
        "data": reading.data,
        "names": np.frombuffer("\n".join(entries.names).encode("latin-1"), np.uint8),
        "types": entries.types,
        "addresses": entries.addresses,
        "sources": reading.symbols.sources,
        "repeated": reading.symbols.repeated,
        "btf-index": reading.btf_index,
    }
    return {**facts, "layout": asdict(reading.layout)}, arrays


def recall(facts: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> Reading | None:
    """What `memorise` took apart; None where something is missing."""
    try:
        names = arrays["names"].tobytes().decode("latin-1").split("\n")
        entries = Entries(names, arrays["types"], arrays["addresses"])
        if len(names) != len(entries.addresses):
            return None
        end = facts["base"] + facts["size"]
        symbols = Symbols.sorted(entries, arrays["sources"], arrays["repeated"], end)
        rest = {key: facts[key] for key in ("release", "banner", "base", "size", "btf_span")}
        layout = KernelLayout(**facts["layout"])
        return Reading(**rest, layout=layout, data=arrays["data"], symbols=symbols, btf_index=arrays["btf-index"])
    except (KeyError, TypeError):
        return None
