"""emu.census and emu.context: the counts against QEMU's own log of what it executed, callers against the call sites in
the image, contexts against functions that Linux calls in one context only.
"""

from __future__ import annotations

import functools
import os
import random
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from emu.callers import CALL, find
from emu.census import OTHERS, PERMISSIONS, Call, Census, count, functions_of, tally
from emu.context import Context, Regions, hardirq_shift, regions
from emu.gdbstub import GdbStub
from emu.guest import BootFailed, Options
from tests.emu.test_snapshot import Stub
from tests.kernels import KERNELS, kernel_image
from tests.snapshots import FAST, booted

KFENCE = "kfence.sample_interval=100"
SLOW: dict[str, Any] = {
    FAST: (),
    **{name: pytest.mark.full for name in (*KERNELS, "debian:7.2-16k", "debian:6.12-rt") if name != FAST},
}


def kernels(*names: str) -> pytest.MarkDecorator:
    """The test with each kernel; but one of them only in the full tier."""
    return pytest.mark.parametrize("kernel", [pytest.param(name, marks=SLOW[name]) for name in names])


def census(kernel: str = FAST, functions: tuple[str, ...] = (), limit: int = 1000, **options: object) -> Census:
    booted()  # skips without QEMU
    kernel_image(kernel)
    return count(Options(kernel, **options), functions, limit=limit)  # type: ignore[arg-type]


def of_function(found: Census) -> Counter[str]:
    total: Counter[str] = Counter()
    for row in found.rows:
        total[row.function] += row.calls
    return total


# one boot for several tests, with QEMU's log of what it executed

BEHIND = 8  # bytes: the instruction there is reached whether or not QEMU stopped at the first one


def logging_qemu(folder: Path, addresses: list[int]) -> Path:
    """A qemu-system-aarch64 that also logs every block executed that begins at one of `addresses`; in a page that has
    a breakpoint each instruction is a block."""
    program, real = folder / "qemu", shutil.which("qemu-system-aarch64")
    ranges = ",".join(f"{va:#x}+4" for va in addresses)
    program.write_text(f'#!/bin/sh\nexec {real} "$@" -d exec -dfilter {ranges} -D {folder}/log\n')
    program.chmod(0o755)
    return program


@functools.cache
def agreeing(kernel: str) -> tuple[Census, dict[str, range]]:
    """`observed`; where the counts differ, that of another boot: on a loaded machine QEMU's log has once missed a line.

    A mistake of ours is there in every boot.
    """
    found, executed = observed(kernel)
    counted = of_function(found)
    if all(counted[name] in logged for name, logged in executed.items()):
        return found, executed
    observed.cache_clear()
    return observed(kernel)


@functools.cache
def observed(kernel: str) -> tuple[Census, dict[str, range]]:
    """A census, and how often QEMU says that it executed each function in the same boot.

    A block that an interrupt comes before is logged as if executed, and then as stopped before: a few in a boot.
    """
    booted()
    targets = functions_of(kernel_image(kernel))
    with tempfile.TemporaryDirectory() as name:
        qemu = logging_qemu(Path(name), [va + BEHIND for va in targets.values()])
        found = census(kernel, command_line=KFENCE, kaslr=False, qemu=str(qemu))
        log = (Path(name) / "log").read_text()
    logged = Counter(re.findall(r"^Trace \d+: \S+ \[[0-9a-f]+/([0-9a-f]+)/", log, re.M))
    stopped = Counter(re.findall(r"^Stopped execution of TB chain before \S+ \[([0-9a-f]+)\]", log, re.M))
    assert stopped.total() < 10
    places = {name: f"{va + BEHIND:016x}" for name, va in targets.items()}
    return found, {name: range(logged[at] - stopped[at], logged[at] + 1) for name, at in places.items()}


@pytest.mark.kernels
@pytest.mark.qemu
@kernels(*KERNELS)
def test_qemu_executed_each_function_as_often_as_was_counted(kernel: str) -> None:
    found, executed = agreeing(kernel)
    counted = of_function(found)
    assert {name: counted[name] for name in executed if counted[name] not in executed[name]} == {}, executed
    assert found.calls >= (2 if kernel == "debian:6.1" else 262)  # without KFENCE, with its pool made


@pytest.mark.kernels
@pytest.mark.qemu
@kernels(*KERNELS)
def test_every_caller_is_a_call_site_of_the_image(kernel: str) -> None:
    found, _ = observed(kernel)
    image = kernel_image(kernel)
    for row in found.rows:
        sites = {site.address for site in find(image, row.function).calls if site.kind == CALL}
        assert row.site in sites, (row.function, image.symbols.describe(row.site))


@pytest.mark.kernels
@pytest.mark.qemu
@kernels("debian:6.12", "debian:7.3")
def test_nearly_all_calls_of_set_memory_valid_are_for_kfence(kernel: str) -> None:
    rows = [row for row in observed(kernel)[0].rows if row.function == "set_memory_valid"]
    pool = [row for row in rows if row.region == "KFENCE pool"]
    other = [row for row in rows if row.region != "KFENCE pool"]
    assert sum(row.calls for row in pool) >= 257
    assert {row.pages for row in pool if row.calls == 1} == {1}
    assert [(row.region, row.calls) for row in other] == ([("linear map", 1)] if kernel == "debian:7.3" else [])
    assert {row.context for row in pool} >= {Context.BOOTING, Context.PROCESS}


