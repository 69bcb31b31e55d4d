"""What a change of a valid descriptor needs: break-before-make, a TLB invalidation, or nothing.

Rules of this file:
- A change is judged by what it does to a translation, not by which bits differ: two AttrIndx with the same MAIR byte
  are the same memory type.
- `bbm` counts as ID_AA64MMFR2_EL1.BBM does: 1 allows the nT sequence, 2 any change of size; 3 says besides that such
  a change needs no TLB invalidation (no TLB conflict aborts).
- Setting AF, making a page dirty, and bits that hardware ignores, need nothing.
Sources: Arm ARM D8.17.1 (R_WHZWS), D8.17.2 (FEAT_BBM levels), D8.7.3 (nT), D8.16 (what a TLB may hold).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from pgtable.attributes import MemoryAttributes
from pgtable.bits import Layout
from pgtable.descriptors import LAST_LEVEL, Kind
from pgtable.params import WalkParams
from pgtable.permissions import PR, PW, PX, TO_UNPRIVILEGED
from pgtable.walk import leaf_memory, leaf_permissions

SameContents = Callable[[int, int, int], bool]  # PA, PA, bytes -> the memory there is equal

# Rules of R_WHZWS.
SIZE, TABLE, OA = "block size", "table address", "output address"
TYPE, CACHEABILITY, SHAREABILITY = "memory type", "cacheability", "shareability"
CONTIGUOUS, GLOBAL = "contiguous", "global over non-global"
_WRITE = PW | PW << TO_UNPRIVILEGED
_S2_EXECUTE = (PX | PX << TO_UNPRIVILEGED, PX << TO_UNPRIVILEGED, 0, PX)  # by XN[1:0]


class Verdict(NamedTuple):
    """`rule`: why break-before-make is required, "" if it is not. `unclean`: a TLB may hold what is now wrong."""

    rule: str
    unclean: bool


_NOTHING, _UNCLEAN = Verdict("", False), Verdict("", True)


class Changes:
    """Judges changes of descriptors of one half of a VA space; verdicts are kept, addresses apart.

    `stage` 2: the descriptors are stage 2's, in a tree that is otherwise as `params` says.
    """

    def __init__(
        self,
        params: WalkParams,
        bbm: int | None = None,
        same_contents: SameContents | None = None,
        *,
        stage: int = 1,
    ) -> None:
        self.params = params
        self._page = replace(params.fmt, stage2=True).leaf(LAST_LEVEL) if stage == 2 else None
        self.bbm = params.features.bbm if bbm is None else bbm
        self._same_contents = same_contents
        self._known: dict[tuple[int, int, int, bool], Verdict] = {}
        self._kinds = params.kinds

    def cacheable(self, level: int, word: int) -> bool:
        """A TLB may hold it: a table, or a leaf whose access flag does not fault (R_XCLRD)."""
        kind = self._kinds[level][word & 3]
        return kind is Kind.TABLE or (kind is not Kind.INVALID and bool(word & self.params.af or self.params.ha))

    def is_table(self, level: int, word: int) -> bool:
        """A table descriptor."""
        return self._kinds[level][word & 3] is Kind.TABLE

    def nT(self, level: int, word: int) -> bool:
        """A block with nT set."""
        return self._kinds[level][word & 3] is Kind.BLOCK and bool(word & self.params.nt)

    def __call__(self, level: int, old: int, new: int) -> Verdict:
        """What the change from `old` to `new`, both as they are in memory, needs."""
        if not self.cacheable(level, old) or old == new:
            return _NOTHING
        if not new & 1:
            return _UNCLEAN
        mask = self._address_mask(level, old, new)
        key = level, old & ~mask, new & ~mask, bool((old ^ new) & mask)
        verdict = self._known.get(key)
        if verdict is None:
            verdict = self._judge(level, old, new)
            if self._same_contents is None or not key[3]:
                self._known[key] = verdict
        return verdict

    def _address_mask(self, level: int, old: int, new: int) -> int:
        p = self.params
        if self.is_table(level, old) and self.is_table(level, new):
            return p.table_mask
        return p.leaf_address[level][0] if level in p.leaf_address else 0

    def _judge(self, level: int, old: int, new: int) -> Verdict:
        p = self.params
        if not self.cacheable(level, new):
            changed = {name for name in p.page.changed(old, new) if not name.startswith("IGNORED")}
            return _NOTHING if changed == {"AF"} else _UNCLEAN
        tables = self.is_table(level, old), self.is_table(level, new)
        if all(tables):
            return self._table(old, new)
        if any(tables):
            return self._resized(level, old, new)
        rule = self._rule(level, old, new)
        return Verdict(rule, True) if rule else Verdict("", self._weaker(level, old, new))

    def _table(self, old: int, new: int) -> Verdict:
        p = self.params
        if p.table_address(old) != p.table_address(new):
            return Verdict(TABLE, True)
        if self._page:
            return _NOTHING
        limits = p.inherited_mask | (p.ns_table if p.secure else 0)
        return Verdict("", bool(new & ~old & limits))

    def _resized(self, level: int, old: int, new: int) -> Verdict:
        """A block became a table, or the other way round."""
        marked = self.nT(level, old) or self.nT(level, new)
        allowed = self.bbm >= 2 or (self.bbm == 1 and marked)
        return Verdict("" if allowed else SIZE, self.bbm < 3)

    def _rule(self, level: int, old: int, new: int) -> str:
        """The first line of R_WHZWS that a change from leaf to leaf falls under."""
        p = self.params
        if self._moved(level, old, new):
            return OA
        if self._page:
            return self._stage2_rule(self._page, old, new)
        (attr, sh), (new_attr, new_sh) = leaf_memory(p, level, old), leaf_memory(p, level, new)
        if attr != new_attr:
            was, now = MemoryAttributes.of(attr), MemoryAttributes.of(new_attr)
            return TYPE if (was.type, was.tagged) != (now.type, now.tagged) else CACHEABILITY
        if sh != new_sh:
            return SHAREABILITY
        if (old ^ new) & p.contiguous and not self.bbm:
            return CONTIGUOUS
        return GLOBAL if p.regime.has_el0 and old & p.ng and not new & p.ng else ""

    def _stage2_rule(self, page: Layout, old: int, new: int) -> str:
        (was, sh), (now, new_sh) = ((page["MemAttr"].get(word), page["SH"].get(word)) for word in (old, new))
        if was != now:
            return CACHEABILITY if was >> 2 and now >> 2 else TYPE
        if sh != new_sh:
            return SHAREABILITY
        return CONTIGUOUS if (old ^ new) & self.params.contiguous and not self.bbm else ""

    def _moved(self, level: int, old: int, new: int) -> bool:
        """The output address or its space changed, in a way that can be seen."""
        p = self.params
        if p.secure and (old ^ new) & p.ns and not self._page:
            return True
        was, now = p.output_address(level, old), p.output_address(level, new)
        if was == now:
            return False
        if self._granted(old) & _WRITE or self._granted(new) & _WRITE or self._same_contents is None:
            return True
        return not self._same_contents(was, now, p.fmt.granule.level_size(level))

    def _granted(self, word: int) -> int:
        if self._page:
            access, never = self._page["S2AP"].get(word), self._page["XN"].get(word)
            return (PR if access & 1 else 0) | (PW if access & 2 else 0) | _S2_EXECUTE[never]
        base, overlay, _ = leaf_permissions(self.params, word, 0)
        return int(base & overlay)

    def _weaker(self, level: int, old: int, new: int) -> bool:
        """A TLB that still has `old` would do what `new` does not: a right is gone, the address, a mark."""
        p = self.params
        if self._granted(old) & ~self._granted(new):
            return True
        if p.output_address(level, old) != p.output_address(level, new):
            return True
        if (old ^ new) & p.contiguous and self.bbm < 3:
            return True
        if level < LAST_LEVEL and new & ~old & p.nt:
            return True
        if self._page:
            return False
        guarded = p.page["GP"].mask
        return bool(new & ~old & (guarded | (p.ng if p.regime.has_el0 else 0)))
