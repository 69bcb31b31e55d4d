"""Where a kernel's WARN and BUG instructions are, and which source line each belongs to (`__bug_table`).

Found by shape: 12-byte rows whose first word, relative to itself, points at a `brk #0x800`. A WARN goes on behind
its brk; a row without the WARN flag is a BUG(), which has no way on.
Source: struct bug_entry in include/asm-generic/bug.h (CONFIG_GENERIC_BUG_RELATIVE_POINTERS, DEBUG_BUGVERBOSE).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

U8 = NDArray[np.uint8]
U32 = NDArray[np.uint32]

BRK_BUG = 0xD421_0000  # brk #0x800
ROW = np.dtype([("brk", "<i4"), ("file", "<i4"), ("line", "<u2"), ("flags", "<u2")])
BUGFLAG_WARNING, BUGFLAG_ONCE, BUGFLAG_DONE = 1, 2, 4
FILE_LIMIT = 256  # bytes of a path


@dataclass(frozen=True)
class Bug:
    """One row: the `address` of the brk, where it is in the source, and the row's own flags.

    `warn` is false for BUG(); `once` marks a WARN_ONCE; the taint is in `flags` from bit 8 on.
    """

    address: int
    file: str
    line: int
    flags: int

    @property
    def warn(self) -> bool:
        """Whether the kernel goes on behind it."""
        return bool(self.flags & BUGFLAG_WARNING)

    @property
    def once(self) -> bool:
        """Whether the kernel reports it only the first time."""
        return bool(self.flags & BUGFLAG_ONCE)


class BugTable:
    """All rows of one kernel, looked up by the address of their brk.

    `rows` are offsets from `base`: three uint32 columns (brk, file name, flags << 16 | line), sorted by the first.
    """

    def __init__(self, image: U8, base: int, rows: U32) -> None:
        self._image = image
        self._base = base
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __contains__(self, address: int) -> bool:
        return self._row(address) is not None

    def get(self, address: int) -> Bug | None:
        """The row of the brk at `address`; None where there is none."""
        row = self._row(address)
        if row is None:
            return None
        _, file, packed = (int(v) for v in self.rows[row])
        text = self._image[file : file + FILE_LIMIT].tobytes().split(b"\0")[0].decode("latin-1")
        return Bug(address, text, packed & 0xFFFF, packed >> 16)

    def _row(self, address: int) -> int | None:
        offset = address - self._base
        if not 0 <= offset < len(self._image):
            return None
        row = int(np.searchsorted(self.rows[:, 0], offset))
        return row if row < len(self.rows) and self.rows[row, 0] == offset else None


def find(image: U8) -> U32:
    """The rows of `image` (uint8) for BugTable; shape (0, 3) where there is no such table."""
    words = np.frombuffer(image.data, "<u4", len(image) // 4)
    is_brk = words == BRK_BUG
    here = np.arange(0, 4 * len(words), 4, dtype=np.uint32)
    targets = words + here  # modulo 2^32, as the words are signed
    near = np.flatnonzero((targets < 4 * len(words)) & (targets & 3 == 0))
    points = near[is_brk[targets[near] >> 2]]
    start, count = _longest_run(points, ROW.itemsize // 4)
    rows = np.frombuffer(image.data, ROW, count, 4 * start)
    at = 4 * start + ROW.itemsize * np.arange(count)
    packed = rows["flags"].astype(np.uint32) << 16 | rows["line"]
    out = np.stack((rows["brk"] + at, rows["file"] + at + 4, packed), axis=1).astype(np.uint32)
    return out[np.argsort(out[:, 0], kind="stable")]


def _longest_run(points: NDArray[np.int64], stride: int) -> tuple[int, int]:
    """(first word, number of rows) of the longest series of words that are `stride` apart."""
    best = (0, 0)
    for phase in range(stride):
        mine = points[points % stride == phase]
        if len(mine):
            runs = np.split(mine, np.flatnonzero(np.diff(mine) != stride) + 1)
            longest = max(runs, key=len)
            best = max(best, (int(longest[0]), len(longest)), key=lambda run: run[1])
    return best