# judged by Linux: functions that are called in one context only

CONTEXTS = {
    "setup_arch": Context.BOOTING,
    "free_initmem": Context.PROCESS,
    "run_timer_softirq": Context.SOFTIRQ,
    "update_process_times": Context.HARDIRQ,
}


@pytest.mark.kernels
@pytest.mark.qemu
@kernels("debian:6.1", "debian:6.12", "debian:6.12-rt", "debian:7.2-16k", "debian:7.3")
def test_contexts_are_those_that_linux_calls_these_functions_in(kernel: str) -> None:
    found = census(kernel, tuple(CONTEXTS), limit=40)
    seen = {name: {row.context for row in found.rows if row.function == name} for name in CONTEXTS}
    assert seen == {name: {context} for name, context in CONTEXTS.items()}
    assert all((row.region, row.pages) == ("unknown", None) for row in found.rows)
    # Behind the limit nothing is counted, and the boot goes on.
    assert of_function(found)["update_process_times"] == 40
    assert "update_process_times" in found.limited
    assert found.offset


@pytest.mark.full
@pytest.mark.kernels
@pytest.mark.qemu
def test_kfence_is_called_in_softirqs() -> None:
    found = census("debian:6.12", ("set_memory_valid",), command_line="kfence.sample_interval=10")
    assert {row.context for row in found.rows} >= {Context.SOFTIRQ, Context.PROCESS}
    assert {row.locked for row in found.rows if row.context is Context.BOOTING} == {0}


# regions


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_regions_have_the_symbols_of_the_image_and_the_areas_around(name: str) -> None:
    image, offset = kernel_image(name), 0x2000_0000
    pool = 0xFFFF_0000_4000_0000
    found = regions(image, offset, 48, pool)
    text = image.symbols["vmap"] + offset
    bounds = {
        "kernel text": (text, image.symbols["_etext"] + offset - 1),
        "kernel rodata": (image.symbols["_etext"] + offset,),
        "linear map": (0xFFFF_0000_0000_0000, pool - 1, pool + (2 << 20)),
        "KFENCE pool": (pool, pool + (2 << 20) - 1),
        "modules": (image.layout.page_end, image.base - 1),
        "vmalloc": (image.base, image.base + offset + image.size, 0xFFFF_FBFF_0000_0000),
        "user": (0, (1 << 48) - 1),
    }
    for region, addresses in bounds.items():
        assert [found.of(va) for va in addresses] == [region] * len(addresses), region
    data = image.symbols["init_task"] + offset
    assert found.of(data) in ("kernel data", "kernel init or data")
    assert found.of((1 << 64) - 4096) == "a gap"


@pytest.mark.kernels
@pytest.mark.qemu
def test_struct_pages_are_where_the_kernel_has_them() -> None:
    """Judged by set_direct_map_invalid_noflush() itself, on a booted kernel: which descriptor it changes."""
    snapshot = booted()
    machine = snapshot.machine()
    here = regions(kernel_image(FAST), snapshot.origin.kaslr_offset, 48, 0)
    for _ in range(5):
        va = machine.call("vmalloc", 4096).ok().value
        area = machine.types["vm_struct"].at(machine.call("find_vm_area", va).ok().value)
        page = int.from_bytes(machine.read(int(area["pages"]), 8), "little")  # type: ignore[arg-type]
        (change,) = machine.call("set_direct_map_invalid_noflush", page).ok().changes
        assert here.address(page) == change.va
        assert here.of(change.va) == "linear map"


# counting

HERE = Regions((0, 0x10000, 0x20000), ("a", "b", "c"), (0, 0), 0, 0x8000, 64, 4096)


def call(function: str, *arguments: int, site: int = 8, context: Context = Context.PROCESS) -> Call:
    return Call(function, site, arguments, context, False)


def test_calls_are_counted_by_function_place_region_and_context() -> None:
    calls = [
        call("set_memory_ro", 0x10000, 3),
        call("set_memory_ro", 0x11000, 4),
        call("set_memory_ro", 0x11000, 4, context=Context.SOFTIRQ),
        call("set_memory_ro", 0x11000, 4, site=12),
        call("set_memory_ro", 0x21000, 4),
    ]
    random.Random(1).shuffle(calls)
    assert [row[2:6] for row in tally(calls, HERE)] == [
        ("b", Context.PROCESS, 2, 7),
        ("b", Context.SOFTIRQ, 1, 4),
        ("c", Context.PROCESS, 1, 4),
        ("b", Context.PROCESS, 1, 4),
    ]


