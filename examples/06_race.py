"""Two CPUs change one page's PTE without a lock: the store of one takes away what the other has written."""

from emu import Machine
from emu.race import Race, call

machine = Machine.boot("debian:6.12")
page = machine.plan.linear + 0x200_0000
READ_ONLY, WRITE = 1 << 7, 1 << 51  # PTE_RDONLY, PTE_WRITE


def race(distance):
    """One CPU makes a page invalid; another makes a page `distance` further on read-only."""
    other = call("B", "__change_memory_common", page + distance, 4096, READ_ONLY, WRITE)
    return Race(Machine.boot("debian:6.12"), (call("A", "set_memory_valid", page, 1, 0), other), [page])


same = race(0)
result = same.explore(preemptions=2)
print(f"the same page: {result.interleavings} interleavings, {len(result.findings)} findings")
finding = result.findings[0]
print(f"{finding.schedule}: {finding}")
print(same.columns(finding.schedule))

result = race(4096).explore(preemptions=None)
print(f"two pages of one table: all {result.interleavings} interleavings, {len(result.findings)} findings")
