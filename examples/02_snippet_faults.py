"""A few arm64 instructions with a real MMU: a load that works, one that EL0 may not make, one that finds no page."""

from emu import snippets
from emu.machine import Machine

machine = Machine.bare()
load = bytes(snippets.load("load"))
page = machine.plan.linear_va(machine.plan.ram[0] + 0x80_0000)  # an address in the kernel's linear map
machine.write(page, b"numpy!!!")

print("EL1:", machine.run(load, page).ok().value.to_bytes(8, "little"))
print("EL0:", machine.run(load, page, el=0).stop.walk)

machine.tables.unmap(page, 0x1000)  # a change from Python: seen at once
print("EL1:", machine.run(load, page).stop.walk)
