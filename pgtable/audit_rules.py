"""The rules of an audit that know no operating system: each takes a Subject and gives the ranges that offend.

Sources: Arm ARM D8.7 (Contiguous bit; AF and dirty state may differ inside a group), D8.16.1 (break-before-make),
B2.16 (mismatched memory attributes: type, shareability and cacheability; allocation hints do not count), D8.4
(permissions), D8.3 (descriptor formats, RES0).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from pgtable.attributes import is_device
from pgtable.audit_places import (
    AF_FAULTS,
    TYPES,
    Cover,
    Places,
    Subject,
    Sweep,
    joined,
    nothing,
    places,
    vas_at,
)
from pgtable.bits import Flags, Words
from pgtable.descriptors import LAST_LEVEL
from pgtable.findings import size_text
from pgtable.memory import PAGE
from pgtable.permissions import PR, PW, PX, UR, UW, UX
from pgtable.registers import SH
from pgtable.table_params import TableParams
from pgtable.tree import CHUNK, ROOT, Finding, Tables, words_of
from pgtable.why import rights

_DEVICE = np.array([is_device(byte) for byte in range(256)])
_CACHEABLE = np.array(["write-" in name for name in TYPES])
_RESERVED_BYTE = TYPES.index("reserved")


class Found(NamedTuple):
    """What a rule found; `text` where a count of ranges does not say it. `skip`: why there is nothing to judge."""

    places: Places
    text: str = ""
    skip: str = ""


def _permissions(s: Subject, mask: Flags) -> Found:
    return Found(s.places(mask, s.rows.perms, lambda perms: rights(perms, s.listing.regime)))


# permissions of one mapping


def privileged_wx(s: Subject) -> Found:
    """Writable and executable at the regime's own level."""
    return _permissions(s, s.having(PW | PX))


def el0_wx(s: Subject) -> Found:
    """Writable and executable at EL0."""
    return _permissions(s, s.having(UW | UX))


def el0_executes_upper(s: Subject) -> Found:
    """EL0 executes in the upper half."""
    return _permissions(s, _upper(s) & s.having(UX))


def el0_reaches_upper(s: Subject) -> Found:
    """EL0 reads or writes in the upper half."""
    return _permissions(s, _upper(s) & s.having_any(UR | UW))


def _upper(s: Subject) -> Flags:
    return np.asarray((s.rows.va >> np.uint64(63)) != 0)


def device_executable(s: Subject) -> Found:
    """Device memory that may be executed: it can be fetched from speculatively."""
    return _permissions(s, _DEVICE[s.byte] & s.having_any(PX | UX))


# several mappings of one PA


def alias_attributes(s: Subject) -> Found:
    """PAs mapped with memory types, cacheabilities or shareabilities that differ."""
    if len(s.rows.va) < 2:
        return Found(nothing())
    sweep = Sweep(s.rows)
    values, rank = np.unique(s.memory_key, return_inverse=True)
    count, sums, squares = (sweep.total(weights) for weights in (np.ones(len(rank)), rank, rank * rank))
    bad = (count > 1) & (count * squares != sums * sums)  # all the same: the sum squared is n times that of squares
    at = sweep.bounds[:-1][bad]
    first = Cover(s.rows, np.ones(len(rank), bool)).row(at)
    second = np.empty(len(at), np.int64)
    for key in np.unique(rank[first]).tolist():
        here = rank[first] == key
        second[here] = Cover(s.rows, rank != key).row(at[here])

    def text(pair: int) -> str:
        a, b = (int(values[i]) for i in divmod(pair, len(values)))
        return f"{_memory(a)}, and {_memory(b)} at the alias"

    return Found(sweep.pairs(bad, first, second, rank[first] * len(values) + rank[second], text))


def _memory(key: int) -> str:
    return f"{TYPES[key // 4]}, {SH[key % 4]}"


def alias_rwx(s: Subject) -> Found:
    """PAs written through one VA and executed through another: at the privileged level, and at EL0."""
    found = [_written_and_executed(s, PW | UW, PX), _written_and_executed(s, UW, UX)]
    return Found(joined([part for part in found if len(part)]))


