"""Small arm64 Images made from the formats' descriptions, for tests that need no kernel.

Nothing here is taken from the readers under test: kallsyms tables, RELR lists, BTF and `__bug_table` are written the
way the kernel's own scripts and the linker write them.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass, field

import numpy as np

STEXT = 0x10000
NOP, RET, BRK = 0xD503201F, 0xD65F03C0, 0xD4210000
BANNER = b"Linux version 9.8.7-test (builder@example) (cc 1.0) #1 SMP 2030-01-01\n\0"
LONG_NAME = "a_name_that_takes_more_than_127_tokens_" + "xqzj" * 60

# 256 tokens: printable characters stand for themselves, the other places hold the pieces that names are made of.
PIECES = ["set_memory_", "vm_", "__", "_start", "_end", "func", "walk_", "init", "page", "_range"]
TOKENS = [chr(c) if 32 <= c < 127 else "" for c in range(256)]
for _k, _piece in enumerate(PIECES):
    TOKENS[_k if _k < 8 else 200 + _k] = _piece
TOKENS = [t or f"unused{k}~" for k, t in enumerate(TOKENS)]


@dataclass(frozen=True)
class Sym:
    name: str
    type: str
    offset: int  # from the start of the image


@dataclass
class Made:
    """An Image and what is true of it."""

    content: bytearray
    base: int
    symbols: list[Sym]
    places: dict[str, int] = field(default_factory=dict)  # offsets of parts
    pointers: dict[int, int] = field(default_factory=dict)  # offset of a u64 -> link-time address it must get
    bugs: list[tuple[int, str, int, int]] = field(default_factory=list)  # offset, file, line, flags

    def rows(self) -> list[tuple[str, str, int]]:
        return sorted((s.name, s.type, self.base + s.offset) for s in self.symbols)


def default_symbols(functions: int = 700) -> list[Sym]:
    """`_text`, functions 16 bytes apart from `_stext` on, one of them with a long name, some names twice."""
    names = [f"{PIECES[k % len(PIECES)]}{k}_{PIECES[k * 7 % len(PIECES)]}" for k in range(functions)]
    names[5], names[500] = LONG_NAME, LONG_NAME + "_2"
    names[20] = names[21] = names[600] = "__func__.0"
    names[30] = "set_memory_valid"
    names[40], names[41] = "__pmd_alloc", "__pud_alloc"  # four levels of tables
    names[31] = "vmalloc_noprof"
    names[32] = "kfence_init_pool.isra.0"
    syms = [Sym("_text", "T", 0), Sym("_stext", "T", STEXT)]
    return syms + [Sym(n, "tT"[k % 2], STEXT + 16 * k) for k, n in enumerate(names)]


class Writer:
    """Bytes that grow from the front; every part is aligned and remembered by name."""

    def __init__(self) -> None:
        self.content = bytearray()
        self.places: dict[str, int] = {}

    def align(self, to: int) -> int:
        self.content += b"\0" * (-len(self.content) % to)
        return len(self.content)

    def add(self, name: str, content: bytes, align: int = 8) -> int:
        at = self.places[name] = self.align(align)
        self.content += content
        return at


# kallsyms


_LONGEST_FIRST = sorted(range(256), key=lambda k: -len(TOKENS[k]))


@functools.cache
def compress(name: str) -> bytes:
    out = bytearray()
    while name:
        token = next(k for k in _LONGEST_FIRST if name.startswith(TOKENS[k]))
        out.append(token)
        name = name[len(TOKENS[token]) :]
    return bytes(out)


def uleb(n: int) -> bytes:
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80, n >> 7])


def names_table(symbols: list[Sym]) -> tuple[bytes, bytes]:
    """(names, markers)."""
    names, markers = bytearray(), []
    for k, s in enumerate(symbols):
        if k % 256 == 0:
            markers.append(len(names))
        packed = compress(s.type + s.name)
        names += uleb(len(packed)) + packed
    return bytes(names), struct.pack(f"<{len(markers)}I", *markers)


def token_tables() -> tuple[bytes, bytes]:
    table, index = bytearray(), []
    for token in TOKENS:
        index.append(len(table))
        table += token.encode() + b"\0"
    return bytes(table), struct.pack("<256H", *index)


def add_kallsyms(w: Writer, symbols: list[Sym], *, order: str, align: int, form: str, relative_base: int) -> None:
    """The tables in one of three orders. `form`: "base" (offsets from relative_base) or "self" (from themselves)."""
    names, markers = names_table(symbols)
    table, index = token_tables()

    def num_syms() -> None:
        w.add("num_syms", struct.pack("<I", len(symbols)), align)

    def all_names() -> None:
        w.add("names", names, align)
        w.add("markers", markers, align)

    def seqs() -> None:  # 3 bytes a symbol, all bits used
        w.add("seqs", bytes((k * 37 + 11) & 0xFF for k in range(3 * len(symbols))), align)

    def tokens() -> None:
        w.add("token_table", table, align)
        w.add("token_index", index, align)

    def offsets() -> None:
        at = w.align(align)
        if form == "self":
            words = [s.offset - (at + 4 * k) for k, s in enumerate(symbols)]
            w.add("offsets", struct.pack(f"<{len(words)}i", *words), align)
        else:
            first = symbols[0].offset
            w.add("offsets", struct.pack(f"<{len(symbols)}I", *(s.offset - first for s in symbols)), align)
            w.add("relative_base", struct.pack("<Q", relative_base), 8)

    if order == "offsets first, seqs before tokens":
        steps = [offsets, num_syms, all_names, seqs, tokens]
    elif order == "offsets behind tokens":
        steps = [num_syms, all_names, tokens, offsets, seqs]
    else:
        assert order == "offsets first", order
        steps = [offsets, num_syms, all_names, tokens]
    for step in steps:
        step()


# relocations


def relr(places: list[int]) -> bytes:
    """Encode ascending, 8-byte aligned addresses as a linker does."""
    out, k = [], 0
    while k < len(places):
        out.append(places[k])
        window = places[k] + 8
        k += 1
        while True:
            bits = 0
            while k < len(places) and places[k] - window < 63 * 8:
                bits |= 1 << (places[k] - window) // 8
                k += 1
            if not bits:
                break
            out.append(bits << 1 | 1)
            window += 63 * 8
    return struct.pack(f"<{len(out)}Q", *out)


# the whole


def make(
    *,
    base: int = 0xFFFF800080000000,
    order: str = "offsets behind tokens",
    align: int = 8,
    form: str = "base",
    relocation: str = "relr",
    page_shift: int = 12,
    symbols: list[Sym] | None = None,
    btf: bytes = b"",
    code: dict[int, list[int]] | None = None,
    data: bytes = b"",
    data_pointers: dict[int, int] | None = None,
    bugs: int = 5,
    bss: int = 0x20000,
) -> Made:
    """An Image. `code` puts words at offsets in the text; `data` comes at a known place ("data") with pointers to it.

    `data_pointers` maps offsets within `data` to link-time addresses.
    """
    syms = list(default_symbols() if symbols is None else symbols)
    w = Writer()
    w.content += bytes(64)
    w.align(STEXT)
    text = max(s.offset for s in syms if s.offset < 0x20000) + 0x400 - STEXT
    w.add("text", struct.pack("<I", NOP) * (text // 4))
    w.add("banner", BANNER)
    w.add("data", data)
    pointers = {w.places["data"] + at: value for at, value in (data_pointers or {}).items()}
    functions = [s for s in syms if s.type in "tT" and s.offset >= STEXT]
    for k, s in enumerate(functions):
        at = w.add("pointer", bytes(8), 8)
        pointers[at] = base + s.offset
        if k % 5 == 0:  # holes, so that the bitmaps are not all ones
            w.content += bytes(8 * (k % 11))
    # The list of relocations has its final length when all places are known; kallsyms below must name its ends.
    starts_at_stext = syms[0].offset == STEXT
    relative_base = base + syms[0].offset
    room = w.align(8)
    row_count = len(pointers) + (1 if form == "base" and relocation == "rela" else 0)
    length = len(relr([base + p for p in sorted(pointers)])) if relocation == "relr" else 24 * row_count
    w.content += bytes(length)
    if relocation != "none" and not starts_at_stext:
        kind = "relr" if relocation == "relr" else "rela"
        syms += [Sym(f"__pi_{kind}_start", "d", room), Sym(f"__pi_{kind}_end", "d", room + length)]
    w.align(0x100)
    in_file = 0 if relocation == "rela" else relative_base
    add_kallsyms(w, sorted(syms, key=lambda s: s.offset), order=order, align=align, form=form, relative_base=in_file)
    if relocation == "rela" and form == "base":
        pointers[w.places["relative_base"]] = relative_base
    _write_relocations(w, base, room, relocation, pointers)
    made_bugs = _add_bugs(w, bugs)
    if btf:
        w.add("btf", btf)
    for at, words in (code or {}).items():
        struct.pack_into(f"<{len(words)}I", w.content, at, *words)
    w.align(0x1000)
    size = len(w.content) + bss
    flags = {12: 1, 14: 2, 16: 3, 0: 0}[page_shift] << 1
    struct.pack_into("<8sQQQ", w.content, 0, b"", 0, size, flags)
    w.content[0x38:0x3C] = b"ARMd"
    return Made(w.content, base, syms, w.places, pointers, made_bugs)


def _write_relocations(w: Writer, base: int, at: int, relocation: str, pointers: dict[int, int]) -> None:
    if relocation == "rela":
        for k, (place, value) in enumerate(sorted(pointers.items())):
            struct.pack_into("<QQQ", w.content, at + 24 * k, base + place, 1027, value)
        return
    for place, value in pointers.items():
        struct.pack_into("<Q", w.content, place, value)
    if relocation == "relr":
        packed = relr([base + p for p in sorted(pointers)])
        w.content[at : at + len(packed)] = packed


def _add_bugs(w: Writer, count: int) -> list[tuple[int, str, int, int]]:
    made = []
    for k in range(count):
        offset = w.places["text"] + 0x80 + 0x40 * k
        struct.pack_into("<I", w.content, offset, BRK)
        file_at = w.add(f"bug file {k}", f"mm/file{k}.c\0".encode())
        made.append((offset, f"mm/file{k}.c", 100 + k, (k % 4) | 9 << 8, file_at))
    at = w.align(8)
    for k, (offset, _, line, flags, file_at) in enumerate(made):
        here = at + 12 * k
        w.add("bug row", struct.pack("<iiHH", offset - here, file_at - here - 4, line, flags), 4)
    return [row[:4] for row in made]


# EFI stub section table, so that a cut can be seen


def with_pe(content: bytes) -> bytes:
    """`content` with a PE header at 0x40 whose two sections end with it."""
    out = bytearray(content)
    out[:2] = b"MZ"
    struct.pack_into("<I", out, 0x3C, 0x40)
    struct.pack_into("<4sHH12xHH", out, 0x40, b"PE\0\0", 0xAA64, 2, 160, 0x206)
    half = len(content) // 2
    for k, (start, size) in enumerate(((0x1000, half - 0x1000), (half, len(content) - half))):
        at = 0x40 + 24 + 160 + 40 * k
        struct.pack_into("<8sIIII", out, at, b".part", size, start, size, start)
    return bytes(out)


# BTF


class BtfWriter:
    """Types are numbered from 1 in the order they are added; methods give the number."""

    def __init__(self) -> None:
        self.types = bytearray()
        self.strings = bytearray(b"\0")
        self.count = 0

    def string(self, text: str) -> int:
        if not text:
            return 0
        at = bytes(self.strings).find(b"\0" + text.encode() + b"\0")
        if at >= 0:
            return at + 1
        self.strings += text.encode() + b"\0"
        return len(self.strings) - len(text) - 1

    def add(self, name: str, kind: int, *, vlen: int = 0, kflag: int = 0, rest: int = 0, extra: bytes = b"") -> int:
        info = kflag << 31 | kind << 24 | vlen
        self.types += struct.pack("<III", self.string(name), info, rest) + extra
        self.count += 1
        return self.count

    def integer(self, name: str, size: int) -> int:
        return self.add(name, 1, rest=size, extra=struct.pack("<I", 8 * size))

    def pointer(self, to: int) -> int:
        return self.add("", 2, rest=to)

    def array(self, of: int, index: int, count: int) -> int:
        return self.add("", 3, extra=struct.pack("<III", of, index, count))

    def record(self, name: str, size: int, members: list[tuple[str, int, int]], *, union: bool = False) -> int:
        """Members are (name, type, byte offset)."""
        extra = b"".join(struct.pack("<III", self.string(n), t, 8 * at) for n, t, at in members)
        return self.add(name, 5 if union else 4, vlen=len(members), rest=size, extra=extra)

    def bitfields(self, name: str, size: int, members: list[tuple[str, int, int, int]]) -> int:
        """Members are (name, type, bit offset, width)."""
        extra = b"".join(struct.pack("<III", self.string(n), t, width << 24 | at) for n, t, at, width in members)
        return self.add(name, 4, vlen=len(members), kflag=1, rest=size, extra=extra)

    def enum(self, name: str, values: dict[str, int], *, signed: bool = False, wide: bool = False) -> int:
        if wide:
            rows = (struct.pack("<IQ", self.string(n), v & (1 << 64) - 1) for n, v in values.items())
        else:
            rows = (struct.pack("<II", self.string(n), v & (1 << 32) - 1) for n, v in values.items())
        kind, size = (19, 8) if wide else (6, 4)
        return self.add(name, kind, vlen=len(values), kflag=int(signed), rest=size, extra=b"".join(rows))

    def typedef(self, name: str, to: int) -> int:
        return self.add(name, 8, rest=to)

    def const(self, to: int) -> int:
        return self.add("", 10, rest=to)

    def bytes(self) -> bytes:
        header = struct.pack("<HBBIIIII", 0xEB9F, 1, 0, 24, 0, len(self.types), len(self.types), len(self.strings))
        return header + bytes(self.types) + bytes(self.strings)


def kernel_btf(levels: int, *, pgd_at: int = 0x40, active_mm_at: int = 0x80) -> bytes:
    """The types that the layout and the recovery ask for, for a kernel with `levels` levels of tables."""
    b = BtfWriter()
    u64 = b.integer("long unsigned int", 8)
    above = b.typedef("pgd_t", b.record("", 8, [("pgd", u64, 0)]))
    previous = "pgd"
    for level, exists in (("p4d", levels > 4), ("pud", levels > 3), ("pmd", levels > 2)):
        inner = [(level, u64, 0)] if exists else [(previous, above, 0)]
        above, previous = b.typedef(f"{level}_t", b.record("", 8, inner)), level
    b.typedef("pte_t", b.record("", 8, [("pte", u64, 0)]))
    pgd = b.pointer(above)
    mm = b.record("mm_struct", 0x100, [("", b.record("", 0x100, [("pgd", pgd, pgd_at)]), 0)])
    b.record("task_struct", 0x200, [("active_mm", b.pointer(mm), active_mm_at)])
    return b.bytes()


# ELF


def elf(
    segments: list[tuple[int, bytes]],
    symbols: list[tuple[str, int]] = [],  # noqa: B006 (only read)
    *,
    rela: dict[int, int] | None = None,
    machine: int = 183,
    elf_class: int = 2,
    big: bool = False,
    kind: int = 3,
    sections: bool = True,
) -> bytes:
    """An ELF file with PT_LOAD `segments` (address, bytes), a symbol table, and RELATIVE rows (place -> addend)."""
    end = ">" if big else "<"
    ident = b"\x7fELF" + bytes([elf_class, 2 if big else 1, 1]) + bytes(9)
    at = 0x1000
    headers, body = b"", b""
    for address, content in segments:
        size = len(content)
        headers += struct.pack(end + "IIQQQQQQ", 1, 7, at + len(body), address, address, size, size, 16)
        body += content
    strings, rows = b"\0", bytes(24)
    for name, address in symbols:
        rows += struct.pack(end + "IBBHQQ", len(strings), 0x12, 0, 1, address, 0)
        strings += name.encode() + b"\0"
    relocations = b"".join(struct.pack(end + "QQQ", place, 1027, value) for place, value in (rela or {}).items())
    names = b"\0.text\0.symtab\0.strtab\0.shstrtab\0.rela.dyn\0"
    parts = (rows, strings, names, relocations)
    places = np.cumsum([at + len(body), *(len(p) for p in parts)]).tolist()

    def section(name: bytes, kind: int, flags: int, where: int, size: int, link: int = 0, entry: int = 0) -> bytes:
        return struct.pack(end + "IIQQQQIIQQ", names.index(name), kind, flags, 0, where, size, link, 1, 8, entry)

    table = bytes(64)
    table += section(b".text", 1, 6, at, len(body))
    table += section(b".symtab", 2, 0, places[0], len(rows), 3, 24)
    table += section(b".strtab", 3, 0, places[1], len(strings))
    table += section(b".shstrtab", 3, 0, places[2], len(names))
    table += section(b".rela.dyn", 4, 2, places[3], len(relocations), 2, 24)
    where, count, names_at = (places[4], 6, 4) if sections else (0, 0, 0)
    head = struct.pack(
        end + "HHIQQQIHHHHHH", kind, machine, 1, 0, 64, where, 0, 64, 56, len(segments), 64, count, names_at
    )
    return (ident + head + headers).ljust(at, b"\0") + body + b"".join(parts) + table
