"""Tables built in Python, an access walked through them, and the one bit that decides."""

from pgtable import Access, PhysicalMemory, Registers, translate
from pgtable.build import TableBuilder
from pgtable.registers import TCR_EL1

memory = PhysicalMemory((0x4000_0000, 1 << 20))
tables = TableBuilder(memory, (0x4000_0000, 1 << 20), APTable=2)  # every table descriptor says: no writes below
tables.map(0x10000, 0x8000_0000, 0x4000, AP=1, PXN=1, UXN=1)

regs = Registers(TTBR0_EL1=tables.root, TCR_EL1=TCR_EL1.pack(T0SZ=16, IPS=5), MAIR_EL1=0xFF)
print(translate(memory, regs, 0x11008, Access.read(el=0)))
print()
print(translate(memory, regs, 0x11008, Access.write(el=0)))
