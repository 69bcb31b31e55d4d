"""What a CPU implements of the translation system, and the choices that the architecture leaves to it."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Features:
    """What a CPU implements, and its choices where the architecture leaves one.

    `pa_bits`: 32 to 52, or 56 (FEAT_D128; 64-bit descriptors stop at 52). `hafdbs`: 0 none, 1 access flag, 2 also dirty
    state. `pan`: 0 none, 3 with EPAN. `bbm`: 0..2. `txsz_faults`: TxSZ out of range faults (else it is clamped).
    `contiguous_output`: output address bits inside a contiguous run come from the VA (a run whose entries are
    programmed as they must be gives the same PA). `contiguous_faults`, `nt_faults`: a run larger than the input range,
    or nT = 1, gives a translation fault. `at_updates`: AT instructions set AF.
    `rme`: granule protection and the Root and Realm states; `rme_secure`: beside them a Secure state (FEAT_SEL2);
    `gpc2`: FEAT_RME_GPC2.

    `d128`: 128-bit descriptors; `lva3`: 56-bit VAs with them; `the`: stage 2's TopLevel checks, for them; `mec`: memory
    encryption contexts, likewise. No CPU below has any of the four (docs/d128.md): they are not judged.
    """

    name: str = "max"
    pa_bits: int = 52
    granules: frozenset[str] = frozenset({"4K", "16K", "64K"})
    ttst: bool = True
    lva: bool = True
    lpa2: bool = True
    hafdbs: int = 2
    hpds: bool = True
    pan: int = 3
    uao: bool = True
    e0pd: bool = True
    pauth: bool = True
    bbm: int = 2
    tcr2: bool = True
    pie: bool = True
    poe: bool = True
    s2pie: bool = True
    s2poe: bool = True
    aie: bool = True
    haft: bool = True
    d128: bool = False
    lva3: bool = False
    asid2: bool = True
    the: bool = False
    mec: bool = False
    txsz_faults: bool = True
    contiguous_output: bool = False
    contiguous_faults: bool = False
    nt_faults: bool = False
    at_updates: bool = False
    rme: bool = False
    rme_secure: bool = True
    gpc2: bool = False

    def replace(self, **changes: object) -> Features:
        """The same CPU with some features changed."""
        return replace(self, **changes)  # type: ignore[arg-type]


_OLD = Features(
    ttst=False,
    lva=False,
    lpa2=False,
    e0pd=False,
    bbm=0,
    tcr2=False,
    pie=False,
    poe=False,
    s2pie=False,
    s2poe=False,
    aie=False,
    haft=False,
    asid2=False,
)
_4K_64K = frozenset({"4K", "64K"})
CPUS: dict[str, Features] = {
    cpu.name: cpu
    for cpu in (
        Features(),
        Features(name="max,lpa2=off", lpa2=False),
        Features(name="max,x-rme=on", rme=True, gpc2=True),
        _OLD.replace(name="neoverse-n1", pa_bits=48, pan=2),
        _OLD.replace(name="neoverse-v1", pa_bits=48, pan=2),
        _OLD.replace(
            name="cortex-a57", pa_bits=44, granules=_4K_64K, hafdbs=0, hpds=False, pan=0, uao=False, pauth=False
        ),
        _OLD.replace(
            name="cortex-a72", pa_bits=44, granules=_4K_64K, hafdbs=0, hpds=False, pan=0, uao=False, pauth=False
        ),
        _OLD.replace(name="cortex-a76", pa_bits=40, pan=2, pauth=False),
        _OLD.replace(name="cortex-a710", pa_bits=40, pan=2, ttst=True, e0pd=True),
        # Unicorn 2.1.4's UC_CPU_ARM64_MAX: what its ID registers say (docs/judges.md has what its walker does).
        _OLD.replace(name="unicorn", pa_bits=44, hafdbs=0, hpds=True, pan=2, txsz_faults=False),
    )
}
"""CPUs by name, as QEMU calls them; "max" has everything that QEMU models. Another: `CPUS["max"].replace(...)`."""
