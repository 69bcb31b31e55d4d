"""ptdump_walk() and ptdump_check_wx(), run for real, against what kernel_model.ptdump says: texts byte for byte.

Rules of this file:
- `init_mm.pgd` is pointed at a tree that the MMU does not use: the walk is software, so any tree is harmless.
- A tree is made once and copied to the same PA in the model's memory and in the machine's; the prediction is made
  on the model's, before the kernel runs. The tree as it is afterwards is compared too (bad entries are cleared).
- Only texts that agreed count as reached: `Reach` says what a campaign has not seen, since a word that no text had
  was not judged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, NamedTuple

from emu import coldboot
from emu.checks.ptdump_trees import Case, directed_cases, random_case
from emu.image import KernelImage
from emu.linux_dump import marker_table
from kernel_model import ptdump
from kernel_model.compare import RUNAWAY
from kernel_model.levels import U64, Fold, Levels
from kernel_model.mm import Kernel, Runaway, Write
from kernel_model.names import Bits
from kernel_model.ptdump import Insecure, WxCount
from kernel_model.ptdump_text import (
    AddrMarker,
    Line,
    address_markers,
    fixaddr_top,
    folded_to_pgd,
    level_name,
    page_offset,
    pte_bits,
    text,
)
from kernel_model.variants import detect
from pgtable import CPUS
from pgtable.build import TableBuilder

if TYPE_CHECKING:
    from emu.machine import CallResult, Machine

MIB = 1 << 20
TREE_POOL = 64 * MIB  # bytes for the tables of a tree
BUFFER = 8 * MIB  # bytes for a text
AREA = 0x20000  # bytes for the structures that are handed over
SCRATCH = MIB  # from them to the text
TIMEOUT = 120.0  # seconds that a dump may take

ENDLESS, CLEARED = "a run of PTEs that never fits", "a bad entry cleared"

# The messages of the two WARN_ONCEs, by the function that has them.
MESSAGES = {"non-UXN mapping at": "note_prot_uxn", "W+X mapping at": "note_prot_wx"}


class Dump(NamedTuple):
    """What a case gave: the text, the W^X check (None where it was not made), the tree's words.

    `stop`: why it did not end, RUNAWAY where it never does; the text is then what was written until there.
    """

    text: str
    wx: WxCount | None
    tree: bytes
    stop: str = ""


class Prediction(NamedTuple):
    """The model's dump, the notes that its text was made of, and whether the walk cleared a bad entry.

    `blocks`: where the dump is to have no end, basic blocks that are more than it has before it loops; else None.
    """

    dump: Dump
    notes: Sequence[Line | AddrMarker]
    clears: bool
    blocks: int | None = None


@dataclass(frozen=True)
class PtdumpReport:
    """A finished campaign: `cases` dumped, `events` lines compared, what differs, and what no text had."""

    kernel: str
    release: str
    cases: int
    events: int
    differences: list[str]
    unreached: list[str]


@dataclass
class Reach:
    """What the compared texts held: attribute words by level, holes, markers, verdicts of the W^X check."""

    kernel: Kernel
    seen: set[str] = field(default_factory=set)

    def add(self, prediction: Prediction) -> None:
        """Notes what a text that agreed had in it."""
        rows, dump = pte_bits(self.kernel.bits), prediction.dump
        self.seen.update(
            word for word, is_so in ((ENDLESS, dump.stop == RUNAWAY), (CLEARED, prediction.clears)) if is_so
        )
        for note in prediction.notes:
            if isinstance(note, AddrMarker):
                self.seen.add(f"marker {note.name}")
            elif note.level >= 0 and not note.prot:
                self.seen.add(f"{self._name(note.level)} hole")
            elif note.level >= 0:
                chosen = ((row, note.prot & row.mask == row.val) for row in rows)
                self.seen.update(f"{self._name(note.level)} {row.set if on else row.clear!r}" for row, on in chosen)
        if dump.wx:
            verdicts = {"wx passed": dump.wx.passed, "wx found": bool(dump.wx.wx), "uxn found": bool(dump.wx.uxn)}
            self.seen.update(name for name, is_so in verdicts.items() if is_so)

    def _name(self, level: int) -> str:
        return level_name(self.kernel.levels, self.kernel.variant, level)

    def wanted(self, markers: Sequence[AddrMarker]) -> set[str]:
        """All that this kernel's texts can hold, with `markers`."""
        kernel, levels = self.kernel, self.kernel.levels
        leaves = {2: 0 if folded_to_pgd(levels, kernel.variant, 2) else 2, 3: 3, 4: 4}
        names = [self._name(level) for level in leaves.values()]
        words = [w for row in pte_bits(kernel.bits) for w in (row.set, row.clear) if w is not None]
        holes = {"PGD hole", *(f"{name} hole" for name in names)}
        wanted = {f"{name} {word!r}" for name in names for word in words} | holes
        top = [row for row in (levels.pgd, levels.p4d) if levels.top_is_none_tested(row.name)]
        if any(row.fold is not Fold.COMPILE for row in top):
            wanted.add(CLEARED)
        if kernel.variant.ptdump_lockless and kernel.variant.contpte:
            wanted.add(ENDLESS)
        return wanted | {f"marker {m.name}" for m in markers[:-1]} | {"wx passed", "wx found", "uxn found"}