def _written_and_executed(s: Subject, write: int, execute: int) -> Places:
    """PAs that one row makes writable and another one executable, as VAs of the latter."""
    some = s.having_any(write | execute)
    rows = s.rows.pick(some)
    if len(rows.va) < 2:
        return nothing()
    sweep = Sweep(rows)
    w, x = s.having_any(write)[some], s.having_any(execute)[some]
    both = w & x
    total = {name: sweep.total(mask) > 0 for name, mask in (("w", w), ("x", x), ("w only", w & ~x), ("x only", x & ~w))}
    bad = (total["w"] & total["x only"]) | (total["w only"] & total["x"])
    at = sweep.bounds[:-1][bad]
    runs, writes = Cover(rows, x & ~w).row(at), Cover(rows, w & ~x).row(at)
    rest = Cover(rows, both).row(at)
    runs, writes = np.where(runs < 0, rest, runs), np.where(writes < 0, rest, writes)
    keys = rows.perms[runs].astype(np.int64) << 16 | rows.perms[writes]

    def text(pair: int) -> str:
        regime = s.listing.regime
        return f"{rights(pair >> 16, regime)}, and {rights(pair & 0xFFFF, regime)} at the alias"

    return sweep.pairs(bad, runs, writes, keys, text)


# tables


def tables_el0_writable(s: Subject) -> Found:
    """Tables inside what EL0 may write."""
    return Found(_over_tables(s, s.having(UW)))


def tables_guest_writable(s: Subject) -> Found:
    """Stage 2's tables inside what stage 2 lets the guest write."""
    return Found(_over_tables(s, s.having_any(PW | UW)))


def tables_guest_readable(s: Subject) -> Found:
    """Stage 2's tables inside what stage 2 lets the guest read."""
    return Found(_over_tables(s, s.having_any(PR | UR)))


def tables_wx(s: Subject) -> Found:
    """Tables inside what one mapping makes writable and executable."""
    return Found(_over_tables(s, s.having_any(PW | UW) & s.having_any(PX | UX)))


def _over_tables(s: Subject, mask: Flags) -> Places:
    """The table pages that rows of a mask map, as VAs of these rows."""
    tables = s.listing.tables
    pages = [np.zeros(0, np.uint64)]
    for tree in s.listing.trees:
        for level, (_, _, index) in zip(tree.levels, tree.params.levels, strict=False):
            offsets = np.arange(0, 8 * (index + 1), PAGE, dtype=np.uint64)
            pages.append((level.pa[:, None] + offsets).ravel())
    pas = np.unique(np.concatenate(pages) & np.uint64(-PAGE & (1 << 64) - 1))
    row = Cover(s.rows, mask).row(pas)
    pas, row = pas[row >= 0], row[row >= 0]
    va = vas_at(s.rows, row, pas)
    size = np.full(len(pas), PAGE, np.uint64)
    keys = s.rows.perms[row]
    text = f"of {len(tables.pa)} translation tables"
    return places(va, size, keys, lambda perms: f"{rights(perms, s.listing.regime)}: {text}", pa=pas)


# descriptors


def contiguous(s: Subject) -> Found:
    """Groups with the Contiguous bit that are not whole, not aligned, or not of one kind."""
    parts = []
    for tree in s.listing.trees:
        leaf_levels = (*tree.params.fmt.block_levels, LAST_LEVEL)
        for tables, (level, _, mask) in zip(tree.levels, tree.params.levels, strict=False):
            if level not in leaf_levels:
                continue
            for first in range(0, len(tables.pa), CHUNK):
                some = tables.pick(slice(first, first + CHUNK))
                words, there = words_of(s.memory, tree.params, some.pa, mask + 1)
                parts.append(_groups(tree.params, level, some, np.where(there[:, None], words, np.uint64(0))))
    return Found(joined([part for part in parts if len(part)]))


_GROUP_REASONS = (
    "some entries of the group have no Contiguous bit",
    "attributes differ inside the group",
    "the group's output addresses do not go on",
    "the group's output address is not aligned to the group",
    "there is no contiguous group at this level",
)


