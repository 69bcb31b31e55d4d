"""Physical address spaces (FEAT_RME): whose memory an address is in, for each security state and each leaf.

Rules of this file:
- A space's value is {NSE, NS}, as SCR_EL3, PAR_EL1, MFAR_EL3 and a leaf of EL3 have it.
- What a leaf says is a table by the state that walks: the bits that are read, and what they mean.
Sources: pseudocode SecurityStateAtEL, S1NextWalkStateLeaf, S1DirectBasePermissions (execution outside the own space).
"""

from __future__ import annotations

from enum import Enum
from typing import Any

from pgtable.bits import W, bits
from pgtable.controls import SCR_EL3
from pgtable.features import Features

LEAF_NS = bits("NS", 5, doc="with NSE, the output address space")
LEAF_NSE = bits("NSE", 11, doc="EL3 with FEAT_RME: with NS, the output address space (nG elsewhere)")

AMEC = bits("AMEC", 63, doc="Realm state (FEAT_MEC): alternate encryption context")


class PASpace(Enum):
    """A physical address space; the value is {NSE, NS}."""

    SECURE = 0b00
    NONSECURE = 0b01
    ROOT = 0b10
    REALM = 0b11

    @property
    def nse(self) -> int:
        """NSE, as PAR_EL1 and MFAR_EL3 report it."""
        return self.value >> 1

    @property
    def ns(self) -> int:
        """NS, as PAR_EL1 and MFAR_EL3 report it."""
        return self.value & 1

    def __str__(self) -> str:
        return _NAMES[self]


_NAMES = {
    PASpace.SECURE: "Secure",
    PASpace.NONSECURE: "Non-secure",
    PASpace.ROOT: "Root",
    PASpace.REALM: "Realm",
}


def state_space(features: Features, scr: int, el: int) -> PASpace | None:
    """The own space of the security state at exception level `el`; None without FEAT_RME.

    Raises ValueError for the reserved SCR_EL3.{NSE, NS} = {1, 0} below EL3. Source: pseudocode SecurityStateAtEL.
    """
    if not features.rme:
        return None
    if el == 3:
        return PASpace.ROOT
    if not features.rme_secure and not SCR_EL3["NSE"].get(scr):
        return PASpace.NONSECURE
    space = PASpace(SCR_EL3["NSE"].get(scr) << 1 | SCR_EL3["NS"].get(scr))
    if space is PASpace.ROOT:
        raise ValueError(f"SCR_EL3={scr:#x}: {{NSE, NS}} = {{1, 0}} is reserved, it is no state of a level below EL3")
    return space


def leaf_space(state: PASpace, alone: bool, secure: bool, word: int) -> PASpace:
    """The space that a stage 1 leaf of `state` outputs to. `alone`: the regime is EL2's or EL3's, not EL1&0.

    `secure`: there is a Secure space (FEAT_SEL2). Source: pseudocode S1NextWalkStateLeaf.
    """
    ns = LEAF_NS.get(word)
    if state is PASpace.ROOT:
        space = PASpace(LEAF_NSE.get(word) << 1 | ns)
        return PASpace.NONSECURE if space is PASpace.SECURE and not secure else space
    if state is PASpace.SECURE:
        return PASpace.NONSECURE if ns else PASpace.SECURE
    if state is PASpace.REALM and alone and ns:
        return PASpace.NONSECURE
    return state


def outside(state: PASpace, alone: bool, word: W) -> Any:
    """1 where a leaf is outside the only space that `state` may execute from: Root's, and a Realm's at EL2; else 0.

    `word`: an int, or a uint64 array of any shape. A Realm's EL1&0 is limited by stage 2, Secure state by SCR_EL3.SIF.
    """
    ns: Any = LEAF_NS.get(word)
    if state is PASpace.ROOT:
        return 1 ^ (LEAF_NSE.get(word) & (1 ^ ns))
    return ns if state is PASpace.REALM and alone else 0
