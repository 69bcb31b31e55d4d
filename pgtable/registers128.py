"""Registers in the forms that FEAT_D128 gives them, as layouts. **Not judged**.

Sources: pseudocode S1TTBaseAddress, S2TTBaseAddress (M.a.a), EncodePAR; Arm ARM M.a.a D24.2.
"""

from __future__ import annotations

from pgtable.bits import Layout, address, bits, res0
from pgtable.registers import PAR_FAULT, PAR_OK

_LOW = (
    bits("CnP", 0, doc="common, not private: other PEs share these tables' TLB entries"),
    bits("SKL", 2, 1, "levels that the first table skips: it grows by as many"),
    res0(4, 3),
)
# TTBR0_EL1, TTBR1_EL1, TTBR0_EL2, TTBR1_EL2, VTTBR_EL2: 128 bits, BADDR[55:48] in bits [87:80].
TTBR_128 = Layout(
    "TTBRn_ELx, 128-bit",
    (
        *_LOW,
        address("BADDR", (47, 5), high=(80, 8, 48), doc="table base address; bits below the table's size are 0"),
        bits("ASID", 63, 48, "address space identifier, or VMID"),
        res0(79, 64),
        res0(127, 88),
    ),
    width=128,
)
# TTBR0_EL3 has 64 bits and no ASID.
TTBR0_EL3_D128 = Layout(
    "TTBR0_EL3, D128",
    (*_LOW, address("BADDR", (55, 5), doc="table base address; bits below the table's size are 0"), res0(63, 56)),
)

_D128 = (bits("D128", 64, doc="PAR_EL1 has the 128-bit form"),)
PAR_OK_128 = Layout(
    "PAR_EL1 (F=0), 128-bit",
    (
        *(f for f in PAR_OK if f.name not in ("PA", "RES0_55_52")),
        *_D128,
        address("PA", high=(76, 44, 12), doc="output address"),
        res0(55, 12),
        res0(75, 65),
        res0(127, 120),
    ),
    width=128,
)
PAR_FAULT_128 = Layout("PAR_EL1 (F=1), 128-bit", (*PAR_FAULT, *_D128, res0(127, 65)), width=128)