class Bench:
    """One kernel on both sides: the model over its own memory, and a cold machine."""

    def __init__(self, image: KernelImage, *, va_bits: int | None = None) -> None:
        self.mmu = "model" if (va_bits or 0) > 48 else "cpu"  # Unicorn's own has neither LPA2 nor LVA
        features = CPUS["max"] if self.mmu == "model" else coldboot.UNICORN
        made = coldboot.template(image, va_bits=va_bits, features=features).thaw()
        layout = image.layout
        self.image, self.plan, self.fmt = image, made.plan, made.tables.fmt
        self.cold_root = made.tables.root
        self.memory = made.memory
        self.levels = Levels(layout.page_shift, layout.levels, layout.va_bits, made.plan.va_bits)
        self.bits = Bits.of(self.fmt, detect(image.symbols, image.btf.has))
        self.free = -(-(self.plan.image_pa + image.size) // (2 * MIB)) * 2 * MIB
        self.pool = (self.free + SCRATCH + BUFFER, TREE_POOL)
        self.machine = self._boot()
        self.state = self.machine.save()
        self.marker_table = marker_table(image)
        self.own_markers = self._read_markers()
        self.markers = address_markers(self.levels, self.bits.variant, self._fixmap_start())
        self._printed: list[tuple[str, int, int]] = []

    def _boot(self) -> Machine:
        from emu.machine import Machine

        machine = Machine.boot(self.image, va_bits=self.plan.va_bits, mmu=self.mmu)
        machine.stub("_printk", self._print)
        machine.stub("__warn_printk", self._print)
        machine.call("ptdump_init").ok()  # fills the masks of the levels, and the markers
        return machine

    def _print(self, machine: Machine) -> int:
        self._printed.append((string(machine, machine.argument(0)), machine.argument(1), machine.argument(2)))
        return 0

    # markers

    def _read_markers(self) -> tuple[AddrMarker, ...]:
        """The kernel's own table as ptdump_init() left it, () without one."""
        at = self.marker_table
        rows: list[AddrMarker] = []
        while at and (not rows or rows[-1].start_address != U64):
            name = self.machine.word_at(at + self._offset("addr_marker", "name"), 8)
            start = self.machine.word_at(at + self._offset("addr_marker", "start_address"), 8)
            rows.append(AddrMarker(start, string(self.machine, name) if name else ""))
            at += self.image.btf.size("addr_marker")
        return tuple(rows)

    def _fixmap_start(self) -> int:
        """From the kernel's table, which is the only one that says; else ours."""
        ours = fixaddr_top(self.levels, self.bits.variant) - 4 * MIB
        return next((m.start_address for m in self.own_markers if m.name == "Fixmap start"), ours)

    def _offset(self, struct: str, member: str) -> int:
        return self.image.btf.offset(struct, member)

    # the two sides

    def kernel(self, root: int) -> Kernel:
        """The model's kernel, whose init_mm.pgd is `root`."""
        return Kernel(self.memory, root, self.levels, self.bits)

    def tree(self, case: Case) -> tuple[int, tuple[int, int]]:
        """Makes a case's tree in both memories: its root's PA, and (PA, bytes) of its tables."""
        self.machine.restore(self.state)
        tables = TableBuilder(
            self.memory, self.pool, fmt=self.fmt, va_bits=self.plan.va_bits, upper=case.upper, UXNTable=1
        )
        case.prepare(tables)
        self.machine.memory.write(tables.used[0], self.memory.read(*tables.used))
        return tables.root, tables.used

    def cold_tree(self) -> tuple[int, tuple[int, int]]:
        """The machine's own tables, copied to the model's memory."""
        self.machine.restore(self.state)
        for pool in (self.plan.pool, self.plan.struct_pool):
            self.memory.write(pool[0], self.machine.memory.read(*pool))
        return self.cold_root, self.plan.pool

    def predict(self, case: Case, root: int, used: tuple[int, int]) -> Prediction:
        """What the model says."""
        kernel = self.kernel(root)
        st = ptdump.ptdump_state(kernel, case.markers or self.markers, base=case.base)
        wx, stop = None, ""
        try:
            ptdump.ptdump_walk_pgd(st, case.base, st.end_address)
            wx = ptdump.check_wx(kernel) if case.upper else None
        except Runaway:
            stop = RUNAWAY
        said = text(st.notes, self.bits, self.levels)
        clears = any(isinstance(event, Write) for event in kernel.events)
        blocks = blocks_of(kernel, st.notes) if stop else None
        return Prediction(Dump(said, wx, self.memory.read(*used), stop), st.notes, clears, blocks)

    def real(self, case: Case, root: int, used: tuple[int, int], *, blocks: int | None = None) -> Dump:
        """What the compiled kernel does; `blocks`: the basic blocks it gets, where it is to run away."""
        machine, init_mm = self.machine, self.machine.symbol("init_mm")
        linear_root = self.plan.linear_va(root)
        mm = init_mm if case.upper else self._va(0x4000)
        machine.write(mm + self._offset("mm_struct", "pgd"), linear_root.to_bytes(8, "little"))
        seq, info = self._hand_over(case, mm)
        walked = machine.call("ptdump_walk", seq, info, record="nothing", blocks=blocks, timeout=TIMEOUT)
        stop = stopped(walked)
        written = machine.word_at(seq + self._offset("seq_file", "count"), 8)
        if written >= BUFFER:
            return Dump("", None, b"", "the text does not fit")
        said, wx = machine.read(self._va(SCRATCH), written).decode("latin-1"), None
        if case.upper and not stop:
            wx, stop = self._real_wx(blocks)
        return Dump(said, wx, machine.memory.read(*used), stop)

    def _va(self, offset: int) -> int:
        return self.plan.linear_va(self.free + offset)

    def _hand_over(self, case: Case, mm: int) -> tuple[int, int]:
        """A seq_file and a ptdump_info in guest memory: their VAs."""
        markers = case.markers or self.marker_table or self.markers
        buffer = self._va(SCRATCH), BUFFER
        return hand_over(self.machine, self._va(0), buffer, mm=mm, base=case.base, markers=markers)

    def _real_wx(self, blocks: int | None) -> tuple[WxCount | None, str]:
        """ptdump_check_wx(), by what it prints, warns of, and returns where it does."""
        self._printed.clear()
        result = self.machine.call("ptdump_check_wx", record="nothing", blocks=blocks, timeout=TIMEOUT)
        if result.stop:
            return None, stopped(result)
        checked = next(said for said in self._printed if "Checked W+X" in said[0])
        counts = checked[1:] if "FAILED" in checked[0] else (0, 0)
        first = [Insecure(f, va) for said, va, _ in self._printed for key, f in MESSAGES.items() if key in said]
        return WxCount(*counts, tuple(first)), self._verdict(result, counts, len(first))

    def _verdict(self, result: CallResult, counts: Sequence[int], warnings: int) -> str:
        """Whether the check's own evidence agrees with itself: "" or what does not."""
        if len(result.warnings) != warnings:
            return f"{len(result.warnings)} WARNs for {warnings} messages"
        returns = "check_wx_show" in self.image.symbols  # its caller, which shows the verdict
        if returns and result.value & 1 != int(not any(counts)):
            return f"verdict {result.value & 1} for counts {counts}"
        return ""


def hand_over(
    machine: Machine, area: int, buffer: tuple[int, int], *, mm: int, base: int, markers: int | Sequence[AddrMarker]
) -> tuple[int, int]:
    """What ptdump_walk() takes, in the AREA bytes at the VA `area`: the VAs of a seq_file and of a ptdump_info.

    `buffer`: VA and bytes of the text. `markers`: the VA of a kernel's own table, or rows that are put there.
    """
    seq, info, table, names = area, area + 0x1000, area + 0x8000, area + 0x10000
    assert machine.image
    btf = machine.image.btf

    def store(va: int, struct: str, **members: int) -> None:
        for name, value in members.items():
            machine.write(va + btf.offset(struct, name), value.to_bytes(8, "little"))

    rows = () if isinstance(markers, int) else markers
    for i, marker in enumerate(rows):
        name = names + i * 64 if marker.name else 0
        machine.write(names + i * 64, marker.name.encode() + b"\0")
        row = table + i * btf.size("addr_marker")
        store(row, "addr_marker", start_address=marker.start_address, name=name)
    store(seq, "seq_file", buf=buffer[0], size=buffer[1], count=0)
    store(info, "ptdump_info", mm=mm, markers=markers if isinstance(markers, int) else table, base_addr=base)
    return seq, info


def blocks_of(kernel: Kernel, notes: Sequence[Line | AddrMarker]) -> int:
    """Basic blocks that are more than a dump takes which made these notes in the steps of `kernel`."""
    return 100_000 + 60 * kernel.steps + 5_000 * len(notes)


def stopped(result: CallResult) -> str:
    """Why a call did not end, "" if it did; RUNAWAY inside the loop that waits for a run of PTEs to fit."""
    if result.stop is None:
        return "".join(f"{warning}" for warning in result.warnings[:1])
    loops = result.stop.kind == "budget" and "contpte_ptep_get_lockless" in str(result.stop)
    return RUNAWAY if loops else str(result.stop)


def string(machine: Machine, va: int) -> str:
    """The C string at `va`."""
    data = bytearray()
    while not data or data[-1]:
        data += machine.read(va + len(data), 1)
    return data[:-1].decode("latin-1")


def cases(rng: Random, bench: Bench, count: int) -> Iterator[Case]:
    """`count` random trees for a kernel."""
    page, variant = bench.levels.page_size, bench.bits.variant
    for i in range(count):
        bad, torn = variant.bad_is_type, 0.1 if variant.ptdump_lockless else 0.3
        yield random_case(rng, f"tree {i}", bench.plan.va_bits, page, bench.markers, bad_tables=bad, torn=torn)


def run(image: KernelImage, cases: int, seed: int, *, va_bits: int | None = None) -> PtdumpReport:
    """The cold tables of `image`, some trees on purpose and `cases` random ones: dumped by both sides and compared.

    Args: `seed` of the random trees; `va_bits`: 64 - T1SZ, by default the smallest that the build runs with.
    """
    bench = Bench(image, va_bits=va_bits)
    reach = Reach(bench.kernel(bench.cold_root))
    differences = compare_markers(bench)
    done = lines = 0
    for case, (root, used) in trees(bench, cases, seed):
        predicted = bench.predict(case, root, used)
        real = bench.real(case, root, used, blocks=predicted.blocks)
        found = compare(case.name, predicted.dump, real)
        done, lines = done + 1, lines + real.text.count("\n")
        differences += found
        if not found:
            reach.add(predicted)
    unreached = sorted(reach.wanted(bench.markers) - reach.seen)
    return PtdumpReport(image.name, image.release, done, lines, differences, unreached)


def trees(bench: Bench, count: int, seed: int) -> Iterator[tuple[Case, tuple[int, tuple[int, int]]]]:
    """The cases of a campaign, each with its tree made: the root's PA, and (PA, bytes) of the tables."""
    cold = Case("the cold tables", page_offset(bench.plan.va_bits), lambda _: None)
    yield cold, bench.cold_tree()
    for case in (*directed_cases(cold.base, bench.markers), *cases(Random(seed), bench, count)):
        yield case, bench.tree(case)


def compare_markers(bench: Bench) -> list[str]:
    """The kernel's own marker table, where it has one, against the model's."""
    if not bench.own_markers or bench.own_markers == bench.markers:
        return []
    pairs = zip(bench.markers, bench.own_markers, strict=False)
    return [f"address_markers: predicted {a}, real {b}" for a, b in pairs if a != b] or ["address_markers: count"]


def compare(name: str, predicted: Dump, real: Dump) -> list[str]:
    """What differs, the first line of a text that does; [] when the prediction was right."""
    if predicted.stop != real.stop:
        return [f"{name}: predicted {predicted.stop or 'an end'}, real {real.stop or 'an end'}"]
    found = []
    if predicted.text != real.text:
        mine, theirs = predicted.text.split("\n"), real.text.split("\n")
        n = next((i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), min(len(mine), len(theirs)))
        a, b = (lines[n] if n < len(lines) else "" for lines in (mine, theirs))
        found.append(f"{name}: line {n}: predicted {a!r}, real {b!r}")
    if predicted.wx != real.wx:
        found.append(f"{name}: check_wx: predicted {predicted.wx}, real {real.wx}")
    if predicted.tree != real.tree:
        found.append(f"{name}: the tree afterwards differs")
    return found
