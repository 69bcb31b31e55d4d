"""Rows of the walk's table that cases reach: callback x kind of entry x what the callback did; holes by depth.

What can be reached follows from the levels of the run: a level whose entry is tested for none and bad shows its
callback tables only; a folded one shows it whatever is in the slot.
"""

from __future__ import annotations

from emu.checks.world import Script, World
from kernel_model.compare import Outcome
from kernel_model.levels import Fold
from kernel_model.mm import Callback
from kernel_model.names import Bits

ACTIONS = ("SUBTREE", "CONTINUE", "AGAIN", "stop")
LEVELS = {"pgd_entry": "PGD", "p4d_entry": "P4D", "pud_entry": "PUD", "pmd_entry": "PMD", "pte_entry": "PTE"}


def kind_of(bits: Bits, callback: str, value: int) -> str:
    """What Linux takes an entry for."""
    if value == 0:
        return "none"
    if callback == "pte_entry":
        return "valid" if bits.pte_valid(value) else "present-invalid" if bits.pte_present(value) else "not present"
    if bits.pxd_table(value):
        return "table"
    present = bits.pmd_present(value) if callback == "pmd_entry" else bits.pte_present(value)
    if not present:
        return "not present"
    return "leaf" if bits.pte_valid(value) else "present-invalid leaf"


def walk_rows(world: World, outcome: Outcome, script: Script) -> frozenset[str]:
    """The rows that a walk reached; `script` says what its callbacks did."""
    found = set()
    number = 0
    for event in outcome.events:
        if not isinstance(event, Callback):
            continue
        reaction = script.get(number)
        number += 1
        did = "stop" if reaction and reaction.value else ACTIONS[(reaction.action or 0) if reaction else 0]
        if event.name in LEVELS:
            found.add(f"{event.name} {kind_of(world.bits, event.name, event.value or 0)} {did}")
        elif event.name == "pte_hole":
            depth = event.args[2] - (1 << 32 if event.args[2] >> 31 else 0)
            found.add(f"pte_hole depth {depth} {'stop' if did == 'stop' else 'goes on'}")
    return frozenset(found)


def walk_universe(world: World) -> frozenset[str]:
    """Every row that walks of this run can reach."""
    rows = {f"{callback} {kind} {did}" for callback in LEVELS for kind in _kinds(world, callback) for did in ACTIONS}
    for depth in _hole_depths(world):
        rows |= {f"pte_hole depth {depth} {did}" for did in ("goes on", "stop")}
    return frozenset(rows)


def _kinds(world: World, callback: str) -> list[str]:
    """Kinds that a callback can be shown."""
    variant, levels, name = world.own, world.levels, LEVELS[callback]
    keeps = variant.present_invalid or variant.prot_none_58
    if name == "PTE":
        return ["none", "valid", "not present", *(["present-invalid"] if keeps else [])]
    uppers = ["table", "leaf", "not present", *(["present-invalid leaf"] if keeps else [])]
    if name in ("PUD", "PMD"):
        return uppers
    good = ["table"] if variant.bad_is_type else ["table", "not present", *uppers[3:]]
    level = levels.pgd if name == "PGD" else levels.p4d
    if levels.top_is_none_tested(name) or (level.fold is Fold.COMPILE and levels.top_is_none_tested("PGD")):
        return good
    # The callback of a folded level sees whatever is in the slot: nothing is tested before it.
    return [*uppers, "none"]


def _hole_depths(world: World) -> set[int]:
    """Depths that a hole can have: of the levels whose entries are tested for none."""
    levels = world.levels
    depths = {levels.real_depth(2), levels.real_depth(3)}
    if levels.top_is_none_tested("PGD"):
        depths.add(0)
    if levels.top_is_none_tested("P4D"):
        depths.add(levels.real_depth(1))
    return depths
