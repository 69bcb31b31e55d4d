"""The model MMU: TLB misses answered by our walk, judged by Unicorn's own MMU where it can.

The rest is judged by the Arm ARM: syndromes and addresses are literal values here.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable

import pytest

from emu import coldboot, engine, snippets
from emu.check import KernelSubject, linear_pages, run_case, stub_allocator
from emu.coldboot import BootError
from emu.machine import CallResult, Machine
from pgtable import CPUS, Granule
from pgtable.registers import PAR_OK, TCR2, TCR_EL1
from tests.kernels import KERNELS, kernel_image

# Guest programs: source (GNU as; `;` ends a line) and words. A program that may fault puts into X19 where to go on.
PROGRAMS = {
    "handler": (
        (
            "mrs x20, esr_el1; mrs x21, far_el1; mrs x22, elr_el1; mrs x23, spsr_el1; mrs x24, CurrentEL; "
            "mov x25, sp; adr x26, .; msr elr_el1, x19; eret"
        ),
        "d5385214 d5386015 d5384036 d5384017 d5384258 910003f9 1000001a d5184033 d69f03e0",
    ),
    "load": (
        "adr x19, 1f; cmp x0, x0; ldr x1, [x0]; 1: nop",
        "10000073 eb00001f f9400001 d503201f",
    ),
    "store": (
        "adr x19, 1f; str x1, [x0]; 1: nop",
        "10000053 f9000001 d503201f",
    ),
    "add": (
        "adr x19, 1f; mov x1, #1; ldadd x1, x2, [x0]; 1: nop",
        "10000073 d2800021 f8210002 d503201f",
    ),
    "ldtr": (
        "adr x19, 1f; ldtr x1, [x0]; 1: nop",
        "10000053 f8400801 d503201f",
    ),
    "sttr": (
        "adr x19, 1f; sttrh w1, [x0]; 1: nop",
        "10000053 78000801 d503201f",
    ),
    "zero": (
        "adr x19, 1f; dc zva, x0; 1: nop",
        "10000053 d50b7420 d503201f",
    ),
    "pair": (
        "adr x19, 1f; stp x1, x2, [x0]; 1: nop",
        "10000053 a9000801 d503201f",
    ),
    "jump": (
        "adr x19, 1f; br x0; 1: nop",
        "10000053 d61f0000 d503201f",
    ),
    "svc": (
        "adr x19, 1f; svc #0x1234; 1: mov x3, #7",
        "10000053 d4024681 d28000e3",
    ),
    "sp": (
        "adr x19, 1f; svc #0; 1: mov x3, sp",
        "10000053 d4000001 910003e3",
    ),
    "brk": (
        "adr x19, 1f; brk #0x567; 1: mov x3, #7",
        "10000053 d420ace0 d28000e3",
    ),
    "udf": (
        "adr x19, 1f; udf #9; 1: mov x3, #7",
        "10000053 00000009 d28000e3",
    ),
    "pan": (
        "adr x19, 1f; ldr x1, [x0]; msr pan, #1; ldr x2, [x0]; 1: mov x3, #7",
        "10000093 f9400001 d500419f f9400002 d28000e3",
    ),
    "pan ldtr": (
        "adr x19, 1f; msr pan, #1; ldtr x2, [x0]; ldr x2, [x0]; 1: mov x3, #7",
        "10000093 d500419f f8400802 f9400002 d28000e3",
    ),
    "both": (
        "ldr x1, [x0]; ldtr x2, [x0]; ldr x3, [x0]",
        "f9400001 f8400802 f9400003",
    ),
    "el1t": (
        "adr x19, 1f; msr spsel, #0; mov sp, x2; ldr x1, [x0]; 1: mov x3, sp; msr spsel, #1",
        "10000093 d50040bf 9100005f f9400001 910003e3 d50041bf",
    ),
    "stale": (
        (
            "ldr x3, [x0]; str xzr, [x1]; dsb ishst; isb; ldr x4, [x0]; lsr x5, x2, #12; tlbi vaale1is, x5; "
            "dsb ish; isb; ldr x6, [x0]"
        ),
        "f9400003 f900003f d5033a9f d5033fdf f9400004 d34cfc45 d50883e5 d5033b9f d5033fdf f9400006",
    ),
    "pir": (
        (
            "msr s3_0_c10_c2_3, x0; isb; mrs x1, s3_0_c10_c2_3; mrs x2, s3_0_c2_c0_3; msr s3_3_c10_c2_4, x3; "
            "mrs x4, s3_3_c10_c2_4"
        ),
        "d518a260 d5033fdf d538a261 d5382062 d51ba283 d53ba284",
    ),
    "range": (
        (
            "ldr x3, [x0]; str xzr, [x1]; dsb ishst; sys #0, c8, c2, #1, x2; sys #0, c8, c1, #1, x2; dsb ish; "
            "isb; ldr x6, [x0]"
        ),
        "f9400003 f900003f d5033a9f d5088222 d5088122 d5033b9f d5033fdf f9400006",
    ),
    "ats": (
        (
            "at s1e1r, x0; mrs x1, par_el1; at s1e1w, x0; mrs x2, par_el1; at s1e0r, x0; mrs x3, par_el1; "
            "at s1e0w, x0; mrs x4, par_el1; at s1e1rp, x0; mrs x5, par_el1; at s1e1wp, x0; mrs x6, par_el1; "
            "msr pan, #1; at s1e1rp, x0; mrs x7, par_el1"
        ),
        (
            "d5087800 d5387401 d5087820 d5387402 d5087840 d5387403 d5087860 d5387404 d5087900 d5387405 d5087920 "
            "d5387406 d500419f d5087900 d5387407"
        ),
    ),
    "at": (
        "adr x19, 1f; at s1e1w, x0; 1: mov x3, #7",
        "10000053 d5087820 d28000e3",
    ),
    "vbar": (
        "msr vbar_el1, x1; isb; adr x19, 1f; ldr x1, [x0]; 1: mov x3, #7",
        "d518c001 d5033fdf 10000053 f9400001 d28000e3",
    ),
    "back and forth": (
        "adr x19, 1f; ldr x1, [x0]; svc #0; 1: adr x19, 2f; ldr x1, [x0]; 2: mov x3, #7",
        "10000073 f9400001 d4000001 10000053 f9400001 d28000e3",
    ),
    "kernel load": (
        "ldr x10, [x0]; mrs x20, esr_el1; msr elr_el1, x19; eret",
        "f940000a d5385214 d5184033 d69f03e0",
    ),
    "ttbr": (
        "msr ttbr0_el1, x2; isb; ldr x1, [x0]",
        "d5182002 d5033fdf f9400001",
    ),
    "twice": (
        "ldr x1, [x0]; str x1, [x0]; ldr x1, [x0]; str x1, [x0]",
        "f9400001 f9000001 f9400001 f9000001",
    ),
    "tagged": (
        (
            "ldr x3, [x0]; str xzr, [x1]; dsb ishst; lsr x5, x2, #12; and x5, x5, #0xfffffffffff; "
            "tlbi vaale1is, x5; dsb ish; isb; ldr x6, [x0]"
        ),
        "f9400003 f900003f d5033a9f d34cfc45 9240aca5 d50883e5 d5033b9f d5033fdf f9400006",
    ),
}


def words(name: str) -> list[int]:
    return [int(word, 16) for word in " ".join(PROGRAMS[name][1].split()).split()]


@pytest.mark.skipif(shutil.which(snippets.ASSEMBLER) is None, reason=f"no {snippets.ASSEMBLER}")
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_words_are_what_the_assembler_makes_of_the_source(name: str) -> None:
    source = "\n".join(line.strip() for line in PROGRAMS[name][0].split(";")) + "\n"
    assert list(snippets.assemble(source).words) == words(name)


def page(m: Machine, n: int) -> int:
    """Page `n` of the window's spare ones: EL1 read/write."""
    return m.plan.spare + n * m.plan.page_size


