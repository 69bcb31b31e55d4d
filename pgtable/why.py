"""Why: a walk as text, and the bits that decided a fault.

Rules of this file:
- What decided a permission fault is found by asking the walk again with one bit changed (`deciders_of`): a bit is named
  only if the access would have gone through without it.
- Text has no colours and addresses are full 64-bit words, so that a test can compare it and a person can diff it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import NamedTuple

from pgtable.attributes import MemoryAttributes
from pgtable.bits import Field
from pgtable.descriptors import Kind
from pgtable.faults import Fault, FaultType
from pgtable.params import Regime, WalkParams
from pgtable.permissions import RuleTable, direct_rules, letters
from pgtable.registers import SH
from pgtable.spaces import AMEC
from pgtable.walk import Step, Translation, Walk, walk


class Decider(NamedTuple):
    """One bit that decided a fault: a descriptor's (`level`, `pa`, `entry` say which) or a register's (`pa` None)."""

    level: int | None
    pa: int | None
    entry: int | None
    field: str
    bits: str
    text: str


# A register's part in a permission decision: name, the parameters without it.
_REGISTERS = (
    ("PSTATE.PAN", "PAN refuses EL1 data accesses to pages that EL0 can reach"),
    ("SCTLR.EPAN", "with EPAN a page that EL0 can only execute counts for PAN"),
    ("SCTLR.WXN", "writable pages are never executable"),
)


def deciders_of(found: Walk) -> list[Decider]:
    """Of stage 1: the bits without any one of which there would be no fault, leaf first.

    Where several bits forbid a permission, each by itself, all of them are named.
    """
    fault = found.fault
    if fault is None:
        return []
    if found.params.d128:  # asking again is for 64-bit words: the cause alone is named
        return [Decider(None, None, None, fault.cause, "", fault.cause)]
    if found.params.big_endian:  # the words kept are in the CPU's order: asking again must not swap them
        params = replace(found.params, big_endian=False)
        found = Walk(found.va, found.access, params, found.raw, found.result, found.updates)
    if fault.type is FaultType.PERMISSION:
        return [*_leaf_bits(found), *_table_bits(found), *_register_bits(found)] or list(_each_by_itself(found))
    return list(_named_bits(found, fault))


def _named_bits(found: Walk, fault: Fault) -> Iterator[Decider]:
    """The bit of a fault that is not about permissions: the cause names it."""
    if fault.cause == "descriptor":
        step = found.steps[-1]
        field = found.params.fmt.layout(step.word, step.level)["TYPE" if step.word & 1 else "VALID"]
        text = "is 0" if not step.word & 1 else f"makes it a block, and level {step.level} has none"
        yield _at(step, field, f"{field.name} (bit {field.bits}) {text}")
    elif fault.cause in ("OA", "AF", "Contiguous", "nT"):
        step = found.steps[-1]
        field = found.params.fmt.leaf(step.level)[fault.cause]
        limit = (
            f" exceeds {found.params.ps_bits} bits" if fault.cause == "OA" else " is 0" if fault.cause == "AF" else ""
        )
        place = f"{field} (bit{'s' if ':' in field.bits else ''} {field.bits})"
        yield _at(step, field, f"{place}{limit}" if limit else f"{field.name} is 1")
    elif fault.cause == "AMEC":
        yield _at(found.steps[-1], AMEC, "AMEC is 1, and TCR2_EL2 allows no alternate context")
    elif fault.cause == "table":
        step = found.steps[-1]
        field = found.params.fmt.table(step.level)["TA"]
        yield _at(step, field, f"{field} (bits {field.bits}) exceeds {found.params.ps_bits} bits")
    elif fault.cause:
        yield Decider(None, None, None, fault.cause, "", _BEFORE.get(fault.cause, fault.cause))


_BEFORE = {
    "TxSZ": "TCR's TxSZ is out of range",
    "range": "the VA is outside the range that TxSZ sets",
    "E0PD": "TCR.E0PD keeps EL0 out of this half",
    "EPD": "TCR.EPD switches walks of this half off",
    "TTBR": "TTBR's table address exceeds the output size",
    "VA": "the address exceeds the CPU's physical addresses",
}


def _at(step: Step, field: Field, text: str) -> Decider:
    return Decider(step.level, step.pa, step.entry, str(field), field.bits, text)


def _would_pass(found: Walk, params: WalkParams, changed: dict[int, int]) -> bool:
    """The access goes through with other words at some PAs."""
    words = {pa: word for _, pa, word in found.raw} | changed
    return walk(words.__getitem__, params, found.va, found.access).ok


def _leaf_bits(found: Walk) -> Iterator[Decider]:
    step = found.steps[-1]
    leaf = found.params.fmt.leaf(step.level)
    for name in ("AP", "UXN", "PXN", "XN", "PIIndex", "POIndex", "nDirty"):
        if name in leaf and any(
            _would_pass(found, found.params, {step.pa: leaf[name].put(step.word, value)})
            for value in range(leaf[name].value_mask + 1)
        ):
            value = leaf[name].get(step.word)
            meaning = f" ({leaf[name].meaning(value)})" if leaf[name].meaning(value) else ""
            yield _at(step, leaf[name], f"{name} = {value:#x}{meaning} at level {step.level}")


def _table_bits(found: Walk) -> Iterator[Decider]:
    without = {s.pa: s.word & ~found.params.inherited_mask for s in found.steps if s.kind is Kind.TABLE}
    if not _would_pass(found, found.params, without):
        return
    for step in found.steps[:-1]:
        table = found.params.fmt.table(step.level)
        for name in ("APTable", "UXNTable", "PXNTable", "XNTable"):
            if name not in table or not table[name].get(step.word) & 3:
                continue
            others = dict(without)
            others[step.pa] = table[name].put(without[step.pa], table[name].get(step.word))
            if not _would_pass(found, found.params, others):
                where = f"at level {step.level}, entry {step.entry}, PA {step.pa:#x}"
                value = table[name].get(step.word)
                text = f"the leaf alone would allow it: {name} = {value:#x} {where}"
                yield _at(step, table[name], text)


def _each_by_itself(found: Walk) -> Iterator[Decider]:
    """Leaf and table bits that each forbid the access, were they the only ones to."""
    p, leaf_step = found.params, found.steps[-1]
    cleared = {s.pa: s.word & ~p.inherited_mask for s in found.steps if s.kind is Kind.TABLE}
    words = {pa: word for _, pa, word in found.raw} | cleared
    for decider in _leaf_bits(walk(words.__getitem__, p, found.va, found.access)):
        yield decider._replace(text=f"{decider.text} forbids it by itself")
    leaf = p.fmt.leaf(leaf_step.level)
    names = [name for name in ("AP", "UXN", "PXN", "XN") if name in leaf]
    for values in product(*(range(leaf[name].value_mask + 1) for name in names)):
        allowing = {leaf_step.pa: leaf.pack(leaf_step.word, **dict(zip(names, values, strict=True)))}
        if _would_pass(found, p, cleared | allowing):
            break
    else:
        return
    for step in found.steps[:-1]:
        table = p.fmt.table(step.level)
        for name in ("APTable", "UXNTable", "PXNTable", "XNTable"):
            if name in table and table[name].get(step.word):
                alone = {step.pa: table[name].put(cleared[step.pa], table[name].get(step.word))}
                if not _would_pass(found, p, cleared | allowing | alone):
                    text = f"{name} at level {step.level}, entry {step.entry} forbids it by itself"
                    yield _at(step, table[name], text)


def _register_bits(found: Walk) -> Iterator[Decider]:
    p, rules = found.params, found.params.rules
    none = RuleTable([0] * len(rules.wxn.rows))
    without = (
        replace(p, pan=False),
        p if p.pie else replace(p, rules=rules._replace(pan=direct_rules(p.regime.has_el0, False, False).pan)),
        p if p.pie else replace(p, rules=rules._replace(final=rules.base, wxn=none)),
    )
    for (name, text), params in zip(_REGISTERS, without, strict=True):
        access = replace(found.access, pan=False) if name == "PSTATE.PAN" and found.access.pan else found.access
        words = {pa: word for _, pa, word in found.raw}
        if walk(words.__getitem__, params, found.va, access).ok:
            yield Decider(None, None, None, name, "", text)


def rights(perms: int, regime: Regime) -> str:
    """Permission bits by exception level: `EL1 rw- EL0 ---`."""
    text = letters(perms)
    return f"EL{regime.el} {text[:3]}" + (f" EL0 {text[3:]}" if regime.has_el0 else "")


def attributes_text(word: int, level: int, params: WalkParams) -> str:
    """The set fields of a descriptor, in one line: a table's limits, a leaf's attributes."""
    kind = params.fmt.kind(word, level)
    layout = params.fmt.layout(word, level)
    skip = {"VALID", "TYPE", "OA", "TA"}
    parts = []
    for field in layout:
        value = field.get(word)
        if value and field.name not in skip and not field.reserved:
            parts.append(field.name if field.value_mask == 1 else f"{field.name}={value:#x}")
    return f"{kind.name.lower()} {' '.join(parts)}".rstrip()


def step_text(step: Step, params: WalkParams) -> str:
    """One line for one descriptor read."""
    field = {Kind.TABLE: "TA"}.get(step.kind, "OA")
    layout = params.fmt.layout(step.word, step.level)
    target = f" -> {layout[field].get(step.word):#x}" if step.kind is not Kind.INVALID else ""
    where = f"L{step.level} {step.pa - 8 * step.entry:#x}[{step.entry}]"
    return f"{where} {step.word:#018x} {attributes_text(step.word, step.level, params)}{target}"


def walk_text(found: Walk) -> str:
    """A walk with every step, and its result or what decided the fault."""
    p = found.params
    half = ("upper" if p.upper else "lower") + " half, " if p.regime.has_el0 else ""
    head = f"VA {found.va:#018x}: {found.access}, {p.regime.value} {half}{p.ia_bits}-bit, {p.fmt.granule.label} granule"
    steps = [f"  {step_text(step, p)}" for step in found.steps]
    result = _fault_lines(found, found.result) if isinstance(found.result, Fault) else [_success(p, found.result)]
    return "\n".join([head, *steps, *result])


def _success(p: WalkParams, result: Translation) -> str:
    where = "MMU off" if result.level is None else f"level {result.level}"
    attributes = MemoryAttributes.of(result.attr)
    return (
        f"  = PA {result.pa:#x} ({where}), {rights(result.perms, p.regime)}, "
        f"{attributes}, {SH[result.sh]}{', not global' if result.nG else ''}"
    )


def _fault_lines(found: Walk, fault: Fault) -> list[str]:
    el = found.params.regime.el
    why = [f"    because {d.text}" for d in deciders_of(found)]
    codes = f"    ESR_EL{el} {fault.esr(found.access):#x}, FAR_EL{el} {found.va:#x}"
    return [f"  = {fault}", *why, codes]
