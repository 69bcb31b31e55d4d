"""Where an arm64 kernel is linked, and the relocations that make its bytes right for that or another address.

Two toolchain habits, found by looking and not by version. RELA: rows (place, 1027, addend) of 24 bytes, and the
words at those places are 0 in the file. RELR: the words hold their link-time address already and only a list of
the places exists, needed when the kernel is moved. RELR builds have a few RELATIVE rows as well; rows of other
types are skipped, as the kernel's own relocate_kernel() does.

Image offset 0 is `_text`; a place is a virtual address, an offset a number of bytes from `_text`.
Source: arch/arm64/kernel/pi/relocate.c (relocate_kernel), the ELF gABI (SHT_RELR), ELF for the Arm 64-bit
Architecture (R_AARCH64_RELATIVE = 1027).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from emu.kallsyms import Table

U8 = NDArray[np.uint8]
U64 = NDArray[np.uint64]
I64 = NDArray[np.int64]
Span = tuple[int, int]

R_AARCH64_RELATIVE = 1027
KERNEL_HALF = 0xFFFF  # the top 16 bits of every kernel address
ROW = 24  # bytes of an Elf64_Rela
FEWEST_ROWS = 3  # rows back to back that are no accident
FEW_ROWS = 100  # a RELA build has a hundred thousand, a RELR build seven
STEP = 2 << 20  # the boot protocol wants the image on a 2 MiB boundary
SAMPLE = 20_000
MASK = (1 << 64) - 1


class RelocationError(ValueError):
    """The image gives no single answer to where it is linked or what must be relocated."""


@dataclass(frozen=True, eq=False)
class Relocations:
    """What must be written into an image that was linked at `base`.

    `rows` (int64 offsets) take `addends` (uint64, link-time addresses); `inplace` (int64 offsets) are words that
    hold their link-time address already.
    """

    base: int
    rows: I64
    addends: U64
    inplace: I64

    def move(self, image: U8, displacement: int) -> U8:
        """A copy of `image` (uint8) as it reads when it runs `displacement` bytes above its link address.

        0 gives the bytes at the link address. Raises RelocationError where too few words are known to move.
        """
        if displacement and not len(self.inplace) and len(self.rows) < FEW_ROWS:
            raise RelocationError("the list of its relocations is not found")
        out = image.copy()
        shift = np.uint64(displacement & MASK)
        put_words(out, self.inplace, take_words(out, self.inplace) + shift)
        # Rows come second and add nothing to what is there: a place that is in both lists takes its row.
        put_words(out, self.rows, self.addends + shift)
        return out


def words(image: U8) -> U64:
    """The image as little-endian u64 words (a view; up to 7 bytes at the end are left out)."""
    return np.frombuffer(image.data, "<u8", len(image) // 8)


def find(image: U8, base: int, rela: Span | None = None, relr: Span | None = None) -> Relocations:
    """All relocations of `image` (uint8, not relocated), linked at `base`.

    `rela` and `relr` are the image offsets where the two lists start and end (__pi_rela_start ...). Without
    `rela` the rows are found by shape. Without `relr` the image can be read at its link address, which RELR words
    hold already, but not be moved. Raises RelocationError.
    """
    for start, end in filter(None, (rela, relr)):
        if not 0 <= start <= end <= len(image):
            raise RelocationError("its list of relocations lies outside the file")
    all_words = words(image)
    kinds = _row_kinds(all_words, base, len(image))
    if rela:
        start, end = rela
        kinds = kinds[(8 * kinds > start) & (8 * kinds < end) & ((8 * kinds - 8 - start) % ROW == 0)]
    else:
        kinds = _longest_run(kinds)
    rows = (all_words[kinds - 1] - np.uint64(base)).astype(np.int64)
    inplace = _expand_relr(image, base, *relr) if relr else np.empty(0, np.int64)
    return Relocations(base, rows, all_words[kinds + 1], inplace)


def _row_kinds(all_words: U64, base: int, size: int) -> I64:
    """Indexes of words that may be the middle of a RELATIVE row: the word before is a place in the image."""
    kinds = np.flatnonzero(all_words[1:-1] == R_AARCH64_RELATIVE) + 1
    places = all_words[kinds - 1] - np.uint64(base)  # wraps to something huge below the base
    return kinds[places <= size - 8]


def _longest_run(kinds: I64) -> I64:
    """The longest series of rows back to back: 1027 is also an ordinary number (a netlink policy has it)."""
    breaks = np.flatnonzero(np.diff(kinds) != ROW // 8) + 1
    longest = max(np.split(kinds, breaks), key=len)
    return longest if len(longest) >= FEWEST_ROWS else kinds[:0]


def link_base(image: U8, table: Table) -> int:
    """The link-time address of `_text`, from the image alone.

    Kallsyms with a relative base: its value, from the word or from the row that writes it. Otherwise (addresses
    relative to themselves): the one 2 MiB step from which the pointers in the image hit the symbols.
    Raises RelocationError.
    """
    if table.base_at is None:
        return base_by_vote(image, table.offsets)
    value = int(take_words(image, np.array([table.base_at]))[0])
    return value - value % STEP if value else _base_by_row(image, table.base_at)


def symbol_shift(image: U8, table: Table, base: int) -> int:
    """How far kallsyms offset 0 lies above `_text`: 0, or 64 KiB where the table begins at `_stext`."""
    if table.base_at is None:
        return 0
    value = int(take_words(image, np.array([table.base_at]))[0])
    if not value:
        value = _row_addend(image, base, table.base_at)
    return value - base


def _row_addend(image: U8, base: int, offset: int) -> int:
    all_words = words(image)
    hits = np.flatnonzero(all_words[:-2] == base + offset)
    rows = [int(all_words[k + 2]) for k in hits if all_words[k + 1] == R_AARCH64_RELATIVE]
    if len(rows) != 1:
        raise RelocationError(f"{len(rows)} relocations write the kallsyms base, one is needed")
    return rows[0]


def _base_by_row(image: U8, base_at: int) -> int:
    """The kallsyms base is written by a row: place - base_at is the base when it suits all other rows too."""
    all_words = words(image)
    kinds = np.flatnonzero(all_words[1:-1] == R_AARCH64_RELATIVE) + 1
    kinds = kinds[all_words[kinds - 1] >> 48 == KERNEL_HALF]
    places, addends = all_words[kinds - 1], all_words[kinds + 1]
    bases = places - np.uint64(base_at)
    # The table starts at _text or, without CONFIG_KALLSYMS_ALL, 64 KiB above it at _stext.
    over = addends - bases
    fits = (bases % STEP == 0) & ((over == 0) | (over == 0x10000))
    found = [int(b) for b in np.unique(bases[fits]) if bool((places - b < len(image)).mean() > 0.99)]
    if len(found) != 1:
        raise RelocationError(f"{len(found)} link addresses suit the relocation of the kallsyms base")
    return found[0]


def base_by_vote(image: U8, offsets: I64) -> int:
    """The link address for which the most pointers in `image` hit a symbol exactly.

    `offsets` (int64, ascending) are where the symbols are. Raises RelocationError where the result is not clear.
    """
    pointers = words(image)
    pointers = pointers[pointers >> 48 == KERNEL_HALF]
    steps, counts = np.unique(pointers // STEP, return_counts=True)
    if not len(steps):
        raise RelocationError("no pointer in the image tells where it is linked")
    reach = len(image) // STEP + 1
    middle = int(steps[counts.argmax()])
    sample = pointers[:: len(pointers) // SAMPLE + 1]
    is_symbol = np.zeros(int(offsets[-1]) // 4 + 1, bool)
    is_symbol[offsets // 4] = True

    def votes(base: int) -> int:
        at = (sample - np.uint64(base)) >> 2
        return int(is_symbol[at[at < len(is_symbol)].astype(np.int64)].sum())

    ranked = sorted(((votes(s * STEP), s * STEP) for s in range(middle - reach, middle + 1)), reverse=True)
    (best, base), (second, _) = ranked[:2]
    if best < len(sample) // 20 or best < 2 * second:
        raise RelocationError("the pointers in the image do not agree on where it is linked")
    return base


def _expand_relr(image: U8, base: int, start: int, end: int) -> I64:
    """The offsets that a RELR list names: an even word is a place, an odd one a bitmap of the 63 words behind."""
    entries = take_words(image, np.arange(start, end - 7, 8))
    odd = (entries & 1).astype(bool)
    if not len(entries):
        return np.empty(0, np.int64)
    if odd[0]:
        raise RelocationError("the list of relocations does not begin with a place")
    index = np.arange(len(entries))
    anchor = np.maximum.accumulate(np.where(odd, 0, index))  # the place that each bitmap counts from
    first = entries[anchor].astype(np.uint64) - np.uint64(base)
    bits = np.unpackbits(entries[odd].view(np.uint8).reshape(-1, 8), axis=1, bitorder="little")[:, 1:]
    row, bit = np.nonzero(bits)
    behind = (index - anchor - 1)[odd][row] * 63 + bit
    mapped = first[odd][row].astype(np.int64) + 8 + 8 * behind
    offsets = np.concatenate((first[~odd].astype(np.int64), mapped))
    if offsets.min() < 0 or offsets.max() > len(image) - 8:
        raise RelocationError("the list of relocations names places outside the image")
    return np.sort(offsets)


_BYTES = np.arange(8)


def take_words(image: U8, offsets: I64) -> U64:
    """The u64 at each of the byte `offsets`, which need not be aligned."""
    return np.asarray(image[offsets[:, None] + _BYTES].view("<u8").reshape(-1))


def put_words(image: U8, offsets: I64, values: U64) -> None:
    """Write u64 `values` at byte `offsets`, which need not be aligned."""
    image[offsets[:, None] + _BYTES] = values.astype("<u8").view(np.uint8).reshape(-1, 8)
