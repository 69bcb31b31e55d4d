"""PSTATE as an exception saves it. Source: Arm ARM, SPSR_EL1 (exception taken from AArch64 state)."""

from __future__ import annotations

from pgtable.bits import Layout, bits, res0

PSTATE = Layout(
    "SPSR_EL1",
    (
        bits("SP", 0, doc="SP_ELx, not SP_EL0"),
        res0(1),
        bits("EL", 3, 2, "exception level"),
        bits("nRW", 4, doc="AArch32"),
        res0(5),
        bits("DAIF", 9, 6, "masked exceptions"),
        bits("BTYPE", 11, 10, "kind of the branch that led here"),
        bits("SSBS", 12, doc="speculative store bypass is safe"),
        bits("ALLINT", 13, doc="all interrupts masked"),
        res0(19, 14),
        bits("IL", 20, doc="illegal execution state"),
        bits("SS", 21, doc="software step"),
        bits("PAN", 22, doc="privileged access never"),
        bits("UAO", 23, doc="user access override"),
        bits("DIT", 24, doc="data independent timing"),
        bits("TCO", 25, doc="tag checks off"),
        res0(27, 26),
        bits("NZCV", 31, 28, "condition flags"),
        res0(63, 32),
    ),
)
