"""A kernel that has booted: what making two pages read-only reaches, and KFENCE at work on the kernel's own tables."""

import re
import tempfile
from pathlib import Path

from emu.boot import Options, boot
from emu.booted import KfencePool, VmArea, changed, mapped, word_at
from pgtable import Access

with tempfile.TemporaryDirectory() as folder:  # QEMU runs for some seconds; all that follows needs it no more
    options = Options("debian:6.12", command_line="kfence.sample_interval=100")
    snapshot = boot(options, Path(folder) / "k612.snap")
    machine = snapshot.machine(mmu="model", vectors=True)  # exceptions go to the kernel's own handlers
start = machine.save()


def step(text, function, *args):
    """Calls the kernel's function; prints which of all valid descriptors it changed, and how."""
    before = mapped(machine)
    result = machine.call(function, *args).ok()
    print(f"{text}:")
    fields = {change.va: change.fields for change in result.changes}
    for va in sorted(changed(before, mapped(machine)), key=area.name):
        print(f"  {area.name(va):15}", *(f" {name} {old:#x}->{new:#x}" for name, (old, new) in fields[va].items()))


def story(text):
    """What the kernel prints, without what differs from build to build and boot to boot."""
    text = re.sub(r"\+0x\w+/0x\w+", "", text)
    text = re.sub(r"\b(0x)?[0-9a-f]{16}\b", "ADDRESS", text)
    text = re.sub(r"\d+\.\d{6}s", "TIME", text)
    return re.sub(r"kfence-#\d+", "kfence-#N", text)


print("1. Two of six pages are made read-only: in their area, and in the linear map.")
area = VmArea.allocate(machine, 6)
step("set_memory_ro(page 1, 2)", "set_memory_ro", area.va(1), 2)
print("On 6.1 and 6.12 that is all of the area's linear map, on 7.3 the two pages that were asked for.")
step("set_memory_x(page 1, 2)", "set_memory_x", area.va(1), 2)

print("\n2. The area is freed as it is. Its pages are given out again, and nobody can write to them.")
machine.call("vfree", area.addr).ok()
stuck = [va for va in area.linear if not machine.translate(va, Access.write(el=1)).ok]
print("read-only:", *(area.name(va) for va in sorted(stuck, key=area.name)), sep="\n  ")
oops = machine.call("vzalloc", 6 * area.page)
print("vzalloc(6 pages):")
for line in oops.printed:
    if line.startswith(("Unable", "  FSC", "pc :")):
        print(" ", story(line))

machine.restore(start)
print("\n3. KFENCE: an object, and a store to the page behind it.")
pool = KfencePool(machine)
while not (address := pool.allocate(200)) % pool.page:  # at random it lies at the start or the end of its page
    pass
guard = address - address % pool.page + pool.page
print(f"object:       {word_at(machine, address) & 0xFFF:#05x}  (low bits of its page's descriptor: valid)")
print(f"guard before: {word_at(machine, guard) & 0xFFF:#05x}  (invalid)")
with pool.reports() as reports:
    result = machine.call("memset", guard, 0, 8).ok()
kinds = {number: name for name, number in snapshot.image.btf.enum("kfence_error_type").items()}
print("kfence_report_error:", kinds[reports[0].type], f"at guard + {reports[0].addr - guard}")
told = [story(line) for line in result.printed if line.strip("=") and not line.startswith(("CPU", "Hardware"))]
print(*("  | " + line for line in told), sep="\n")
print(f"guard after:  {word_at(machine, guard) & 0xFFF:#05x}  (valid: the store was made again)")
machine.call("__kfence_free", address).ok()
print(f"freed:        {word_at(machine, guard) & 0xFFF:#05x}, object {word_at(machine, address) & 0xFFF:#05x}")
with pool.reports() as reports:
    result = machine.call("memset", address, 0, 8).ok()
print("kfence_report_error:", kinds[reports[0].type])
print("  | " + story(result.printed[1]))