@pytest.mark.parametrize(
    ("made", "region", "pages"),
    [
        (call("set_direct_map_default_noflush", 0x8000 + 64 * 17, 99), "b", 1),
        (call("set_direct_map_valid_noflush", 0x8000 + 64 * 33, 2, 1), "c", 2),
        (call("update_mapping_prot", 0, 0x10000, 0x3000, 7), "b", 3),
        (call("update_range_prot", 0x10000, 0x1001), "b", 2),
        (call("walk_kernel_page_table_range", 0x10000, 0x13000), "b", 3),
        (call("walk_page_range_novma", 0x20000, 0x10000, 0x13000), "b", 3),
        (call("kfree", 0x10000), "unknown", None),
    ],
    ids=lambda value: value.function if isinstance(value, Call) else None,
)
def test_ranges_are_read_from_the_arguments(made: Call, region: str, pages: int | None) -> None:
    (row,) = tally([made], HERE)
    assert (row.region, row.pages) == (region, pages)


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_every_public_function_that_changes_permissions_is_counted(name: str) -> None:
    """Judged by the symbols: whatever begins with set_memory_ or set_direct_map_ is there."""
    image = kernel_image(name)
    named = {n for n in image.symbols if re.match("set_(memory|direct_map)_", n) and image.symbols.type(n) in "tT"}
    assert named <= set(functions_of(image)) <= set(image.symbols)
    assert not PERMISSIONS.keys() & OTHERS.keys()


@pytest.mark.full
@pytest.mark.kernels
@pytest.mark.qemu
def test_a_kernel_elsewhere_than_expected_is_followed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a CPU that has random numbers of its own."""
    monkeypatch.setattr("emu.guest.Guest.expected_offset", lambda *_: 1 << 21)
    found = census(functions=("update_mapping_prot",))
    assert found.offset == booted().origin.kaslr_offset != 1 << 21
    assert of_function(found) == {"update_mapping_prot": 3}


@pytest.mark.kernels
@pytest.mark.qemu
def test_a_census_that_takes_too_long_is_ended() -> None:
    with pytest.raises(BootFailed, match=r"it was not at mark after 0\.1 s"):
        census(timeout=0.1)


@pytest.mark.kernels
def test_where_hard_interrupts_are_counted_is_what_the_kernel_adds() -> None:
    """Judged by irq_enter_rcu(), which adds 1 << shift to the count: ADD (immediate, shifted), or MOVZ and ADD."""
    for name in (*KERNELS, "debian:7.2-16k"):
        image = kernel_image(name)
        words = [image.word(image.symbols["irq_enter_rcu"] + 4 * i, 4) for i in range(8)]
        wide = [w for w in words if w & 0xFFC0_0000 == 0x1140_0000]  # add w, w, #imm, lsl #12
        moved = [w for w in words if w & 0xFFE0_0000 == 0x52A0_0000]  # movz w, #imm, lsl #16
        added = (wide[0] >> 10 & 0xFFF) << 12 if wide else (moved[0] >> 5 & 0xFFFF) << 16
        assert added == 1 << hardirq_shift(image.symbols), name


# what a boot leaves behind, and the debugger's part


@pytest.mark.kernels
@pytest.mark.qemu
@pytest.mark.parametrize("command", ["census", "snapshot boot"])
def test_sigterm_ends_qemu_and_leaves_no_file(command: str, tmp_path: Path) -> None:
    kernel = booted().origin.kernel
    endless = ["-o", str(tmp_path / "out.snap"), "--at", "600"] if command == "snapshot boot" else ["--after", "600"]
    arguments = [*command.split(), "--kernel", kernel, *endless]
    process = subprocess.Popen(
        [sys.executable, "-c", "from emu.cli import main; main()", *arguments],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    try:
        assert process.stderr.readline().startswith("booting")
        (folder,) = tmp_path.glob("pgtable-boot-*")
        end = time.monotonic() + 20
        while not processes_of(folder):  # in the middle of an exec a process has no command line yet
            assert time.monotonic() < end, "no QEMU"
        process.terminate()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert [line for line in said.splitlines() if not re.match(r"console: |\d+ calls", line)] == []
    assert list(tmp_path.iterdir()) == []
    assert not processes_of(folder)


def processes_of(folder: Path) -> list[str]:
    """Process numbers of what was started with files of `folder`."""
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in content(path)]


def content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has just ended
        return b""


def test_a_stop_that_comes_when_waiting_has_just_ended_is_seen_next_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Stub(str(tmp_path / "gdb"))
    with GdbStub(str(tmp_path / "gdb")) as stub:
        stub.go()
        stub._socket.sendall(b"\x03")  # its answer is on the way
        select.select([stub], [], [], 5.0)
        with monkeypatch.context() as late:
            late.setattr("emu.gdbstub.select.select", lambda *_: ([], [], []))
            assert not stub.wait(0.0)
        assert stub.wait(5.0)
    server.join(5)


def test_general_registers_come_at_once_and_registers_can_be_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"g": ["8877665544332211"], "P9=0100000000000080": ["OK"]}
    monkeypatch.setattr(Stub, "ANSWERS", Stub.ANSWERS | more)
    server = Stub(str(tmp_path / "gdb"))
    with GdbStub(str(tmp_path / "gdb")) as stub:
        assert stub.read_general() == {"x0": 0x1122334455667788}
        stub.write("VBAR_EL1", 1 << 63 | 1)
    server.join(5)
    assert "P9=0100000000000080" in server.seen
