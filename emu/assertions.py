"""What a test says of a call: which descriptors it changed, how it maintained TLBs, what a walk finds.

    assert_only_changed(result, va, AP=(0, 2))          # one descriptor, one field
    assert_only_changed(result, {va, va + 0x1000}, VALID=(1, 0), nG=...)
    assert_no_bbm_violation(result)
    assert_same_walk(machine, va, before)

Each raises AssertionError with the descriptors decoded: one line for what was not expected, one for what is missing.
"""

from __future__ import annotations

from collections.abc import Iterable
from types import EllipsisType
from typing import Any

from emu.calls import CallResult
from emu.changes import Change
from emu.machine import Machine
from pgtable import Translation, Walk
from pgtable.tlb_events import Finding

__all__ = ["assert_no_bbm_violation", "assert_only_changed", "assert_same_walk"]

Wanted = int | tuple[int, int] | EllipsisType
"""A field: its new value, its old and new value, or `...` for any."""


def assert_only_changed(result: CallResult, va: int | Iterable[int], **fields: Wanted) -> None:
    """The call changed the descriptors of these VAs, and none else; of each, these fields (by name), and no other.

    `va`: the lowest address that a changed descriptor translates, or several; none of them for `()`. `fields`: as the
    Arm ARM names them ("AP", "VALID", "nG"): the new value, (old, new), or `...` for a change to anything; without any
    the fields are not looked at. Raises AssertionError with every difference; the call's own stop as `ok()` does.
    """
    __tracebackhide__ = True
    wanted = {va} if isinstance(va, int) else set(va)
    result.ok()
    lines: list[str] = []
    for change in result.changes:
        if change.va not in wanted:
            lines.append(f"not expected  {change}")
        else:
            lines += [f"{wrong}  {change}" for wrong in _wrong_fields(change, fields)]
    seen = {change.va for change in result.changes}
    lines += [f"unchanged     {at:#018x}" for at in sorted(wanted - seen)]
    if lines:
        raise AssertionError("\n".join([f"{len(result.changes)} descriptors changed, {len(wanted)} expected:", *lines]))


def _wrong_fields(change: Change, fields: dict[str, Wanted]) -> list[str]:
    if not fields:
        return []
    wrong = [f"{name} too" for name in change.fields if name not in fields]
    for name, want in fields.items():
        found = change.fields.get(name)
        if found is None:
            wrong.append(f"{name} stayed" if want is not ... else f"{name} did not change")
        elif isinstance(want, tuple) and found != want:
            wrong.append(f"{name} not {want[0]:#x}->{want[1]:#x}")
        elif isinstance(want, int) and found[1] != want:
            wrong.append(f"{name} not ->{want:#x}")
    return wrong


def assert_no_bbm_violation(result: CallResult) -> None:
    """Neither checker of TLB maintenance has found anything in the call: break-before-make, and use of stale entries.

    The machine must have a trace (`machine.attach(Trace())`): raises ValueError where nothing was checked.
    """
    __tracebackhide__ = True
    result.ok()
    if not result.traced:
        raise ValueError(
            "the machine has no trace, so that nothing was checked: machine.attach(Trace()) before the call"
        )
    if result.findings:
        raise AssertionError(f"TLB maintenance: {len(result.findings)} findings\n{_findings(result.findings)}")


def _findings(findings: Iterable[Finding]) -> str:
    return "\n".join(f"  {finding}" for finding in findings)


def assert_same_walk(machine: Machine, va: int, before: Walk) -> None:
    """An access to `va` goes where `before` (of `machine.translate`) went, with the same permissions and attributes.

    Descriptors on the way may differ: a block that was split into pages is the same walk. Raises AssertionError with
    both walks.
    """
    __tracebackhide__ = True
    after = machine.translate(va, before.access)
    if _fate(before) != _fate(after):
        raise AssertionError(f"the walk of {va:#x} changed\nbefore\n{before}\nafter\n{after}")


def _fate(walk: Walk) -> tuple[Any, ...]:
    result = walk.result
    if isinstance(result, Translation):
        return result.pa, result.attr, result.sh, result.perms, result.nG
    return result.type, result.level