def _groups(p: TableParams, level: int, tables: Tables, words: Words) -> Places:
    """The inconsistent contiguous groups in some tables of one level."""
    leaf, entry, run = p.fmt.leaf(level), p.fmt.granule.level_size(level), p.run_length(level)
    legal = run > 1 and words.shape[1] % run == 0
    run = run if legal else 1
    low = leaf.mask("VALID", "TYPE")
    wanted = low if level == LAST_LEVEL else leaf["VALID"].mask
    group = words.reshape(-1, run)
    flagged = ((group & np.uint64(low)) == np.uint64(wanted)) & ((group & np.uint64(p.contiguous)) != 0)
    at = np.flatnonzero(flagged.any(axis=1))
    group, flagged = group[at], flagged[at]
    first = flagged.argmax(axis=1)
    oa = p.output_address(level, group)
    steps = np.arange(run, dtype=np.uint64) * np.uint64(entry)
    kind = _kind_of(p, level, group)
    odd = np.stack(
        (
            ~flagged.all(axis=1),
            (kind != kind[:, :1]).any(axis=1),
            (oa != oa[:, :1] + steps).any(axis=1),
            (oa[:, 0] & np.uint64(run * entry - 1)) != 0,
            np.full(len(at), not legal),
        )
    )
    bad = odd.any(axis=0)
    per_table = words.shape[1] // run
    va = tables.va[at // per_table] + (at % per_table).astype(np.uint64) * np.uint64(run * entry)
    size = np.full(len(at), run * entry, np.uint64)
    pa = oa[np.arange(len(at)), first]
    return places(va[bad], size[bad], odd.argmax(axis=0)[bad], _GROUP_REASONS.__getitem__, pa=pa[bad])


def _kind_of(p: TableParams, level: int, words: Words) -> Words:
    """What must be the same in a group: all but the address, AF, and the dirty state where hardware manages it."""
    kept = words & np.uint64((1 << 64) - 1 ^ p.fmt.leaf(level)["OA"].mask ^ p.af)
    dirty = np.uint64(p.not_dirty)
    managed = np.ones(words.shape, bool) if p.fmt.pie else (words & np.uint64(p.page["DBM"].mask)) != 0
    return np.where(managed, kept & ~dirty, kept)


def reserved(s: Subject) -> Found:
    """Reserved encodings, and bits that must be 0."""
    parts = [_from_findings([finding for finding in s.listing.findings if finding.kind == "reserved"])]
    rows = s.listing.runs
    upper = (rows.va >> np.uint64(63)) != 0
    for tree in s.listing.trees:
        p = tree.params
        for level, _, _ in p.levels:
            zero = np.uint64(sum(field.mask for field in p.fmt.leaf(level) if field.reserved == "RES0"))
            some = rows.pick((rows.level == level) & (upper == p.upper) & ((rows.attributes & zero) != 0))
            parts.append(places(some.va, some.size, some.attributes & zero, _zero_text, pa=some.pa))
        parts += [_table_bits(s, p, tables) for tables in tree.levels[1:]]
    mair = s.places(
        s.memory_key // 4 == _RESERVED_BYTE, s.byte, lambda byte: f"memory attribute {byte:#04x} is reserved"
    )
    return Found(joined([part for part in (*parts, mair) if len(part)]))


def _zero_text(bits: int) -> str:
    return f"reserved bits are set: {bits:#018x}"


def _table_bits(s: Subject, p: TableParams, tables: Tables) -> Places:
    """Table descriptors with reserved bits, as the VAs below them."""
    zero = np.uint64(sum(field.mask for field in p.fmt.table(LAST_LEVEL - 1) if field.reserved == "RES0"))
    known = tables.pick(tables.slot != np.uint64(ROOT))
    words = s.memory.gather(known.slot)[0]
    words = words.byteswap() if p.big_endian else words
    bad = (words & zero) != 0
    level = int(known.level[0]) if len(known.level) else LAST_LEVEL
    size = np.full(int(bad.sum()), p.fmt.granule.level_size(level - 1), np.uint64)
    text = f"in the level {level - 1} table descriptor "
    return places(known.va[bad], size, words[bad] & zero, lambda bits: text + _zero_text(bits))


def access_flag(s: Subject) -> Found:
    """Leaves with AF = 0 where hardware does not set it."""
    by = "VTCR_EL2.HA" if s.listing.stage == 2 else "TCR.HA"
    bad = np.isin(s.rows.fault, AF_FAULTS)
    return Found(s.places(bad, s.rows.level, lambda level: f"AF is 0 at level {level}, {by} is 0"))


def shareability(s: Subject) -> Found:
    """Normal memory that is not shareable though cacheable, or of reserved shareability."""
    kind = s.memory_key // 4
    normal = np.array([name.startswith("Normal") for name in TYPES])[kind]
    bad = (normal & (s.sh == 1)) | (_CACHEABLE[kind] & (s.sh == 0))
    return Found(s.places(bad, s.memory_key, _memory))


def not_global(s: Subject) -> Found:
    """Leaves whose nG is not that of the others (of their half, with or without access for EL0)."""
    if not s.listing.regime.has_el0:
        ng = (s.rows.attributes & np.uint64(s.halves[0][0].page["nG"].mask)) != 0 if s.halves else np.zeros(0, bool)
        return Found(s.places(ng, s.rows.level, lambda _: f"nG is 1: {s.listing.regime.value} has no ASIDs"))
    ng = np.zeros(len(s.rows.va), bool)
    for p, here in s.halves:
        ng[here] = (s.rows.attributes[here] & np.uint64(p.page["nG"].mask)) != 0
    bad = np.zeros(len(ng), bool)
    el0, upper = s.having_any(UR | UW | UX), _upper(s)
    for group in (upper & el0, upper & ~el0, ~upper & el0, ~upper & ~el0):
        sizes = [int(s.rows.size[group & (ng == value)].sum()) for value in (False, True)]
        if all(sizes):
            bad |= group & (ng == (sizes[1] < sizes[0]))

    def text(value: int) -> str:
        return "not global, unlike the others" if value else "global, unlike the others: it stays in the TLB for all"

    return Found(s.places(bad, ng.astype(np.int64), text))


# the tree


_BROKEN = ("loop", "no memory", "address size", "not listed")


def structure(s: Subject) -> Found:
    """Loops, tables outside RAM, addresses that are too large, and what faults though it is mapped."""
    parts = [_from_findings([finding for finding in s.listing.findings if finding.kind in _BROKEN])]
    rows = s.listing.runs
    bad = rows.pick((rows.fault != 0) & ~np.isin(rows.fault, AF_FAULTS))
    text = "every access faults: fault status code {:#04x}".format
    parts.append(places(bad.va, bad.size, bad.fault, text, pa=bad.pa))
    return Found(joined([part for part in parts if len(part)]))


def shared_tables(s: Subject) -> Found:
    """Table pages that several descriptors refer to."""
    return Found(_from_findings([finding for finding in s.listing.findings if finding.kind == "shared table"]))


def _from_findings(found: list[Finding]) -> Places:
    """Findings of the listing as ranges."""
    va = np.array([finding.va for finding in found], np.uint64)
    size = np.array([finding.size for finding in found], np.uint64)
    return places(va, size, np.arange(len(found)), lambda i: found[i].text)


def break_before_make(s: Subject) -> Found:
    """Blocks and contiguous groups: what cannot be split in place without FEAT_BBM."""
    rows = s.rows
    block = rows.level < LAST_LEVEL
    group = np.zeros(len(block), bool)
    count = 0
    for p, here in s.halves:
        group |= here & ((rows.attributes & np.uint64(p.contiguous)) != 0)
        for level, _, _ in p.levels:
            count += int(rows.leaves[here & group & (rows.level == level)].sum()) // p.run_length(level)
    blocks = int(rows.leaves[block].sum())
    size = np.zeros(len(block), np.int64)
    for p, here in s.halves:
        for level, shift, _ in p.levels:
            size[here & (rows.level == level)] = shift

    def text(key: int) -> str:
        what = f"{size_text(1 << (key >> 2))} {'blocks' if key & 2 else 'pages'}"
        return f"{what}, contiguous" if key & 1 else what

    said = f"{blocks} block mappings and {count} contiguous groups would need break-before-make or FEAT_BBM level 2"
    return Found(s.places(block | group, size * 4 + block * 2 + group, text), f"{said} to split")