VECTORS, DATA, GONE = 8, 2, 5  # spare pages: vectors; data; GONE is unmapped


def with_vectors(m: Machine, handler: str = "handler") -> Machine:
    """`handler` at every vector that is used, and VBAR_EL1 there."""
    base = page(m, VECTORS)
    m.tables.protect(base, m.plan.page_size, PXN=0)
    for offset in (0x000, 0x200, 0x400):
        m.write(base + offset, b"".join(word.to_bytes(4, "little") for word in words(handler)))
    m.set_register("VBAR_EL1", base)
    m.tables.unmap(page(m, GONE), m.plan.page_size)
    return m


@pytest.fixture
def model() -> Machine:
    return Machine.bare(mmu="model")


@pytest.fixture
def guest() -> Machine:
    """With a handler that reports in X20 to X26: ESR, FAR, ELR, SPSR, CurrentEL, SP, the handler's own place."""
    return with_vectors(Machine.bare(mmu="model"))


ESR, FAR, ELR, SPSR, EL, SP, VECTOR = range(20, 27)
EL1 = 1 << 2


def leaf_pa(m: Machine, va: int) -> int:
    return (m.user if va < 1 << 55 else m.tables).slot(va).pa


# the same as Unicorn's own MMU


def summary(result: CallResult) -> tuple[object, ...]:
    changes = [(c.va, c.level, c.pa, c.old, c.new) for c in result.changes]
    return result.value, changes, result.maintenance, str(result.stop), result.x


def both_ways(run: Callable[[Machine], CallResult]) -> None:
    cpu, model = run(Machine.bare()), run(Machine.bare(mmu="model", cpu="unicorn"))
    assert summary(cpu) == summary(model)


