"""How a random case is drawn: its kind, the registers, the queries. What kinds there are is in cases.py.

Rules of this file:
- Only `random.Random` decides, so that a seed gives the same case everywhere.
- The bit numbers here aim the questions. They judge nothing: a wrong one makes a duller case, not a wrong verdict.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from random import Random

from emu.judge.corpus import DEFAULTS, HANDLER, HANDLER_VA, PA_BITS, PROGRAM_PAGE, RME_CPU, Case, Query
from emu.judge.trees import OUTER, Grower, Space, Style, Target

__all__ = ["ALL_GRANULES", "NO_FETCH", "Draw", "Kind", "granules_of", "mair_of"]

PLAIN = Style()


@dataclass(frozen=True)
class Kind:
    """What is special about a family of cases. `granules` are page shifts; two are drawn, one for each half."""

    granules: tuple[int, ...] = (12,)
    regime: str = "EL10"
    ps: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 5, 5, 6, 6)
    ds: bool = False
    hardware: tuple[str, ...] = ()
    style: Style = PLAIN
    pie: bool = False
    secure: bool = False
    off: bool = False
    tamper: bool = False
    access: bool = False
    edge: bool = False
    stage2: bool = False
    rme: bool = False
    no_ops: tuple[str, ...] = ()
    more_ops: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    """Registers and operations without which the kind cannot be asked."""
    traps: tuple[str, ...] = ()
    """Traps that the whole kind falls into."""

    @property
    def upper(self) -> bool:
        """Whether the regime has an upper half (and EL0)."""
        return self.regime in ("EL10", "EL20")


ALL_GRANULES = (12, 14, 16)
NO_FETCH = ("EX1", "EX0", "EX2")


def granules_of(kind: Kind, cpu: str) -> list[int]:
    """The granules of a kind that a CPU model has; none where the kind does not suit it."""
    if kind.rme != (cpu == RME_CPU) or (kind.stage2 and cpu not in ("max", RME_CPU)):
        return []
    return [shift for shift in kind.granules if shift != 14 or cpu not in NO_16K]


# ---- registers

TCR_HALVES: Mapping[str, tuple[int, int]] = {
    "T0SZ": (0, 6), "EPD0": (7, 1), "IRGN0": (8, 2), "ORGN0": (10, 2), "SH0": (12, 2), "TG0": (14, 2),
    "T1SZ": (16, 6), "A1": (22, 1), "EPD1": (23, 1), "IRGN1": (24, 2), "ORGN1": (26, 2), "SH1": (28, 2),
    "TG1": (30, 2), "PS": (32, 3), "AS": (36, 1), "TBI0": (37, 1), "TBI1": (38, 1), "HA": (39, 1), "HD": (40, 1),
    "HPD0": (41, 1), "HPD1": (42, 1), "HWU0": (43, 4), "HWU1": (47, 4), "TBID0": (51, 1), "TBID1": (52, 1),
    "E0PD0": (55, 1), "E0PD1": (56, 1), "TCMA0": (57, 1), "TCMA1": (58, 1), "DS": (59, 1),
}  # fmt: skip
"""TCR_EL1, and TCR_EL2 with E2H: (lowest bit, width) of the fields that cases set. PS is called IPS there."""
TCR_ONE: Mapping[str, tuple[int, int]] = {
    "T0SZ": (0, 6), "IRGN0": (8, 2), "ORGN0": (10, 2), "SH0": (12, 2), "TG0": (14, 2), "PS": (16, 3), "TBI0": (20, 1),
    "HA": (21, 1), "HD": (22, 1), "RES1_23": (23, 1), "HPD0": (24, 1), "HWU0": (25, 4), "TBID0": (29, 1),
    "TCMA0": (30, 1), "RES1_31": (31, 1), "DS": (32, 1),
}  # fmt: skip
"""TCR_EL2 without E2H, and TCR_EL3."""
TG = ({12: 0, 16: 1, 14: 2}, {12: 2, 14: 1, 16: 3})
PS_BITS = (32, 36, 40, 42, 44, 48, 52)
OFTEN: Mapping[str, float] = {"EPD": 0.04, "TBI": 0.5, "TBID": 0.4, "HPD": 0.2, "E0PD": 0.15, "TCMA": 0.5}
"""How often a one-bit field of a half is set."""
SCTLR_M, SCTLR_C, SCTLR_I, SCTLR_WXN, SCTLR_EE, SCTLR_EPAN = 1, 1 << 2, 1 << 12, 1 << 19, 1 << 25, 1 << 57
TAMPERED_SCTLR = (SCTLR_C, SCTLR_WXN, SCTLR_EE)
HCR_E2H_TGE_RW = 1 << 34 | 1 << 27 | 1 << 31
SCR_NS = 1
NSE = 1 << 11  # with NS = 0, in a leaf of EL3: Root
TCR2_PIE, TCR2_AIE = 1 << 1, 1 << 4
MAIR_BYTES = (0x00, 0x04, 0x08, 0x0C, 0x11, 0x33, 0x44, 0x4F, 0x77, 0x7F, 0x88, 0xAA, 0xBB, 0xEE, 0xF4, 0xFF)
NAMES: Mapping[str, str] = {"EL10": "EL1", "EL20": "EL2", "EL2": "EL2", "EL3": "EL3"}
SCTLR_BASE = {"EL10": 0x30D0_0800, "EL20": 0x30D0_0800, "EL2": 0x30C5_0830, "EL3": 0x30C5_0830}
HANDLER_TXSZ = 25

PRIVILEGED = ("S1E1R", "S1E1W", "S1E1RP", "S1E1WP")
USER = ("S1E0R", "S1E0W")
AT_OPS: Mapping[str, tuple[str, ...]] = {
    "EL10": (*PRIVILEGED, *USER) * 4 + ("S12E1R", "S12E1W", "S12E0R", "S12E0W"),
    "EL20": (*PRIVILEGED, *USER, "S1E2R", "S1E2W"),
    "EL2": ("S1E2R", "S1E2W"),
    "EL3": ("S1E3R", "S1E3W"),
}
"""What AT cases of a regime draw from."""
REAL_OPS: Mapping[str, tuple[str, ...]] = {
    "EL10": ("LD1", "ST1", "LDT", "STT", "LD0", "ST0", "EX1", "EX0"),
    "EL20": ("LD2", "ST2", "LDT2", "STT2", "LD0", "ST0", "EX2", "EX0"),
}
"""What access cases try at every address."""
NO_PAN2 = ("cortex-a57",)
NO_16K = ("cortex-a57",)
TTST = ("max", "cortex-a710")
"""CPU models that take TxSZ up to 48."""


class Draw:
    """One case in the making: every method draws a part of it."""

    def __init__(self, rng: Random, name: str, kind: Kind, cpu: str, avoid: frozenset[str]) -> None:
        self.rng, self.name, self.cpu, self.avoid = rng, name, cpu, avoid
        self.kind = kind
        self.model = cpu.partition(",")[0]
        self.lpa2 = cpu in ("max", RME_CPU)
        fits = [ps for ps, bits in enumerate(PS_BITS) if bits <= PA_BITS[cpu]]
        self.ps = rng.choice(kind.ps)
        self.effective_ps = min(self.ps, fits[-1])
        self.ds = kind.ds or (kind.granules == ALL_GRANULES and rng.random() < 0.25)
        self.half = rng.randrange(2) if kind.access else None
        self.el = NAMES[kind.regime]
        self.mair = [rng.choice(MAIR_BYTES) for _ in range(8)]
        self.grower = Grower(rng, cpu, self._style())

    def _style(self) -> Style:
        style = self.kind.style
        if "block level" in self.avoid and not style.raw:
            style = replace(style, illegal_blocks=False)
        if "sharing" in self.avoid:
            style = replace(style, sh=tuple(self._sh_of(byte) for byte in self.mair))
        return style

    def _sh_of(self, mair: int) -> int:
        return OUTER if mair >> 4 == 0 or mair == 0x44 else self.rng.choice((0, 2, 3))

    def case(self) -> Case:
        """The case."""
        kind, rng = self.kind, self.rng
        halves = (0, 1) if kind.upper else (0,)
        spaces = [self._space(half) for half in halves]
        regs = {**DEFAULTS, **self._registers(spaces)}
        regs |= {f"TTBR{half}_{self.el}": self._root(space) for half, space in zip(halves, spaces, strict=True)}
        mem = self.grower.mem
        if kind.tamper:
            self._tamper(regs)
        if not kind.access and regs[f"SCTLR_{self.el}"] & SCTLR_EE:
            mem = {pa: int.from_bytes(word.to_bytes(8, "little"), "big") for pa, word in mem.items()}
        return Case(
            id=f"r/{self.cpu}/{self.name}-{rng.getrandbits(32):08x}",
            kind=self.name,
            cpu=self.cpu,
            regs=regs,
            mem=mem,
            queries=self._queries(spaces),
            half=self.half,
            pan=rng.randrange(2) if kind.access else 0,
        )

    # ---- halves and their tables

    def _is_handler(self, half: int) -> bool:
        return self.half is not None and half != self.half

    def _space(self, half: int) -> Space:
        shift = 12 if self._is_handler(half) else self.rng.choice(granules_of(self.kind, self.cpu))
        ds = self.ds and self.lpa2 and shift != 16
        bits = min(PS_BITS[self.effective_ps], 52 if ds or shift == 16 else 48)
        txsz = HANDLER_TXSZ if self._is_handler(half) else self._txsz(shift, ds)
        return Space(bool(half), shift, txsz, self.effective_ps, bits, ds, self.cpu)

    def _txsz(self, shift: int, ds: bool) -> int:
        rng = self.rng
        lowest = 12 if self.model == "max" and (ds or shift == 16) else 16
        highest = (47 if shift == 16 else 48) if self.model in TTST else 39
        if self.kind.regime == "EL3":
            highest = 33  # the asking program's page is in the range
        if ds and rng.random() < 0.4:
            return rng.randint(lowest, 16)  # with 4K these begin at level -1
        return rng.choice((lowest, lowest, highest, 16, 25, *(rng.randint(lowest, highest) for _ in range(5))))

    def _root(self, space: Space) -> int:
        """A TTBR: where the root table is, and the tree under it."""
        rng, grower, asid = self.rng, self.grower, self.rng.getrandbits(16) << 48 if self.kind.upper else 0
        if self._is_handler(int(space.upper)):
            return HANDLER
        if self.kind.off:
            return 0
        size = max(space.root_alignment(), 64 if self.kind.tamper else 8)
        small = "small root" in self.avoid and 8 * space.entries(space.start) < 64
        root = grower.table(space, size, limit=50 if small else 52)
        if self.kind.regime == "EL3":
            grower.map_page(space, root, PROGRAM_PAGE, PROGRAM_PAGE, NSE if self.kind.rme else 0)
        grower.grow(space, root, 22 if self.kind.upper and self.half is None else 40)
        if self.kind.regime != "EL3" and rng.random() < 0.1:
            limit = 48 if "root beyond 48 bits" in self.avoid else space.field_bits
            far = space.out_bits < limit and rng.random() < 0.4
            root = grower.far(space, limit) if far else grower.hole(space)
        return space.ttbr(root) | asid | (rng.random() < 0.2)

    # ---- registers

    def _registers(self, spaces: list[Space]) -> dict[str, int]:
        rng, kind, el = self.rng, self.kind, self.el
        regs = {f"TCR_{el}": self._tcr(spaces), f"SCTLR_{el}": self._sctlr(), f"MAIR_{el}": mair_of(self.mair)}
        if kind.regime == "EL20":
            regs["HCR_EL2"] = HCR_E2H_TGE_RW
        if kind.secure:
            regs["SCR_EL3"] = DEFAULTS["SCR_EL3"] & ~SCR_NS
        if self.half is None and kind.upper and self.model not in NO_PAN2:
            regs["PAN"] = rng.randrange(2)
        if self.half is not None:
            regs[f"VBAR_{el}"] = HANDLER_VA[1 - self.half]
        if kind.pie:
            aie = rng.choice((0, 0, 0, TCR2_AIE))
            regs |= {"TCR2_EL1": TCR2_PIE | aie, "PIR_EL1": rng.getrandbits(64), "PIRE0_EL1": rng.getrandbits(64)}
            regs["MAIR2_EL1"] = mair_of(rng.choice(MAIR_BYTES) for _ in range(8))
        if kind.pie and kind.access:  # the asking program's pages have PIIndex 1: readable and executable
            regs |= {name: regs[name] & ~0xF0 | 0xA0 for name in ("PIR_EL1", "PIRE0_EL1")}
        return regs

    def _tcr(self, spaces: list[Space]) -> int:
        rng, kind = self.rng, self.kind
        values = {"PS": self.ps, "DS": self.ds, "A1": rng.randrange(2), "AS": rng.randrange(2)}
        values |= {"RES1_23": 1, "RES1_31": 1, **dict.fromkeys(kind.hardware, 1)}
        for half, space in enumerate(spaces):
            sh = OUTER if "sharing" in self.avoid else rng.choice((0, 2, 3))
            drawn = {"IRGN": rng.randrange(4), "ORGN": rng.randrange(4), "SH": sh, "HWU": rng.getrandbits(4)}
            drawn |= {name: rng.random() < often for name, often in OFTEN.items()}
            if self._is_handler(half):
                drawn = {}
            values |= {f"{name}{half}": int(value) for name, value in drawn.items()}
            values |= {f"T{half}SZ": space.txsz, f"TG{half}": TG[half][space.shift]}
        fields = TCR_HALVES if kind.upper else TCR_ONE
        return sum(values.get(name, 0) << low for name, (low, _) in fields.items())

    def _sctlr(self) -> int:
        rng, kind = self.rng, self.kind
        value = SCTLR_BASE[kind.regime]
        if kind.off:
            return value
        value |= SCTLR_M | SCTLR_C | SCTLR_I
        if rng.random() < 0.12:
            value |= SCTLR_WXN
        if kind.upper and "PAN3" not in self.avoid and rng.random() < 0.4:
            value |= SCTLR_EPAN
        if not kind.access and kind.regime != "EL3" and rng.random() < 0.08:
            value |= SCTLR_EE
        return value

    def _tamper(self, regs: dict[str, int]) -> None:
        """Change some bits of the registers that decide how tables are read."""
        for _ in range(self.rng.randint(1, 3)):
            if self.rng.random() < 0.8:
                regs[f"TCR_{self.el}"] ^= 1 << self.rng.randrange(60)
            else:
                regs[f"SCTLR_{self.el}"] ^= self.rng.choice(TAMPERED_SCTLR)

    # ---- queries

    def _queries(self, spaces: list[Space]) -> tuple[Query, ...]:
        rng, kind = self.rng, self.kind
        ops = (REAL_OPS if kind.access else AT_OPS)[kind.regime] + kind.more_ops
        ops = tuple(op for op in ops if self._asks(op))
        each = len(ops) if kind.access else min(4, len(ops))
        addresses = [va for space in spaces if not self._is_handler(int(space.upper)) for va in self._near(space)]
        addresses += [rng.getrandbits(64) for _ in range(2)]
        while len(addresses) < (32 if kind.access else 280 // each):
            target, space = self._target(spaces)
            addresses.append(self._aim(space, target))
        if self.half is not None:
            addresses = [va & ~(1 << 55) | self.half << 55 for va in addresses]
        rng.shuffle(addresses)
        return tuple((va, op) for va in addresses for op in (ops if kind.access else rng.sample(ops, each)))

    def _asks(self, op: str) -> bool:
        if op.endswith("P") and self.model in NO_PAN2:
            return False
        clean_pages = "HD" in self.kind.hardware and not self.kind.access and "W" in op
        return op not in self.kind.no_ops and not (clean_pages and "AT of a clean page" in self.avoid)

    def _near(self, space: Space) -> list[int]:
        """The first and the last address of a half, and the ones just outside."""
        size = 1 << space.va_bits
        offsets = (0, size - 1, size, -1)
        return [(space.canonical(0) + offset) % (1 << 64) for offset in self.rng.sample(offsets, 2)]

    def _target(self, spaces: list[Space]) -> tuple[Target, Space]:
        rng = self.rng
        if not self.grower.targets:  # the MMU is off: any address
            return Target(rng.getrandbits(rng.randint(20, 64)), 0), rng.choice(spaces)
        target = rng.choice(self.grower.targets)
        return target, spaces[target.va >> 55 & 1 if len(spaces) > 1 else 0]

    def _aim(self, space: Space, target: Target) -> int:
        """An address at a target, or a little beside it."""
        rng = self.rng
        va = target.va | rng.getrandbits(target.low) if target.low else target.va
        draw = rng.random()
        if draw < 0.12:
            va ^= rng.getrandbits(8) << 56
        elif draw < 0.19:
            va ^= 1 << rng.randrange(space.va_bits, 64)
        elif draw < 0.29:
            va += rng.choice((-1, 1)) << target.low
        return va % (1 << 64)


def mair_of(attributes: Iterable[int]) -> int:
    """MAIR_ELx of eight attribute bytes."""
    return int.from_bytes(bytes(attributes), "little")
