"""Make a failing case small: fewer queries, fewer table words, registers at their defaults, fewer bits.

    small = shrink(case, lambda c: disagrees(c))

- `still_fails` gets cases without answers and asks them anew; it returns False for what it cannot ask.
- The result fails and nothing that was tried made it smaller: it is a local minimum, found in a fixed order, so the
  same case and the same judge give the same result.
- What would let a walk read a device, or take its own tables away from the program that asks, is not tried.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from emu.judge.corpus import DEFAULTS, PROGRAM_PAGE, Case
from emu.judge.draw import SCTLR_EE, SCTLR_M, TCR_HALVES, TCR_ONE
from emu.judge.trees import harmless

__all__ = ["shrink"]

T = TypeVar("T")
HALF_OF_VA = 1 << 55
ASID_AND_CNP = 0xFFFF << 48 | 1
FIXED = ("HCR_EL2", "HCRX_EL2", "SCR_EL3", "VBAR_EL1", "VBAR_EL2")
"""Registers that stay: they say which regime this is, and where the asking program's vectors are."""
OWN_PIR = 0xF0  # the permissions of the asking program's pages
ADDRESS = 0xFFFF_FFFF_F000
ATTRIBUTES = 0xFFF8_0000_0000_0CFC  # of a table descriptor


def shrink(case: Case, still_fails: Callable[[Case], bool], *, tries: int = 3000) -> Case:
    """The smallest case like `case` that still fails, after at most `tries` calls of `still_fails`.

    A case that does not fail comes back as it is, without its answers.
    """
    return _Shrinker(case.question(), still_fails, tries).run()


class _Shrinker:
    def __init__(self, case: Case, still_fails: Callable[[Case], bool], tries: int) -> None:
        self.original = self.case = case
        self.still_fails, self.tries = still_fails, tries
        self.own_half = "0" if "TTBR0_EL3" in case.regs else None if case.half is None else str(1 - case.half)
        """The half whose tables map the asking program."""

    def run(self) -> Case:
        if not self._fails(self.case):
            return self.case
        before = None
        while before != self.case:
            before = self.case
            self._queries()
            self._words()
            self._little_endian()
            self._registers()
            self._word_bits()
            self._address_bits()
        return self.case

    def _fails(self, case: Case) -> bool:
        self.tries -= 1
        return self.tries >= 0 and self.still_fails(case)

    def _try(self, case: Case) -> bool:
        """Take a candidate if it is safe to ask and still fails."""
        if case == self.case or not self._is_safe(case) or not self._fails(case):
            return False
        self.case = case
        return True

    def _is_safe(self, case: Case) -> bool:
        old = self.original
        other_format = any(case.regs[n] != old.regs[n] for n in case.regs if n.startswith(("TCR_", "SCTLR_")))
        words = (w for pa, w in case.mem.items() if other_format or old.mem[pa] != w)
        return all(harmless(word, case.cpu) for word in words)

    # ---- passes

    def _queries(self) -> None:
        for query in self.case.queries:  # one alone is the usual end
            if self._try(replace(self.case, queries=(query,))):
                return
        _drop(self.case.queries, lambda queries: self._try(replace(self.case, queries=tuple(queries))))

    def _words(self) -> None:
        kept = {pa: word for pa, word in self.case.mem.items() if self._is_own(word)}
        words = sorted(self.case.mem.items() - kept.items())
        _drop(words, lambda words: self._try(replace(self.case, mem=kept | dict(words))))

    def _is_own(self, word: int) -> bool:
        """Whether this may be a word by which EL3's tables map the asking program."""
        if self.original.half is not None or self.own_half is None:
            return False
        return word & ADDRESS == PROGRAM_PAGE or (word & 3 == 3 and not word & ATTRIBUTES)

    def _little_endian(self) -> None:
        for name in ("SCTLR_EL1", "SCTLR_EL2"):
            if self.case.regs[name] & SCTLR_EE:
                mem = {pa: int.from_bytes(w.to_bytes(8, "little"), "big") for pa, w in self.case.mem.items()}
                regs = {**self.case.regs, name: self.case.regs[name] & ~SCTLR_EE}
                candidate = replace(self.case, regs=regs, mem=mem)
                if self._fails(candidate):  # safe: no walk changes
                    self.original = self.case = candidate

    def _registers(self) -> None:
        if self.case.pan:
            self._try(replace(self.case, pan=0))
        for name in self.case.regs:
            if name in FIXED:
                continue
            self._set(name, DEFAULTS.get(name, 0), self._free_bits(name))
            for bits in self._parts(name):
                self._set(name, DEFAULTS.get(name, 0), bits & self._free_bits(name))

    def _set(self, name: str, wanted: int, bits: int) -> None:
        value = self.case.regs[name] & ~bits | wanted & bits
        if value != self.case.regs[name]:
            self._try(replace(self.case, regs={**self.case.regs, name: value}))

    def _parts(self, name: str) -> Iterator[int]:
        """What to reset one after the other: the fields of a TCR, then every bit."""
        if name.startswith("TCR_"):
            fields = TCR_HALVES if self._regime_has_halves(name) else TCR_ONE
            yield from (((1 << width) - 1) << low for low, width in fields.values())
        yield from (1 << bit for bit in range(63, -1, -1))

    def _regime_has_halves(self, name: str) -> bool:
        return name == "TCR_EL1" or bool(self.case.regs["HCR_EL2"] >> 34 & 1)

    def _free_bits(self, name: str) -> int:
        """The bits of a register that do not keep the asking program alive."""
        every = (1 << 64) - 1
        if name.startswith("TTBR"):
            return ASID_AND_CNP
        if self.own_half is None:
            return every
        if name.startswith("TCR_"):
            fields = TCR_HALVES if self._regime_has_halves(name) else TCR_ONE
            kept = [fields[n] for n in (f"T{self.own_half}SZ", f"TG{self.own_half}", "DS", "PS") if n in fields]
            return every & ~sum(((1 << width) - 1) << low for low, width in kept)
        return every & ~{"SCTLR": SCTLR_M, "PIR": OWN_PIR, "PIRE0": OWN_PIR}.get(name.partition("_")[0], 0)

    def _word_bits(self) -> None:
        if any(self.case.regs[f"SCTLR_{el}"] & SCTLR_EE for el in ("EL1", "EL2")):
            return
        for pa in sorted(pa for pa, word in self.case.mem.items() if not self._is_own(word)):
            for bits in (0xFFF << 52, 0xFFC, *_bits_of(self.case.mem[pa])):
                word = self.case.mem[pa] & ~bits
                if word != self.case.mem[pa]:
                    self._try(replace(self.case, mem={**self.case.mem, pa: word}))

    def _address_bits(self) -> None:
        for i, (start, _) in enumerate(self.case.queries):
            for bit in _bits_of(start):
                va, op = self.case.queries[i]
                queries = list(self.case.queries)
                queries[i] = (va & ~bit, op)
                if va & bit and (bit != HALF_OF_VA or self.case.half is None):
                    self._try(replace(self.case, queries=tuple(queries)))


def _bits_of(word: int) -> Iterable[int]:
    return [1 << bit for bit in range(63, -1, -1) if word >> bit & 1]


def _drop(items: Sequence[T], keep: Callable[[Sequence[T]], bool]) -> None:
    """Drop runs of items, halving the length of a run, as long as `keep` takes what is left."""
    run = len(items) // 2 or 1
    while run:
        at = 0
        while at < len(items) and len(items) > 1:
            rest = [*items[:at], *items[at + run :]]
            if rest and keep(rest):
                items = rest
            else:
                at += run
        run //= 2
