"""The shipped set_memory_valid of a Debian kernel: called by name, compared with the model, and its fault explained."""

from emu.check import KernelSubject, main_job
from emu.image import KernelImage
from emu.machine import Machine

image = KernelImage.load("debian:6.12")
machine = Machine.boot(image)
va = machine.plan.linear_va(0x4800_0000)

result = machine.call("set_memory_valid", va, 2, 0).ok()
print(f"set_memory_valid = {result.signed}")
print(*result.changes, *result.maintenance, sep="\n")

# memset() is asked to write to the page that has just become invalid.
stop = machine.call("memset", va, 0, 64).stop
print(stop.walk)
print("in", stop.symbol.partition("+")[0])

for report in main_job(KernelSubject(image), pages=2):
    print(f"{report.call}: {len(report.differences)} differences from the model")
