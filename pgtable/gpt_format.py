"""Granule protection (FEAT_RME) as layouts: GPCCR_EL3, GPTBR_EL3, MFAR_EL3, and the entries of both table levels.

Rules of this file:
- An entry's low four bits say what it is, so that each sort has a layout of its own.
Sources: pseudocode GPCCR_EL3_Type, GPTWalk, DecodeGPTBlock, DecodeGPTTable, DecodeGPTContiguous, DecodeGPTGranules;
Arm ARM D9.4. The fields of FEAT_RME_GPC2 and later have the Arm ARM's names.
"""

from __future__ import annotations

from pgtable.bits import Layout, address, bits, res0

PPS_BITS = {0: 32, 1: 36, 2: 40, 3: 42, 4: 44, 5: 48, 6: 52}
PGS_SHIFT = {0: 12, 1: 16, 2: 14}
L0_SHIFT = {0b0000: 30, 0b0100: 34, 0b0110: 36, 0b1001: 39}
CONTIGUOUS_SHIFT = {1: 21, 2: 25, 3: 29}

_PPS = {n: f"{size} bits" for n, size in PPS_BITS.items()} | {7: "reserved"}
_PGS = {0: "4K", 1: "64K", 2: "16K", 3: "reserved"}
_L0 = {0b0000: "1 GiB", 0b0100: "16 GiB", 0b0110: "64 GiB", 0b1001: "512 GiB"}
_L0 = {n: _L0.get(n, "reserved") for n in range(16)}
_SH = {0: "non-shareable", 1: "reserved", 2: "outer shareable", 3: "inner shareable"}
_CACHE = {
    0: "non-cacheable",
    1: "write-back write-allocate",
    2: "write-through",
    3: "write-back no write-allocate",
}
GPI = {
    0b0000: "no access",
    0b0100: "System Agent (FEAT_RME_GDI)",
    0b0101: "Non-secure Protected (FEAT_RME_GDI)",
    0b0110: "NA6 (FEAT_RME_GDI)",
    0b0111: "NA7 (FEAT_RME_GDI)",
    0b1000: "Secure",
    0b1001: "Non-secure",
    0b1010: "Root",
    0b1011: "Realm",
    0b1101: "Non-secure Only (FEAT_RME_GPC2)",
    0b1111: "every space",
}
GPI = {n: GPI.get(n, "reserved") for n in range(16)}

GPCCR_EL3 = Layout(
    "GPCCR_EL3",
    (
        bits("PPS", 2, 0, "protected physical address size", _PPS),
        bits("PPS3", 3, doc="PPS[3] (56-bit addresses)"),
        res0(4),
        bits("RLPAD", 5, doc="no access to the Realm space (FEAT_RME_GPC2)"),
        bits("NSPAD", 6, doc="no access to the Non-secure space (FEAT_RME_GPC2)"),
        bits("SPAD", 7, doc="no access to the Secure space (FEAT_RME_GPC2)"),
        bits("IRGN", 9, 8, "inner cacheability of GPT reads", _CACHE),
        bits("ORGN", 11, 10, "outer cacheability of GPT reads", _CACHE),
        bits("SH", 13, 12, "shareability of GPT reads", _SH),
        bits("PGS", 15, 14, "granule size", _PGS),
        bits("GPC", 16, doc="granule protection checks on"),
        bits("GPCP", 17, doc="reads of stage 2 tables need not fault"),
        bits("TBGPCD", 18, doc="no checks of the trace buffer (FEAT_RME_GPC2)"),
        bits("NSO", 19, doc="GPI 0b1101 is Non-secure Only (FEAT_RME_GPC2)"),
        bits("L0GPTSZ", 23, 20, "what an entry of level 0 covers; read-only", _L0),
        bits("APPSAA", 24, doc="addresses above PPS are accessible to every space (FEAT_RME_GPC2)"),
        bits("SA", 25, doc="GPI 0b0100 is System Agent (FEAT_RME_GDI)"),
        bits("NSP", 26, doc="GPI 0b0101 is Non-secure Protected (FEAT_RME_GDI)"),
        bits("NA6", 27, doc="GPI 0b0110 is no access, Device only (FEAT_RME_GDI)"),
        res0(28),
        bits("GPCBW", 29, doc="bypass window on (FEAT_RME_GPC3)"),
        res0(63, 30),
    ),
)
GPTBR_EL3 = Layout(
    "GPTBR_EL3",
    (
        bits("BADDR", 39, 0, "bits [51:12] of the level 0 table's address; those below its size count as 0"),
        res0(63, 40),
    ),
)
MFAR_EL3 = Layout(
    "MFAR_EL3",
    (
        res0(11, 0),
        address("FPA", (55, 12), doc="faulting physical address"),
        res0(61, 56),
        bits("NSE", 62, doc="of the space", values=dict.fromkeys((0, 1), "with NS, the physical address space")),
        bits("NS", 63, doc="of the space", values=dict.fromkeys((0, 1), "with NSE, the physical address space")),
    ),
)

BLOCK, TABLE, CONTIGUOUS = 0b0001, 0b0011, 0b0001
"""Bits [3:0] of an entry: of level 0 a block or a table, of level 1 a contiguous one; else level 1 has granules."""
SORT = bits("SORT", 3, 0, "what the entry is")
L0_BLOCK = Layout(
    "GPT level 0 block", (SORT, bits("GPI", 7, 4, "who may access everything that it covers", GPI), res0(63, 8))
)
L0_TABLE = Layout("GPT level 0 table", (SORT, res0(11, 4), address("TA", (51, 12), doc="level 1 table"), res0(63, 52)))
_CONTIG = {0: "reserved", 1: "2 MiB", 2: "32 MiB", 3: "512 MiB"}
L1_CONTIGUOUS = Layout(
    "GPT level 1 contiguous",
    (
        SORT,
        bits("GPI", 7, 4, "who may access everything that it covers", GPI),
        bits("Contig", 9, 8, "size of the run of equal entries", _CONTIG),
        res0(63, 10),
    ),
)
L1_GRANULES = Layout(
    "GPT level 1 granules", tuple(bits(f"GPI{i}", 4 * i + 3, 4 * i, f"granule {i}", GPI) for i in range(16))
)
GRANULES = 16  # in a level 1 entry