@pytest.mark.parametrize("el", [0, 1])
@pytest.mark.parametrize("name", ["load", "store", "misaligned", "fetch"])
def test_snippets_do_the_same_on_both(name: str, el: int) -> None:
    code = bytes(snippets.load(name))
    plan = Machine.bare().plan
    below = plan.stack - 16 * plan.page_size
    places = [plan.spare, plan.spare + 4088, plan.user_data, plan.user_data + 0x1FFC, plan.user_code, plan.code, 8]
    for va in (*places, below, below - 4, below - 8, (1 << 55) + 8, plan.linear - 8, plan.user_stack - 8):
        if name == "fetch" and va == (plan.code if el else plan.user_code):
            continue  # it calls itself for ever
        both_ways(lambda m, va=va: m.run(code, va, 0x1234, el=el))  # type: ignore[misc]


@pytest.mark.parametrize("name", ["load", "ldtr", "pair", "sttr", "add", "jump", "svc", "brk", "udf", "both", "twice"])
def test_programs_do_the_same_on_both(name: str) -> None:
    plan = Machine.bare().plan
    for el in (0, 1):
        for va in (plan.spare, plan.spare + 0xFFC, plan.user_data, plan.user_code, 0x10000):
            if name == "jump" and el == 0 and va == plan.user_code:
                continue  # a loop
            both_ways(lambda m, va=va, el=el: m.run(words(name), va, 5, el=el))  # type: ignore[misc]


def test_our_set_memory_valid_does_the_same_on_both() -> None:
    code = bytes(snippets.load("set_memory_valid"))
    for enable in (0, 1):
        both_ways(lambda m, on=enable: m.run(code, m.plan.linear + 0x800000, 5, on))  # type: ignore[misc]
    both_ways(lambda m: m.run(bytes(snippets.load("toggle_valid")), leaf_pa(m, page(m, 3)), 3, page(m, 3)))


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_set_memory_valid_does_the_same_on_both(name: str) -> None:
    image = kernel_image(name)
    cpu, model = Machine.boot(image), Machine.boot(image, mmu="model")
    for record, enable in (("changes", 0), ("changes", 1), ("order", 0), ("order", 1)):
        va = cpu.plan.linear_va(cpu.plan.ram[0] + cpu.plan.ram[1] // 2)
        results = [m.call("set_memory_valid", va, 4, enable, record=record).ok() for m in (cpu, model)]
        assert summary(results[0]) == summary(results[1])
        assert results[0].events == results[1].events
        assert len(results[1].changes) == 4


def test_random_tables_do_the_same_on_both(rng: random.Random) -> None:
    """One page's descriptor at random, without what Unicorn's MMU has not: AF updates, address sizes."""
    cpu, model = Machine.bare(), Machine.bare(mmu="model", cpu="unicorn")
    leaf = cpu.tables.fmt.leaf(3)
    for _ in range(60):
        bits = {name: rng.randrange(1 << len_) for name, len_ in (("AP", 2), ("PXN", 1), ("UXN", 1), ("AF", 1))}
        bits["VALID"] = rng.random() < 0.9
        name, el = rng.choice(["load", "store", "fetch"]), rng.randrange(2)
        results = []
        for m in (cpu, model):
            word = leaf.pack(m.memory.fetch(leaf_pa(m, m.plan.user_data)), TYPE=1, **bits)
            m.memory.store(leaf_pa(m, m.plan.user_data), word)
            m.memory.write(m.plan.user_data_pa, (0xD65F03C0).to_bytes(4, "little"))  # ret
            m.cpu.flush_code()
            results.append(summary(m.run(bytes(snippets.load(name)), m.plan.user_data, 1, el=el)))
        assert results[0] == results[1], (bits, name, el)


def test_address_translation_instructions_are_the_models(model: Machine) -> None:
    """PA, attribute and fault bits agree with Unicorn's own AT; the rest of PAR_EL1 is where it is loose."""
    cpu = Machine.bare()
    kept = PAR_OK.mask("F", "PA", "ATTR")
    for va in (page(cpu, 0) + 8, cpu.plan.user_data, cpu.plan.user_code, 8):
        theirs, ours = (m.run(words("ats"), va).ok().x[1:8] for m in (cpu, model))
        for a, b in zip(theirs, ours, strict=True):
            assert (a & 1, a & kept if not a & 1 else a) == (b & 1, b & kept if not b & 1 else b)
    found = model.run(words("ats"), model.plan.user_data).x
    assert [par & 1 for par in found[1:8]] == [0, 0, 0, 0, 0, 0, 1]  # the last with PAN
    assert found[7] >> 1 & 0x3F == 0x0F  # permission fault, level 3


# granules and sizes


@pytest.mark.parametrize("va_bits", [48, 52])
@pytest.mark.parametrize("granule", Granule)
def test_every_granule_and_both_sizes_run(granule: Granule, va_bits: int) -> None:
    m = Machine.bare(mmu="model", granule=granule, va_bits=va_bits)
    va = page(m, 1)
    m.run(bytes(snippets.load("store")), va - 4, 0x1122334455667788).ok()
    assert m.read(va - 4, 8) == (0x1122334455667788).to_bytes(8, "little")
    assert m.run(bytes(snippets.load("load")), va - 4).ok().value == 0x1122334455667788
    assert m.run(bytes(snippets.load("store")), m.plan.user_data, 7, el=0).ok()
    assert m.memory.fetch(m.plan.user_data_pa) == 7
    m.tables.unmap(va, m.plan.page_size)
    stop = m.run(bytes(snippets.load("load")), va - 4).stop
    assert stop
    assert stop.walk
    assert (stop.walk.va, stop.walk.fault and stop.walk.fault.code) == (va, 7)
    assert (va_bits == 52 and granule is not Granule.K64) == m.registers().TCR_EL1 >> 59 & 1
    assert stop.walk.params.start_level == {(12, 52): -1, (12, 48): 0, (14, 48): 0, (14, 52): 0}.get(
        (granule.page_shift, va_bits), 1
    )


def test_52_bits_need_a_cpu_that_has_them() -> None:
    with pytest.raises(BootError, match="52 VA bits need FEAT_LPA2 or FEAT_LVA, and neoverse-v1 has not"):
        Machine.bare(va_bits=52, mmu="model", cpu="neoverse-v1")
    Machine.bare(va_bits=52, mmu="model", cpu="max,lpa2=off", granule=Granule.K64)
    with pytest.raises(BootError, match="max,lpa2=off has not"):
        Machine.bare(va_bits=52, mmu="model", cpu="max,lpa2=off")


def test_ram_above_48_bits_is_reached_with_lpa2() -> None:
    m = Machine.bare(mmu="model", va_bits=52)
    made = coldboot.bare_template(coldboot.BARE_RAM, Granule.K4, 52, CPUS["max"]).thaw()
    made.memory.add(1 << 51, 1 << 16)
    m = Machine(made, features=CPUS["max"])
    word = m.tables.fmt.leaf(3).pack(OA=1 << 51, VALID=1, TYPE=1, AF=1, UXN=1, PXN=1)
    m.memory.store(leaf_pa(m, page(m, DATA)), word)
    assert word & 0x200  # OA[51]
    m.run(bytes(snippets.load("store")), page(m, DATA) + 16, 99).ok()
    assert m.memory.fetch((1 << 51) + 16) == 99


class Lpa2Kernel(KernelSubject):
    """A kernel on a CPU with LPA2: five levels, 52-bit descriptors."""

    def thaw(self, *, ng: bool) -> coldboot.SetUp:
        return coldboot.template(self.image, ng=ng, va_bits=52, features=CPUS["max"]).thaw()

    def machine(self, *, ng: bool) -> Machine:
        machine = Machine.boot(self.image, ng=ng, va_bits=52, mmu="model")
        stub_allocator(machine)
        return machine


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS[1:])
def test_a_kernel_with_lpa2_does_what_the_model_predicted(name: str) -> None:
    subject = Lpa2Kernel(kernel_image(name))
    keeps = subject.variant().invalid_keeps_present
    for enable in (0, 1):
        report = run_case(subject, linear_pages(5, enable, keeps_present=keeps))
        assert [str(d) for d in report.differences] == []
        assert len(report.real.words) == 5
        assert {word.new & 0x300 for word in report.real.words.values()} == {0}


