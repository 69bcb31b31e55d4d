"""set_memory_valid without a kernel: our own assembly of the chain, its table diff, and what it told the TLB."""

from emu import snippets
from emu.machine import Machine

machine = Machine.bare()
code = bytes(snippets.load("set_memory_valid"))
va = machine.plan.linear_va(machine.plan.ram[0] + 0x80_0000)

for enable in (0, 1):
    result = machine.run(code, va, 3, enable, record="order").ok()
    print(f"set_memory_valid({va:#x}, 3, {enable}) = {result.signed}")
    print(*result.changes, *result.events, "", sep="\n")
