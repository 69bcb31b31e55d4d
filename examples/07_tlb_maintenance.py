"""Is the TLB maintenance right? A traced call, an access served by a stale TLB entry, and nine races at a glance."""

from emu import Machine
from emu.races.scenarios import SCENARIOS
from emu.tracing import Policy, Trace

# A kernel function under the break-before-make checker. "noflush" leaves the TLBI to its caller, and is told so.
trace = Trace()
machine = Machine.boot("debian:7.3", trace=trace)
page = machine.plan.ram[0] + 0x200_0000
for name, args in (
    ("set_memory_valid", (machine.plan.linear_va(page), 1, 0)),
    ("set_direct_map_invalid_noflush", (machine.struct_page(page + machine.plan.page_size),)),
):
    found = machine.call(name, *args).ok().findings
    print(f"{name}: {found[0].rule} ({found[0].cause})" if found else f"{name}: clean")

# A program that unmaps a page and forgets the TLBI: the load after it is served by what the TLB holds.
LDR, STR_ZERO, DSB_ISHST, ISB, RET = 0xF9400009, 0xF900003F, 0xD5033A9F, 0xD5033FDF, 0xD65F03C0
bare = Machine.bare(mmu="model", trace=Trace(policy=Policy()))
va = bare.plan.linear + 0x10_0000
pte = bare.translate(va).steps[-1].pa
result = bare.run([LDR, STR_ZERO, DSB_ISHST, ISB, LDR, RET], va, bare.plan.linear_va(pte)).ok()
print(*(f"{f.rule}: used at {f.pc:#x}, changed at {f.write_pc:#x}" for f in result.findings[:1]), sep="\n")

# The scenarios: what each finds on a 6.12 kernel.
for name, options in (
    ("lost-update", {}),
    ("disjoint-pages", {}),
    ("kfence-softirq", {}),
    ("freed-table", {"lock": "none"}),
    ("freed-table", {"lock": "write"}),
    ("split-walk", {"how": "break"}),
    ("split-walk", {"how": "direct", "flush": "no"}),
    ("ptdump-vmalloc", {"by": "huge"}),
    ("bad-tlbi", {"wrong": "early"}),
    ("set-memory-bbm", {}),
):
    scenario = SCENARIOS[name]
    found = scenario.race(Machine.boot("debian:6.12"), **options).explore(scenario.preemptions and 1).findings
    with_ = "".join(f" {key}={value}" for key, value in options.items())
    print(f"{name + with_:36} {', '.join(sorted({f.kind for f in found})) or 'nothing'}")
