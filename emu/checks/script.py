"""The model's side of a script: callbacks that record what they were given and react as the guest's recorder does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from emu.checks.world import LIMIT, WITH_ENTRY, Reaction, Script, ScriptOver
from kernel_model.mm import Callback, Kernel
from kernel_model.pagewalk import Action, MmWalk, MmWalkOps

NOTHING = Reaction()


class Recorder:
    """Counts callbacks and gives each its reaction; `kernel.events` gets a Callback for each.

    `arena`: PA and bytes of where entries may be stored to.
    """

    def __init__(self, kernel: Kernel, script: Script, arena: tuple[int, int]) -> None:
        self.kernel, self.script, self.count, self.arena = kernel, script, 0, arena

    def ops(self, names: Sequence[str], walk_lock: int = 0) -> MmWalkOps:
        """A struct mm_walk_ops with these callbacks."""
        return MmWalkOps(**{name: getattr(self, f"_{name}", self._plain(name)) for name in names}, walk_lock=walk_lock)

    def fn(self, pte: int, addr: int) -> int:
        """The function of apply_to_page_range()."""
        return self._react("fn", (pte, addr), None).value

    def _plain(self, name: str) -> Any:
        def callback(*args: Any) -> int:
            return self._react(name, args[:-1], args[-1]).value

        return callback

    def _install_pte(self, addr: int, next: int, walk: MmWalk) -> tuple[int, int]:
        reaction = self._react("install_pte", (addr, next), walk, entry=None)
        return reaction.value, reaction.store or 0

    def _pte_hole(self, addr: int, next: int, depth: int, walk: MmWalk) -> int:
        return self._react("pte_hole", (addr, next, depth & (1 << 32) - 1), walk).value

    def _react(self, name: str, args: tuple[int, ...], walk: MmWalk | None, entry: int | None = 0) -> Reaction:
        if self.count >= LIMIT:
            raise ScriptOver(f"more than {LIMIT} callbacks")
        reaction = self.script.get(self.count, NOTHING)
        self.count += 1
        kernel = self.kernel
        value = kernel.read(args[0]) if name in WITH_ENTRY else None
        kernel.events.append(Callback(name, args, value, int(walk.action) if walk else 0))
        stores = reaction.store is not None and entry is not None and name in WITH_ENTRY
        if stores and 0 <= args[0] - self.arena[0] < self.arena[1]:
            kernel.write(args[0], reaction.store or 0)
        if reaction.action is not None and walk:
            walk.action = Action(reaction.action)
        return reaction