@pytest.mark.kernels
def test_a_kernel_with_lpa2_has_five_levels_and_descriptors_without_shareability() -> None:
    m = Machine.boot(kernel_image("debian:6.12"), va_bits=52, mmu="model")
    va = m.plan.linear_va(m.plan.ram[0] + m.plan.ram[1] // 2)
    assert va == 0xFFF0_0000_0800_0000
    walk = m.translate(va)
    assert [step.level for step in walk.steps] == [-1, 0, 1, 2, 3]
    assert walk.steps[-1].word & ~0x0000_FFFF_FFFF_F000 == 0x00E8_0000_0000_0407
    assert m.translate(m.plan.window).steps[-1].word & 0xFFF == 0x403
    assert m.registers().TCR_EL1 >> 32 & 7 == 6
    result = m.call("set_memory_valid", va, 3, 0).ok()
    assert [c.va for c in result.changes] == [va, va + 4096, va + 8192]
    assert m.call("vmalloc_to_page", m.plan.window).ok().value == m.struct_page(m.plan.window_pa)


# hardware's updates


def with_updates(m: Machine, **tcr: int) -> Machine:
    m.set_register("TCR_EL1", TCR_EL1.pack(m.cpu["TCR_EL1"], **tcr))
    return m


@pytest.mark.parametrize("el", [0, 1])
def test_hardware_sets_the_access_flag(model: Machine, el: int) -> None:
    model.user.protect(model.plan.user_data, 4096, AF=0)
    va, pa = model.plan.user_data + 8, leaf_pa(model, model.plan.user_data)
    stop = model.run(bytes(snippets.load("load")), va, el=el).stop
    assert stop
    assert "access flag fault, level 3" in stop.message
    with_updates(model, HA=1)
    result = model.run(bytes(snippets.load("load")), va, el=el).ok()
    assert [(c.pa, c.fields) for c in result.changes] == [(pa, {"AF": (0, 1)})]


def test_a_store_makes_a_clean_page_dirty_and_a_load_does_not(model: Machine) -> None:
    m = with_updates(model, HA=1, HD=1)
    m.tables.protect(page(m, DATA), 4096, AP=2, DBM=1)
    assert not m.run(bytes(snippets.load("load")), page(m, DATA)).ok().changes
    result = m.run(words("twice"), page(m, DATA)).ok()  # load, store: the entry of the load does not serve the store
    assert [c.fields for c in result.changes] == [{"AP": (2, 0)}]
    m.tables.protect(page(m, DATA), 4096, AP=2, DBM=0)
    assert m.run(bytes(snippets.load("store")), page(m, DATA)).stop
    m.tables.protect(page(m, DATA), 4096, AP=2, DBM=1)
    assert [c.fields for c in m.run(words("add"), page(m, DATA)).ok().changes] == [{"AP": (2, 0)}]


def test_without_hd_a_clean_page_is_read_only(model: Machine) -> None:
    m = with_updates(model, HA=1)
    m.tables.protect(page(m, DATA), 4096, AP=2, DBM=1)
    stop = m.run(bytes(snippets.load("store")), page(m, DATA)).stop
    assert stop
    assert "permission fault, level 3" in stop.message


# indirect permissions, and registers that Unicorn's CPU has not

RW_AND_RWX = 0x7777_7777_7777_7777


def test_indirect_permissions_decide(model: Machine) -> None:
    """A page with PIIndex n may be read, written, run as field n of PIR_EL1 says (Arm ARM, Table D8-68)."""
    m = model
    m.tables.place(
        page(m, DATA), 3, m.memory.fetch(leaf_pa(m, page(m, DATA))) & ~(1 << 54 | 1 << 53 | 1 << 51 | 1 << 6)
    )
    m.memory.store(leaf_pa(m, page(m, DATA)), m.memory.fetch(leaf_pa(m, page(m, DATA))) & ~(1 << 7))
    m.write(page(m, DATA), (0xD65F03C0).to_bytes(8, "little"))  # ret
    m.set_register("TCR2_EL1", TCR2.pack(PIE=1))
    allowed = {0: "", 1: "r", 2: "x", 3: "rx", 5: "rw", 6: "rw", 7: "rwx", 8: "r", 0xC: "rw", 0xE: "rwx"}
    for nibble, rights in allowed.items():
        m.set_register("PIR_EL1", RW_AND_RWX & ~0xF | nibble)
        done = "".join(
            letter
            for letter, name in (("r", "load"), ("w", "store"), ("x", "fetch"))
            if m.run(bytes(snippets.load(name)), page(m, DATA), 0xD65F03C0).stop is None
        )
        assert done == rights, f"{nibble:#x}"
    assert m.registers().PIR_EL1 == RW_AND_RWX & ~0xF | 0xE


def test_guest_code_reads_and_writes_the_later_registers(model: Machine) -> None:
    result = model.run(words("pir"), 0x1234, 0, 0, 0x55).ok()
    assert (result.x[1], result.x[2], result.x[4]) == (0x1234, 0, 0x55)
    assert (model.registers().PIR_EL1, model.registers().POR_EL0) == (0x1234, 0x55)
    saved = model.save()
    model.set_register("PIR_EL1", 5)
    model.restore(saved)
    assert model.registers().PIR_EL1 == 0x1234


def test_a_cpu_without_them_finds_them_undefined() -> None:
    for m in (Machine.bare(), Machine.bare(mmu="model", cpu="neoverse-v1")):
        stop = m.run(words("pir"), 1).stop
        assert stop
        assert stop.kind == "undefined"
    stop = Machine.bare(mmu="model").run(words("pir"), 1, el=0).stop
    assert stop
    assert stop.kind == "undefined"


def test_a_register_that_is_not_there_is_refused(model: Machine) -> None:
    with pytest.raises(ValueError, match=r"register PIR_EL9: this machine has .*PIR_EL1"):
        model.set_register("PIR_EL9", 1)
    with pytest.raises(ValueError, match="register PIR_EL1: this machine has CONTEXTIDR_EL1"):
        Machine.bare().set_register("PIR_EL1", 1)


def test_a_machine_that_cannot_be_made_says_why() -> None:
    with pytest.raises(ValueError, match="mmu='qemu': must be"):
        Machine.bare(mmu="qemu")
    with pytest.raises(ValueError, match=r"cpu m68k: must be one of max, "):
        Machine.bare(mmu="model", cpu="m68k")
    with pytest.raises(ValueError, match='are for mmu="model"'):
        Machine.bare(cpu="max")
    with pytest.raises(ValueError, match='are for mmu="model"'):
        Machine.bare(vectors=True)


# exception levels, PAN, unprivileged accesses


def test_entries_of_el1_do_not_serve_el0(model: Machine) -> None:
    """EL0 faults on a page, EL1 loads it in the handler, EL0 comes back and must fault again."""
    m = with_vectors(model, "kernel load")
    result = m.run(words("back and forth"), page(m, DATA), el=0).ok()
    assert result.x[20] == 0x9200000F  # of the last exception: data abort from EL0, permission, level 3
    assert result.x[3] == 7


def test_pan_is_seen_at_once(model: Machine) -> None:
    m = model
    stop = m.run(words("pan"), m.plan.user_data).stop
    assert stop
    assert stop.pc == m.plan.code + 12  # the second load
    assert "permission fault, level 3" in stop.message
    assert m.run(words("pan"), page(m, DATA)).ok()
    assert m.registers().PAN == 0  # the next run starts without
    stop = m.run(words("pan ldtr"), m.plan.user_data).stop
    assert stop
    assert stop.pc == m.plan.code + 12  # LDTR went through


def test_unprivileged_loads_have_el0s_rights(model: Machine) -> None:
    m = model
    stop = m.run(words("both"), page(m, DATA)).stop
    assert stop
    assert (stop.pc, stop.message[:21]) == (m.plan.code + 4, "EL1 unprivileged read")
    assert m.run(words("both"), m.plan.user_data).ok()
    assert m.run(words("sttr"), m.plan.user_code).stop
    assert m.run(words("ldtr"), m.plan.user_code).ok()


# syndromes and vectors


FAULTS = {
    "load": (0x96000007, 0, 2),
    "store": (0x96000047, 0, 1),
    "add": (0x96000007, 0, 2),  # an atomic that could not have read: WnR is 0
    "ldtr": (0x96000007, 0, 1),
    "zero": (0x96000047, 0, 1),
    "jump": (0x86000007, 0, None),
}


@pytest.mark.parametrize("el", [0, 1])
@pytest.mark.parametrize("name", FAULTS)
def test_an_abort_goes_to_the_vectors_with_its_syndrome(guest: Machine, name: str, el: int) -> None:
    m, plan = guest, guest.plan
    if el == 0:
        m.set_register("SCTLR_EL1", m.cpu["SCTLR_EL1"] | 1 << 14)  # DZE
    va = (page(m, GONE) if el else plan.user_data + 32 * 4096) + 0x128
    x = m.run(words(name), va, el=el).ok().x
    esr, _, at = FAULTS[name]
    start = plan.code if el else plan.user_code
    assert x[ESR] == (esr if el else esr - (1 << 26))
    assert x[FAR] == va
    assert x[ELR] == (va if at is None else start + 4 * at)
    flags = 6 << 28 if name == "load" else 0  # cmp x0, x0: Z and C
    branch = 1 << 10 if name == "jump" else 0  # BTYPE 01: BR
    assert x[SPSR] == flags | branch | 0x3C0 | (5 if el else 0)
    assert x[EL] == EL1
    assert x[SP] == plan.stack
    assert x[VECTOR] == page(m, VECTORS) + (0x200 if el else 0x400) + 24


def test_permission_and_alignment_bits_of_the_syndrome(guest: Machine) -> None:
    m = guest
    m.tables.protect(page(m, DATA), 4096, AP=2)
    assert m.run(words("store"), page(m, DATA) + 5).ok().x[ESR] == 0x9600004F
    assert m.run(words("add"), page(m, DATA) + 8).ok().x[ESR] == 0x9600004F  # it could have read
    assert m.run(words("jump"), page(m, DATA)).ok().x[ESR] == 0x8600000F
    m.tables.protect(page(m, DATA), 4096, AP=0, AF=0)
    assert m.run(words("store"), page(m, DATA) + 5).ok().x[ESR] == 0x9600004B
    m.set_register("TCR2_EL1", TCR2.pack(PIE=1))
    m.tables.protect(page(m, DATA), 4096, AF=1)
    m.set_register("PIR_EL1", RW_AND_RWX)
    m.tables.protect(page(m, DATA), 4096, AP=2)  # nDirty, and HD is off
    assert m.run(words("store"), page(m, DATA)).ok().x[ESR] == 1 << 37 | 0x9600004F


def test_far_is_the_first_byte_that_fails(guest: Machine) -> None:
    m, gone = guest, page(guest, GONE)
    end = gone + m.plan.page_size
    for name, offset, far in (
        ("load", -4, gone),  # the second half is in the page
        ("store", -1, gone),
        ("load", 4, gone + 4),
        ("load", 4096 - 4, end - 4),  # the first half is
        ("pair", -8, gone),  # the second register
        ("pair", -12, gone),
        ("pair", 4096 - 8, end - 8),
    ):
        x = m.run(words(name), gone + offset).ok().x
        assert (x[FAR], x[ESR] & 0x3F) == (far, 7), (name, offset)


def test_a_tag_stays_in_far(guest: Machine) -> None:
    m = guest
    m.set_register("TCR_EL1", TCR_EL1.pack(m.cpu["TCR_EL1"], TBI1=1, TBI0=1))
    tagged = page(m, GONE) & ~(0xFF << 56) | 0x5A << 56
    assert m.run(words("load"), tagged | 8).ok().x[FAR] == tagged | 8
    there = page(m, DATA) & ~(0xFF << 56) | 0x5A << 56
    assert m.run(words("store"), there, 77).ok().x[ESR] == 0
    assert m.word_at(page(m, DATA), 8) == 77


def test_dc_zva_reports_its_operand(guest: Machine) -> None:
    va = page(guest, GONE) + 0x47
    assert guest.run(words("zero"), va).ok().x[FAR] == va
    assert guest.run(words("zero"), page(guest, DATA) + 0x47).ok().x[ESR] == 0


@pytest.mark.parametrize("el", [0, 1])
@pytest.mark.parametrize(
    ("name", "esr", "behind"), [("svc", 0x56001234, 1), ("brk", 0xF2000567, 0), ("udf", 0x02000000, 0)]
)
def test_other_exceptions_go_to_the_vectors_too(guest: Machine, name: str, esr: int, behind: int, el: int) -> None:
    x = guest.run(words(name), el=el).ok().x
    assert (x[ESR], x[3]) == (esr, 7)
    assert x[ELR] == (guest.plan.code if el else guest.plan.user_code) + 4 + 4 * behind


def test_exceptions_from_el1_on_sp_el0_have_their_own_vector(guest: Machine) -> None:
    m = guest
    x = m.run(words("el1t"), page(m, GONE), 0, page(m, DATA) + 64).ok().x
    assert x[VECTOR] == page(m, VECTORS) + 24
    assert x[SPSR] == 0x3C4
    assert (x[SP], x[3]) == (m.plan.stack, page(m, DATA) + 64)


def test_el0_keeps_its_stack_and_the_handler_has_its_own(guest: Machine) -> None:
    x = guest.run(words("sp"), el=0).ok().x
    assert (x[SP], x[3]) == (guest.plan.stack, guest.plan.user_stack)
    assert guest.run(words("sp"), el=1).ok().x[3] == guest.plan.stack


@pytest.mark.parametrize("span", [0, 1])
def test_exception_entry_sets_pan_unless_sctlr_says_not_to(guest: Machine, span: int) -> None:
    """The handler loads a user page: with PAN that is a fault in the handler, whose own ESR is the last."""
    m = with_vectors(guest, "kernel load")
    sctlr = m.cpu["SCTLR_EL1"]
    m.set_register("SCTLR_EL1", sctlr & ~(1 << 23) | span << 23)
    m.user.protect(m.plan.user_data, 4096, PXN=1)
    result = m.run(words("svc"), m.plan.user_data, el=0, timeout=0.3)
    if span:
        assert result.ok().x[20] == 0x56001234
    else:
        assert result.stop
        assert result.stop.kind == "timeout"  # it faults for ever


def test_the_guest_sets_its_vectors_itself(model: Machine) -> None:
    m = with_vectors(model)
    m.set_register("VBAR_EL1", 0)
    assert m.run(words("load"), page(m, GONE)).stop
    assert m.run(words("vbar"), page(m, GONE), page(m, VECTORS)).ok().x[ESR] == 0x96000007
    assert m.mmu
    m.mmu.vectors = False
    assert m.run(words("load"), page(m, GONE)).stop


def test_a_handler_that_faults_for_ever_ends_by_the_clock() -> None:
    m = Machine.bare(mmu="model", vectors=True)
    result = m.run(words("load"), 8, timeout=0.2)
    assert result.stop
    assert result.stop.kind == "timeout"


def test_an_address_without_ram_is_an_external_abort(guest: Machine) -> None:
    m = guest
    for kind, esr in (("load", 0x96000010), ("store", 0x96000050), ("jump", 0x86000010)):
        leaf = m.tables.fmt.leaf(3)
        word = leaf.pack(m.memory.fetch(leaf_pa(m, page(m, DATA))), OA=0x10_0000_0000, PXN=0)
        m.memory.store(leaf_pa(m, page(m, DATA)), word)
        assert m.run(words(kind), page(m, DATA) + 8).ok().x[ESR] == esr
    m.set_register("VBAR_EL1", 0)
    stop = m.run(words("load"), page(m, DATA) + 8).stop
    assert stop
    assert "external abort, no RAM at 0x1000000008" in stop.message


def test_an_external_abort_on_the_walk(guest: Machine) -> None:
    m = guest
    m.user.place(0x4000_0000, 2, 0x10_0000_0003)
    assert m.run(words("load"), 0x4000_0008).ok().x[ESR] == 0x96000017
    x = m.run(words("at"), 0x4000_0008).ok().x
    assert (x[ESR], x[FAR], x[ELR], x[3]) == (0x96000157, 0x4000_0008, m.plan.code + 4, 7)
    m.set_register("VBAR_EL1", 0)
    stop = m.run(words("at"), 0x4000_0008).stop
    assert stop
    assert (stop.pc, stop.kind) == (m.plan.code + 4, "fault")


# the TLB


def test_an_entry_stays_until_the_guest_invalidates_it(model: Machine) -> None:
    m, va = model, page(model, DATA)
    m.write(va, (77).to_bytes(8, "little"))
    pte = m.plan.linear_va(leaf_pa(m, va))
    result = m.run(words("stale"), va, pte, va)
    assert result.stop
    assert result.stop.pc == m.plan.code + 4 * 9  # the load behind the TLBI
    assert (result.x[3], result.x[4]) == (77, 77)
    assert [e.operation for e in result.maintenance] == ["VAALE1IS"]


def test_one_tlbi_drops_all_of_a_block(model: Machine) -> None:
    m = model
    va = m.plan.linear + (1 << 40)
    m.tables.map(va, m.plan.ram[0], 2 << 20, level=2, AF=1, UXN=1, PXN=1, SH=3)
    result = m.run(words("stale"), va + 0x5000, m.plan.linear_va(leaf_pa(m, va)), va + 0x10_0000)
    assert result.stop
    assert result.stop.pc == m.plan.code + 4 * 9
    other = m.run(words("stale"), page(m, DATA), m.plan.linear_va(leaf_pa(m, page(m, DATA))), page(m, DATA + 1))
    assert other.ok()  # of another page: the entry stays


def test_one_tlbi_drops_entries_of_tagged_addresses(model: Machine) -> None:
    m = with_updates(model, TBI1=1)
    va = page(m, DATA)
    tagged = va & ~(0xFF << 56) | 0x5A << 56
    result = m.run(words("tagged"), tagged, m.plan.linear_va(leaf_pa(m, va)), va)
    assert result.stop
    assert result.stop.pc == m.plan.code + 4 * 8


def test_range_maintenance_is_recorded_and_done(model: Machine) -> None:
    m, va = model, page(model, DATA)
    result = m.run(words("range"), va, m.plan.linear_va(leaf_pa(m, va)), va >> 12)
    assert result.stop
    assert result.stop.kind == "fault"
    assert [e.operation for e in result.maintenance] == ["RVAE1IS", "VAE1OS"]
    assert {e.operand for e in result.maintenance} == {va >> 12}
    assert [e.pc for e in result.maintenance] == [m.plan.code + 12, m.plan.code + 16]


def test_a_write_to_ttbr_counts_from_the_next_miss(model: Machine) -> None:
    m = model
    result = m.run(words("ttbr"), m.plan.user_data, 0, m.plan.window_pa)  # a page of zeros as root
    assert result.stop
    assert "translation fault, level 0" in result.stop.message
    assert m.run(words("ttbr"), m.plan.user_data, 0, m.user.root).ok()


def test_what_python_changed_is_seen_at_once(model: Machine) -> None:
    m = model
    load = bytes(snippets.load("load"))
    m.run(load, page(m, DATA)).ok()
    m.tables.unmap(page(m, DATA), 4096)
    assert m.run(load, page(m, DATA)).stop
    assert m.run(load, page(m, DATA), record="nothing").stop


def test_a_run_in_order_has_the_table_writes(model: Machine) -> None:
    code = bytes(snippets.load("toggle_valid"))
    runs = [
        m.run(code, m.plan.linear_va(leaf_pa(m, page(m, 3))), 2, page(m, 3), record="order").ok().events
        for m in (Machine.bare(), model)
    ]
    assert runs[0] == runs[1]
    assert runs[0]
    assert len(runs[0]) == 10


# errors are never lost


def test_an_error_in_the_walk_comes_out_as_itself(model: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("in the fill")

    with monkeypatch.context() as patch:
        patch.setattr("emu.mmu.translate", broken)
        with pytest.raises(ZeroDivisionError, match="in the fill"):
            model.run(bytes(snippets.load("load")), page(model, DATA))
    assert model.run(bytes(snippets.load("load")), page(model, DATA)).ok()


def test_an_error_in_a_system_register_hook_comes_out_as_itself(
    model: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> bool:
        raise ZeroDivisionError("in the hook")

    assert model.mmu
    monkeypatch.setattr(model.mmu, "system", broken)
    with pytest.raises(ZeroDivisionError, match="in the hook"):
        model.run(words("at"), page(model, DATA))


def test_tables_of_a_smaller_granule_than_the_machines_are_refused() -> None:
    m = Machine.bare(mmu="model", granule=Granule.K16)
    m.set_register("TCR_EL1", TCR_EL1.pack(m.cpu["TCR_EL1"], TG0=0))
    table = m.user.allocate()  # 16K: four tables of 4K
    for level in range(3):
        m.memory.store(table + level * 4096, (table + (level + 1) * 4096) | 3)
    m.memory.store(table + 3 * 4096, m.plan.code_pa | 0x403)
    m.set_register("TTBR0_EL1", table)
    with pytest.raises(NotImplementedError, match=r"4K tables on a machine whose pages have 0x4000 bytes"):
        m.run(bytes(snippets.load("load")), 8)


def test_without_an_mmu_the_va_is_the_pa(model: Machine) -> None:
    m = model
    m.set_register("SCTLR_EL1", m.cpu["SCTLR_EL1"] & ~1)
    m.memory.write(m.plan.code_pa, (0xD503201F).to_bytes(4, "little") * 4)  # nop
    assert m.cpu.run(m.plan.code_pa + 4, m.plan.code_pa + 8).end is engine.End.REACHED
