"""Why stage 2 refused: its walk as text, and the bits that decided, as why.py has them for stage 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pgtable.faults import Fault, FaultType
from pgtable.stage2_permissions import EL0_EXECUTE, EL1_EXECUTE, READ, WRITE

if TYPE_CHECKING:
    from pgtable.bits import Field
    from pgtable.stage2 import Stage2Walk

_PERMISSION_FIELDS = ("S2AP", "DBM", "XN", "PIIndex", "POIndex", "Dirty", "NS")
_BEFORE = {
    "T0SZ": "VTCR_EL2.T0SZ is out of range",
    "SL0": "VTCR_EL2.SL0 is reserved, or does not go with T0SZ",
    "range": "the IPA is outside the range that T0SZ sets",
    "VTTBR": "the root's address exceeds the output size",
}


def stage2_lines(found: Stage2Walk) -> Iterator[str]:
    """Every descriptor that was read, and what came of it."""
    fmt = found.params.fmt
    for level, pa, word in found.raw:
        yield f"S2 L{level} {pa:#x} {word:#018x} {fmt.kind(word, level).name.lower()}"
    result = found.result
    if isinstance(result, Fault):
        decided = (
            "; ".join(dict.fromkeys(text.removeprefix("stage 2: ") for *_, text in stage2_bits(found))) or result.cause
        )
        yield f"{result}: {decided}"
    else:
        rights = f"{_rights(result.perms, EL1_EXECUTE)} {_rights(result.perms, EL0_EXECUTE)}"
        yield f"PA {result.pa:#x}" + (f", {rights}" if result.level is not None else ", stage 2 is off")


def _rights(perms: int, execute: int) -> str:
    return "".join(letter if perms & bit else "-" for bit, letter in ((READ, "r"), (WRITE, "w"), (execute, "x")))


def stage2_bits(found: Stage2Walk) -> Iterator[tuple[int | None, int | None, int | None, str, str, str]]:
    """What decided a fault: level, PA and entry of the descriptor (None: a register), field, its bits, in words."""
    fault = found.result
    if not isinstance(fault, Fault):
        return
    if not found.raw or fault.cause in _BEFORE:
        yield None, None, None, fault.cause, "", _BEFORE.get(fault.cause, fault.cause)
        return
    level, _, word = found.raw[-1]
    leaf = found.params.fmt.leaf(level)
    if fault.type is FaultType.PERMISSION:
        yield from _permission_bits(found)
    elif fault.cause == "descriptor":
        field = found.params.fmt.layout(word, level)["TYPE" if word & 1 else "VALID"]
        text = f"makes it a block, and level {level} has none" if word & 1 else "is 0"
        yield _at(found, field, f"{field.name} (bit {field.bits}) {text}")
    elif fault.cause in ("OA", "AF"):
        text = "is 0" if fault.cause == "AF" else f"exceeds {found.params.ps_bits} bits"
        yield _at(found, leaf[fault.cause], f"{fault.cause} (bits {leaf[fault.cause].bits}) {text}")
    elif fault.cause == "table":
        field = found.params.fmt.table(level)["TA"]
        yield _at(found, field, f"TA (bits {field.bits}) exceeds {found.params.ps_bits} bits")


def _permission_bits(found: Stage2Walk) -> Iterator[tuple[int | None, int | None, int | None, str, str, str]]:
    """Each field of the leaf with another value of which the access would pass; HCR_EL2.PTW."""
    from pgtable.stage2 import stage2_walk

    fault = found.result
    assert isinstance(fault, Fault)
    level, pa, word = found.raw[-1]
    leaf = found.params.fmt.leaf(level)
    if fault.cause == "PTW":
        yield None, None, None, "HCR_EL2.PTW", "2", "HCR_EL2.PTW is 1: no stage 1 table in Device memory"
        yield _at(found, leaf["MemAttr"], f"MemAttr = {leaf['MemAttr'].get(word):#x} is Device")
        return
    words = {at: value for _, at, value in found.raw}
    for name in _PERMISSION_FIELDS:
        if name not in leaf:
            continue
        field = leaf[name]
        for value in range(field.value_mask + 1):
            changed = words | {pa: field.put(word, value)}
            asked = stage2_walk(changed.__getitem__, found.plain, found.ipa, found.access, s1ptw=found.s1ptw)
            if not isinstance(asked.result, Fault):
                meaning = field.meaning(field.get(word))
                text = f"{name} = {field.get(word):#x}{f' ({meaning})' if meaning else ''} at level {level}"
                yield _at(found, field, text)
                break


def _at(found: Stage2Walk, field: Field, text: str) -> tuple[int, int, int, str, str, str]:
    level, pa, _ = found.raw[-1]
    _, shift, mask = next(row for row in found.params.levels if row[0] == level)
    return level, pa, found.ipa >> shift & mask, str(field), field.bits, f"stage 2: {text}"
