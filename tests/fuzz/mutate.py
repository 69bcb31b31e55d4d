"""Mutations that know what formats are made of: numbers that are lengths and places, lines, words, repeated parts."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

WORD = re.compile(rb"0[xX][0-9a-fA-F]+|\d+|[A-Za-z_][\w.]*")
INTERESTING = (
    *(0, 1, 2, 3, 7, 8, 0x7F, 0x80, 0xFF, 0xFFF, 0x1000, 0x7FFF, 0xFFFF, 0x10000),
    *(0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 1 << 32, 1 << 40, 1 << 48, 1 << 52, 1 << 56, 1 << 60),
    *((1 << 63) - 1, 1 << 63, (1 << 64) - 1, (1 << 64) - 8, (1 << 64) - 4096),
)
TEXTS = (
    *(b"-1", b"1e9", b"0x", b"", b"0b1", b"1_0", b"\xd9\xa3", b"\xff", b"nan", b"null", b"true", b"{}", b"[]", b'"="'),
    *(b"9" * 5000, b"0x" + b"f" * 5000, b"[" * 5000, b"(" * 5000, b"A" * 5000, b"\0", b"\r\n", b"'", b'"', b"\\"),
)


def mutated(data: bytes, longest: int, seed: int, others: list[bytes]) -> bytes:
    """`data` with one to four changes; `others` are inputs that parts may come from."""
    rng = random.Random(seed)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        data = rng.choice(CHANGES)(rng, data, rng.choice(others))
    return data[:longest]


def _place(rng: random.Random, data: bytes) -> int:
    """A place: often one near a byte that is not zero, as padding decides nothing."""
    for _ in range(20):
        at = rng.randrange(len(data) + 1)
        if any(data[at : at + 8]) or rng.random() < 0.1:
            return at
    return at


def number(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A binary number becomes another, as lengths and offsets are."""
    size = rng.choice((1, 2, 4, 4, 8, 8))
    at = _place(rng, data)
    at -= at % rng.choice((1, size))
    old = int.from_bytes(data[at : at + size], "little")
    new = rng.choice((rng.choice(INTERESTING), len(data), len(data) - at, old + rng.randint(-9, 9), 2 * old, -old))
    value = (new & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("little", "little", "big")))
    return data[:at] + value + data[at + size :]


def flip(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """One bit."""
    if not data:
        return data
    at = min(_place(rng, data), len(data) - 1)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]


def cut(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The end is missing."""
    return data[: rng.randrange(len(data) + 1)]


def leave_out(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A part is missing."""
    at = rng.randrange(len(data) + 1)
    return data[:at] + data[at + rng.choice((1, 4, 8, 64, 4096, len(data) // 3)) :]


def repeat(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A part is there several times."""
    at, size = rng.randrange(len(data) + 1), rng.choice((1, 4, 8, 24, 56, 64, 4096))
    return data[:at] + data[at : at + size] * rng.choice((2, 2, 3, 50)) + data[at:]


def move(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A part is copied over another place."""
    size = rng.choice((4, 8, 24, 56, 512, 4096))
    a, b = _place(rng, data), _place(rng, data)
    return data[:b] + data[a : a + size] + data[b + size :]


def cross(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The beginning of one input and the end of another."""
    return data[: rng.randrange(len(data) + 1)] + other[rng.randrange(len(other) + 1) :]


def word(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """A word or a number in a text becomes another, one of the text or a bad one."""
    found = list(WORD.finditer(data[: 1 << 16]))
    if not found:
        return flip(rng, data, other)
    hit = rng.choice(found)
    extreme = rng.choice(INTERESTING)
    new = rng.choice((rng.choice(TEXTS), b"%d" % extreme, b"%#x" % extreme, b"%x" % extreme, rng.choice(found)[0]))
    return data[: hit.start()] + new + data[hit.end() :]


def line(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """Lines change places, go away, or come twice."""
    lines = data.split(b"\n")
    a, b = rng.randrange(len(lines)), rng.randrange(len(lines))
    match rng.randrange(4):
        case 0:
            lines[a], lines[b] = lines[b], lines[a]
        case 1:
            del lines[a]
        case 2:
            lines.insert(b, lines[a])
        case _:
            lines.insert(b, rng.choice(other.split(b"\n")))
    return b"\n".join(lines)


Change = Callable[[random.Random, bytes, bytes], bytes]
CHANGES: tuple[Change, ...] = (number, number, number, flip, cut, leave_out, repeat, move, cross, word, word, line)
