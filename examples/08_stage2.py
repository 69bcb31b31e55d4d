"""Stage 2 as KVM and as pKVM build it: walked, listed, audited; and what a guest sees through it.

KVM gives a guest its RAM by 2 MiB blocks, everything allowed, and no mapping for devices that it emulates. pKVM's host
runs under an identity map of its own, and what the host has given to a protected guest is no longer in it.
"""

from pgtable import Access, Format, PhysicalMemory, Registers, translate
from pgtable.audit import audit
from pgtable.build import TableBuilder
from pgtable.listing_stage2 import nested_listing, stage2_listing
from pgtable.permissions import letters
from pgtable.registers import HCR_EL2, VTCR_EL2

RAM, HYPERVISOR = 0x4000_0000, 0x5000_0000
FWB = Format(stage2=True, fwb=True)


def registers(tree: TableBuilder, **more: int) -> Registers:
    """The registers of a hypervisor that runs a guest under `tree`."""
    hcr = HCR_EL2.pack(VM=1, RW=1, FWB=int(tree.fmt.fwb))
    return Registers(HCR_EL2=hcr, VTCR_EL2=VTCR_EL2.pack(PS=2, SH0=3, **tree.vtcr), VTTBR_EL2=tree.root, **more)


def show(name: str, memory: PhysicalMemory, regs: Registers) -> None:
    """What a tree of stage 2 maps, and its audit."""
    found = stage2_listing(memory, regs)
    print(f"{name}: {len(found.tables.pa)} tables")
    for ipa, size, pa, perms in zip(*(column.tolist() for column in found.runs[:3]), found.runs.perms, strict=True):
        print(f"  IPA {ipa:#x}-{ipa + size:#x} {letters(int(perms))} PA {pa:#x}")
    for verdict in audit(found, memory):
        if verdict.status.value in ("fail", "info"):
            print(f"  {verdict.status.value} {verdict.rule}: {verdict.text}")


# KVM: 40 bits of IPA start at level 1, as two concatenated tables; the guest's 4 MiB of RAM by blocks.
memory = PhysicalMemory((RAM, 8 << 20), (HYPERVISOR, 1 << 20))
kvm = TableBuilder(memory, (HYPERVISOR, 1 << 19), fmt=FWB, va_bits=40, stage=2)
kvm.map(RAM, RAM + (2 << 20), 4 << 20)
show("KVM", memory, registers(kvm))

# The guest's own tables, at IPAs: PA = IPA + 2 MiB.
guest = TableBuilder(memory, (RAM + (2 << 20), 1 << 16), va_bits=39)
tables = guest.on(memory)
guest.map(0x1000, RAM + 0x10_0000, 0x1000, UXN=0, AP=1)
for level in (0, 1):  # what refers to a table must say its IPA
    table = guest.root + 0x1000 * level
    words = memory.words(table, 512)
    words[words != 0] -= 2 << 20
regs = registers(kvm, TTBR0_EL1=guest.root - (2 << 20), TCR_EL1=25 | 3 << 12, MAIR_EL1=0xFF)
print(translate(memory, regs, 0x1234, Access.read(el=0)))
rows = nested_listing(memory, regs)
print(f"VA {int(rows.rows.va[0]):#x} -> IPA {int(rows.ipa[0]):#x} -> PA {int(rows.rows.pa[0]):#x}")
print(translate(memory, regs.replace(TTBR0_EL1=0x900_0000), 0x1234).fault)  # a table where no RAM is given

# pKVM: the host's identity map, from which a donated page and the hypervisor's own memory are gone.
pool = HYPERVISOR + (1 << 19)
pkvm = TableBuilder(memory, (pool, 1 << 19), fmt=FWB, va_bits=40, stage=2)
pkvm.map(RAM, RAM, 8 << 20)
pkvm.split(RAM)
pkvm.unmap(RAM + 0x5000, 0x1000)
host = registers(pkvm, SCTLR_EL1=0)
show("pKVM", memory, host)
print(translate(memory, host, RAM + 0x5008, Access.write()))

# The mistake that an audit is for: the hypervisor's memory is left in the host's map.
pkvm.map(HYPERVISOR, HYPERVISOR, 1 << 20)
show("pKVM, careless", memory, host)
