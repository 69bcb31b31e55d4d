"""What the processor asks of the MMU: an access, and the PSTATE bits that bear on it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from pgtable.permissions import PG, PR, PW, PX


class AccessType(Enum):
    """The kinds of access that permission checks tell apart (pseudocode AccessType)."""

    READ = "read"
    WRITE = "write"
    ATOMIC = "atomic"  # read and write: needs both
    FETCH = "fetch"
    GCS_READ = "guarded control stack read"
    GCS_WRITE = "guarded control stack write"
    CLEAN = "cache clean"  # DC C*, IC IVAU: needs read at EL0, nothing at a higher EL
    CLEAN_INVALIDATE = "cache clean and invalidate"  # DC CIVAC: with SCTLR.CMOW also write at EL0
    INVALIDATE = "cache invalidate"  # DC IVAC: needs write
    AT_READ = "AT read"
    AT_WRITE = "AT write"
    AT_ANY = "AT any"  # AT S1E1A: no permission is checked


@dataclass(frozen=True)
class Access:
    """One access by a PE at exception level `el`.

    `unprivileged`: LDTR/STTR, checked as EL0 unless `uao`. `pan`, `uao`: PSTATE bits; None takes them from the
    registers given to the walk. `aligned`: naturally aligned; an unaligned access to Device memory faults.
    """

    type: AccessType = AccessType.READ
    el: int = 1
    unprivileged: bool = False
    aligned: bool = True
    pan: bool | None = None
    uao: bool | None = None

    def __post_init__(self) -> None:
        if self.el not in (0, 1, 2, 3):
            raise ValueError(f"exception level {self.el}: must be 0, 1, 2 or 3")

    @classmethod
    def read(cls, el: int = 1, **pstate: bool) -> Access:
        """A load (also a table read by the guest)."""
        return cls(AccessType.READ, el, **pstate)

    @classmethod
    def write(cls, el: int = 1, **pstate: bool) -> Access:
        """A store."""
        return cls(AccessType.WRITE, el, **pstate)

    @classmethod
    def atomic(cls, el: int = 1, **pstate: bool) -> Access:
        """A read-modify-write instruction: both permissions are needed."""
        return cls(AccessType.ATOMIC, el, **pstate)

    @classmethod
    def fetch(cls, el: int = 1) -> Access:
        """An instruction fetch."""
        return cls(AccessType.FETCH, el)

    @property
    def writes(self) -> bool:
        """Changes memory, so that hardware may mark the page dirty."""
        return self.type in (AccessType.WRITE, AccessType.ATOMIC, AccessType.GCS_WRITE)

    @property
    def asks_write(self) -> bool:
        """A refusal counts as a write's, unless a read would have been refused too; nDirty is looked at."""
        return self.writes or self.type in (AccessType.AT_WRITE, AccessType.INVALIDATE)

    @property
    def is_gcs(self) -> bool:
        """To a guarded control stack: needs a page that is one, and is reported with ESR.GCS = 1."""
        return self.type in (AccessType.GCS_READ, AccessType.GCS_WRITE)

    @property
    def is_at(self) -> bool:
        """An address translation instruction: no data access follows."""
        return self.type in (AccessType.AT_READ, AccessType.AT_WRITE, AccessType.AT_ANY)

    @property
    def is_maintenance(self) -> bool:
        """AT or cache maintenance: reported with ESR.CM = 1 and WnR = 1."""
        return self.is_at or self.type in (AccessType.CLEAN, AccessType.CLEAN_INVALIDATE, AccessType.INVALIDATE)

    @property
    def pan_sensitive(self) -> bool:
        """PSTATE.PAN counts: data accesses, and AT S1E1RP, AT S1E1WP (which are made with `pan` given)."""
        if self.is_at:
            return self.pan is not None
        return self.type in (AccessType.READ, AccessType.WRITE, AccessType.ATOMIC)

    def needs(self, cmow: bool, unprivileged: bool) -> int:
        """The privileged permission bits that the access needs (pseudocode S1CheckPermissions)."""
        if self.type is AccessType.CLEAN_INVALIDATE and unprivileged and cmow:
            return PR | PW
        if self.type in (AccessType.CLEAN, AccessType.CLEAN_INVALIDATE) and not unprivileged:
            return 0
        return _NEEDS[self.type]

    def __str__(self) -> str:
        return f"EL{self.el} {'unprivileged ' if self.unprivileged else ''}{self.type.value}"


_NEEDS = {
    AccessType.READ: PR,
    AccessType.WRITE: PW,
    AccessType.ATOMIC: PR | PW,
    AccessType.FETCH: PX,
    AccessType.GCS_READ: PG,
    AccessType.GCS_WRITE: PG,
    AccessType.CLEAN: PR,
    AccessType.CLEAN_INVALIDATE: PR,
    AccessType.INVALIDATE: PW,
    AccessType.AT_READ: PR,
    AccessType.AT_WRITE: PW,
    AccessType.AT_ANY: 0,
}
