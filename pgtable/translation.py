"""Where an access goes: the result of a walk that meets no fault.

Sources: pseudocode EncodePAR, EncodePARAttrs, PASpace in CreateAddressDescriptor; Arm ARM D24.2 (PAR_EL1).
"""

from __future__ import annotations

from typing import NamedTuple

from pgtable.attributes import MemoryAttributes
from pgtable.descriptors import LAST_LEVEL, Format
from pgtable.registers import PAR_OK
from pgtable.spaces import PASpace


class Translation(NamedTuple):
    """Where an access goes. `word` and `level`: the leaf; level is None with the MMU off.

    `attr`: memory attributes as a MAIR byte. `sh`: effective shareability. `perms`: permission bits of every level
    (permissions.py), before PAN. `ns`: the output address is Non-secure; of EL3 with FEAT_RME, NS of its space's
    {NSE, NS}. `space`: the space that it is in; None without FEAT_RME.
    """

    pa: int
    level: int | None
    word: int
    attr: int
    sh: int
    perms: int
    nG: bool
    ns: bool
    space: PASpace | None = None

    @property
    def attributes(self) -> MemoryAttributes:
        """`attr` decoded: type, inner and outer cacheability, tagged, XS."""
        return MemoryAttributes.of(self.attr)

    @property
    def guarded(self) -> bool:
        """A guarded page: branches into it must land on BTI (FEAT_BTI). The bit is the same in every 64-bit format."""
        return bool(self.word & _GP)

    def par(self) -> int:
        """PAR_EL1 after an AT instruction (pseudocode EncodePAR): PA at 4K resolution, attributes, shareability."""
        pa = self.pa & PAR_OK["PA"].value_mask
        nse = 1 if self.space is None else self.space.nse
        return PAR_OK.pack(SH=self.sh, NS=int(self.ns), NSE=nse, PA=pa, ATTR=self.attr)


_GP = Format().leaf(LAST_LEVEL)["GP"].mask
