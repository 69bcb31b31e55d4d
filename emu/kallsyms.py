"""The symbol table that a kernel image carries for itself (CONFIG_KALLSYMS), read from the raw bytes.

Nothing in an image says where these tables are, and Linux has moved them, changed their alignment and changed
how an address is written. So each table is found by its shape, in the order in which the shape gets surer, and a
reading counts only when every table agrees with the others:

    token_index  u16[256]  where each of 256 NUL-ended tokens starts; token 48 is the character "0"
    markers      u32[]     where every 256th name starts
    names                  per name: a ULEB128 count of one or two bytes, then that many token numbers
    num_syms     u32       4 or 8 bytes before the names
    offsets      u32[n]    address - relative_base (relative_base: u64 next to it), or
                 s32[n]    address - address of this very word

No version is asked anywhere. Source of the layout: scripts/kallsyms.c and kernel/kallsyms.c of Linux, and
measurements on Debian's 6.1, 6.12, 7.2 and 7.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
I64 = NDArray[np.int64]

PER_MARKER = 256
# The shortest name is a count, a type and a character; the longest allowed one has some 35 000 bytes in its group.
MARKER_STEPS = (2 * PER_MARKER, 140 * PER_MARKER)
# Only seqs_of_names (3 bytes a symbol) may stand between the markers and the tokens.
MARKER_WINDOW = 8 << 20
DIGITS = b"".join(b"%d\0" % d for d in range(10))


class KallsymsError(ValueError):
    """The bytes hold no kallsyms tables that agree with each other."""


@dataclass(frozen=True, eq=False)
class Table:
    """The symbols of an image, in address order, before the image's base is known.

    `names` are the symbols' names and `types` their nm letters (uint8, one each). `offsets` (int64, bytes) count
    from the start of the image when `base_at` is None, else from the base of which the u64 at file offset
    `base_at` is (or, after relocation, becomes) the value.
    """

    names: list[str]
    types: U8
    offsets: I64
    base_at: int | None

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True, eq=False)
class _Tokens:
    start: int  # file offset of token 0
    index_at: int  # file offset of the u16[256]
    chars: U8  # all tokens, each with its NUL
    starts: I64  # where each token starts in chars
    lengths: I64  # without the NUL


@dataclass(frozen=True, eq=False)
class _Names:
    count: int
    count_at: int  # file offset of num_syms
    at: int  # file offset of the first name
    starts: I64  # file offset of each name's count
    end: int  # file offset behind the last name
    two_bytes: NDArray[np.bool_]  # the count takes two bytes


def read(image: U8) -> Table:
    """Read the kallsyms tables of `image` (uint8, the flat bytes from `_text` on, not relocated).

    Raises KallsymsError when no set of tables agrees.
    """
    for tokens in _find_tokens(image):
        for names in _find_names(image, tokens):
            found = _find_offsets(image, tokens, names)
            expanded = _expand(image, tokens, names) if found is not None else None
            if found is not None and expanded is not None:
                return Table(*expanded, *found)
    raise KallsymsError("no kallsyms tables")


def _words(image: U8, at: int, count: int, dtype: str) -> NDArray[np.generic] | None:
    """`count` words at byte `at`; None where the image is too short."""
    size = count * np.dtype(dtype).itemsize
    if at < 0 or at + size > len(image):
        return None
    return np.frombuffer(image.data, dtype, count, at)


# token_table and token_index


def _find_tokens(image: U8) -> Iterator[_Tokens]:
    """Every place where 256 strings are followed by their own index; real images have exactly one."""
    data = image.data
    for hit in re.finditer(re.escape(DIGITS), data):
        tokens = _tokens_around(image, hit.start())
        if tokens is not None:
            yield tokens


def _tokens_around(image: U8, zero: int) -> _Tokens | None:
    low = max(0, zero - (64 << 10))
    ends = np.flatnonzero(image[low : zero + (64 << 10)] == 0) + low
    here = int(np.searchsorted(ends, zero))
    if here < 48 or here + 208 > len(ends):
        return None
    # Tokens 1 to 255. Token 0 begins behind an unknown byte: only the index tells its length.
    starts = ends[here - 48 : here + 207] + 1
    behind = int(ends[here + 207]) + 1
    for align in (4, 8):
        at = behind + -behind % align
        index = _words(image, at, 256, "<u2")
        if index is None:
            continue
        wide = index.astype(np.int64)
        if wide[0] == 0 and np.array_equal(wide[1:] - wide[1], starts - starts[0]):
            start = int(starts[0] - wide[1])
            lengths = np.diff(np.append(wide, behind - start)) - 1
            return _Tokens(start, at, image[start:behind], wide, lengths)
    return None


# markers, names, num_syms


def _find_names(image: U8, tokens: _Tokens) -> Iterator[_Names]:
    for at, markers in _find_markers(image, tokens.start):
        top = at - int(markers[-1])
        low = top - MARKER_STEPS[1] - 8
        for count_at, names_at in _find_counts(image, low, top, len(markers)):
            names = _walk(image, count_at, names_at, at, markers)
            if names is not None:
                yield names


def _find_markers(image: U8, end: int) -> Iterator[tuple[int, I64]]:
    """Runs of u32 before `end` that start with 0 and climb by a plausible step, longest first."""
    start = max(0, end - MARKER_WINDOW) & ~3
    words = np.frombuffer(image.data, "<u4", (end - start) // 4, start).astype(np.int64)
    steps = np.diff(words)
    climbs = (steps > MARKER_STEPS[0]) & (steps < MARKER_STEPS[1])
    edges = np.flatnonzero(np.diff(np.concatenate(([False], climbs, [False])).astype(np.int8)))
    runs = edges.reshape(-1, 2)  # words[first] .. words[last], both included
    for first, last in runs[np.argsort(runs[:, 0] - runs[:, 1], kind="stable")][:64]:
        if words[first] == 0:
            yield start + 4 * int(first), words[first : last + 1]


def _find_counts(image: U8, low: int, top: int, groups: int) -> Iterator[tuple[int, int]]:
    """(offset of num_syms, offset of names) for each u32 in [low, top) that fits the number of markers."""
    low = max(0, low) & ~3
    top &= ~3
    words = np.frombuffer(image.data, "<u4", max(0, top - low) // 4, low)
    fits = np.flatnonzero((words > PER_MARKER * (groups - 1)) & (words <= PER_MARKER * groups))
    for k in fits[::-1]:
        at = low + 4 * int(k)
        yield at, at + 4
        if k + 1 < len(words) and words[k + 1] == 0:  # tables aligned to 8: four bytes of padding
            yield at, at + 8


def _walk(image: U8, count_at: int, names_at: int, end: int, markers: I64) -> _Names | None:
    """Step through all names, 256 steps for all groups at once; None where a group misses its marker."""
    count = int.from_bytes(image[count_at : count_at + 4].tobytes(), "little")
    at = names_at + markers
    starts = np.full((len(markers), PER_MARKER), -1, np.int64)
    left = count - PER_MARKER * (len(markers) - 1)  # names in the last group
    padded = np.concatenate((image[names_at:end], np.zeros(4, np.uint8)))
    for k in range(PER_MARKER):
        live = len(markers) - (k >= left)
        starts[:live, k] = at[:live]
        where = at[:live] - names_at
        if where.max(initial=0) >= end - names_at:
            return None
        first = padded[where].astype(np.int64)
        second = padded[where + 1].astype(np.int64)
        long = first > 0x7F
        at[:live] += 1 + np.where(long, 1 + ((first & 0x7F) | second << 7), first)
    if not np.array_equal(at[:-1], names_at + markers[1:]) or not 0 <= end - at[-1] < 8:
        return None
    flat = starts.reshape(-1)[:count]
    return _Names(count, count_at, names_at, flat, int(at[-1]), image[flat] > 0x7F)


# offsets


def _find_offsets(image: U8, tokens: _Tokens, names: _Names) -> tuple[I64, int | None] | None:
    """(offsets, where their base is), from behind the tokens or from before num_syms."""
    n = names.count
    behind, before = tokens.index_at + 512, names.count_at
    size, padded = 4 * n, 4 * n + 7 & ~7
    for at, base_at in ((behind, behind + size + 7 & ~7), (before - 8 - padded, before - 8)):
        found = _absolute(image, at, n)
        if found is not None:
            return found, base_at
    for at in (behind, before - size, before - padded):
        found = _self_relative(image, at, n)
        if found is not None:
            return found, None
    return None


def _absolute(image: U8, at: int, n: int) -> I64 | None:
    words = _words(image, at, n, "<u4")
    if words is None:
        return None
    offsets = words.astype(np.int64)
    return offsets if offsets[0] == 0 and offsets[-1] > 0 and bool((np.diff(offsets) >= 0).all()) else None


def _self_relative(image: U8, at: int, n: int) -> I64 | None:
    words = _words(image, at, n, "<i4")
    if words is None:
        return None
    offsets = words.astype(np.int64) + (at + 4 * np.arange(n))
    return offsets if offsets[0] >= 0 and bool((np.diff(offsets) >= 0).all()) else None


# from token numbers to text


def _expand(image: U8, tokens: _Tokens, names: _Names) -> tuple[list[str], U8] | None:
    """All names in one pass: a count becomes a newline, a second count byte nothing, a token its characters.

    None where a name has not even a type.
    """
    stream = image[names.at : names.end].astype(np.int32)
    heads = names.starts - names.at
    stream[heads[names.two_bytes] + 1] = 257
    stream[heads] = 256
    chars = np.append(tokens.chars, np.uint8(ord("\n")))
    starts = np.concatenate((tokens.starts, [len(chars) - 1, 0])).astype(np.int32)
    lengths = np.concatenate((tokens.lengths, [1, 0])).astype(np.int32)[stream]
    ends = np.cumsum(lengths, dtype=np.int32)
    text = chars[np.arange(ends[-1], dtype=np.int32) + np.repeat(starts[stream] - (ends - lengths), lengths)]
    kind_at = ends[heads]  # the newline is the last character before it
    if kind_at[-1] >= len(text) or (text[kind_at] == ord("\n")).any():
        return None
    types = text[kind_at]
    text = np.delete(text, kind_at)
    return text[1:].tobytes().decode("latin-1").split("\n"), types
