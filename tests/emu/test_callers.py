"""Who calls what, judged by objdump over the same code, and by sites that are known by name."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from emu.branches import FORMS, B, Flow, Form, displacement, flow, sites
from emu.callers import CALL, CODE, CONDITIONAL, JUMP, POINTER, RELATIVE, TAIL, code_ranges, find
from emu.image import KernelImage, SymbolError
from tests.kernels import kernel_image, lack

ALL = ("debian:6.1", "debian:6.12", "debian:7.3", "debian:7.2-16k")
OBJDUMP = "aarch64-linux-gnu-objdump"
SEED = 20261123


# encodings, as `aarch64-linux-gnu-as` gives them

WORDS = {
    "bl .+8": (0x94000002, Flow.CALL, 2),
    "b .-4": (0x17FFFFFF, Flow.JUMP, -1),
    "b .+0x7fffffc": (0x15FFFFFF, Flow.JUMP, 0x1FFFFFF),
    "b.eq .+16": (0x54000080, Flow.CONDITIONAL, 4),
    "cbz w3, .-8": (0x34FFFFC3, Flow.CONDITIONAL, -2),
    "cbnz x3, .+8": (0xB5000043, Flow.CONDITIONAL, 2),
    "tbz w5, #3, .-4": (0x361FFFE5, Flow.CONDITIONAL, -1),
    "tbnz x5, #33, .+12": (0xB7080065, Flow.CONDITIONAL, 3),
    "br x16": (0xD61F0200, Flow.AWAY, None),
    "blr x16": (0xD63F0200, Flow.CALL, None),
    "ret": (0xD65F03C0, Flow.AWAY, None),
    "retaa": (0xD65F0BFF, Flow.AWAY, None),
    "eret": (0xD69F03E0, Flow.AWAY, None),
    "blraa x1, x2": (0xD73F0822, Flow.CALL, None),
    "braa x1, x2": (0xD71F0822, Flow.AWAY, None),
    "brk #0x800": (0xD4210000, Flow.TRAP, None),
    "hlt #1": (0xD4400020, Flow.TRAP, None),
    "udf #0": (0x00000000, Flow.TRAP, None),
    "svc #0": (0xD4000001, Flow.CALL, None),
    "hvc #0": (0xD4000002, Flow.CALL, None),
    "nop": (0xD503201F, Flow.ON, None),
    "add x0, x1, #4": (0x91001020, Flow.ON, None),
    "ldr x0, .+8": (0x58000040, Flow.ON, None),
    "adrp x0, .": (0x90000000, Flow.ON, None),
}


@pytest.mark.parametrize("text", WORDS)
def test_a_word_does_what_its_name_says(text: str) -> None:
    word, does, ahead = WORDS[text]
    assert (flow(word), displacement(word)) == (does, ahead)


def test_the_words_are_what_the_assembler_makes_of_their_names(tmp_path: Path) -> None:
    if shutil.which("aarch64-linux-gnu-as") is None:
        lack("binutils", "no aarch64-linux-gnu-as: install binutils-aarch64-linux-gnu")
    known = [text for text in WORDS if "udf" not in text and "adrp" not in text]
    source, made, raw = (tmp_path / name for name in ("a.s", "a.o", "a.bin"))
    source.write_text(".arch armv8.5-a\n" + "\n".join(known) + "\n")
    subprocess.run(["aarch64-linux-gnu-as", "-o", made, source], check=True)
    subprocess.run(["aarch64-linux-gnu-objcopy", "-O", "binary", made, raw], check=True)
    assert dict(zip(known, np.fromfile(raw, "<u4").tolist(), strict=True)) == {t: WORDS[t][0] for t in known}


@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_sites_are_the_words_whose_displacement_leads_there(form: Form) -> None:
    rng = np.random.default_rng(SEED)
    words = rng.integers(0, 1 << 32, 20_000, np.uint32)
    branches = [i for i, word in enumerate(words.tolist()) if word & form.mask == form.value]
    for i in rng.choice(branches, 50).tolist():
        ahead = displacement(int(words[i]))
        assert ahead is not None
        there = i + ahead
        expected = [k for k in branches if k + (displacement(int(words[k])) or 0) == there]
        assert sites(words, form, there).tolist() == expected


def test_sites_at_the_ends_of_the_reach() -> None:
    for form in FORMS[1:]:
        words = np.zeros(2 * form.reach + 3, np.uint32)
        there = form.reach + 1
        first, last = there - form.reach + 1, there + form.reach
        words[first] = form.value | form.reach - 1 << form.low
        words[last] = form.value | form.reach << form.low
        assert sites(words, form, there).tolist() == [first, last]
        assert displacement(int(words[last])) == -form.reach
    assert B.reach == 1 << 25


# the whole code, by objdump

Found = dict[int, list[tuple[int, str]]]
_LINE = re.compile(r"^\s*([0-9a-f]+):\t[0-9a-f]{8} \t(bl|b|b\.\w+|cbn?z|tbn?z)\t.*?0x([0-9a-f]+)$")


def objdump(image: KernelImage, start: int, end: int, tmp_path: Path) -> Found:
    """By target: (site, mnemonic) of every branch in [start, end)."""
    if shutil.which(OBJDUMP) is None:
        lack("binutils", f"no {OBJDUMP}: install binutils-aarch64-linux-gnu")
    raw = tmp_path / "code.bin"
    raw.write_bytes(image.bytes_at(start, end - start))
    command = [OBJDUMP, "-D", "-b", "binary", "-m", "aarch64", f"--adjust-vma={start:#x}", str(raw)]
    found: Found = defaultdict(list)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        for line in process.stdout:
            parts = _LINE.match(line)
            if parts:
                found[int(parts[3], 16)].append((int(parts[1], 16), parts[2]))
    assert process.returncode == 0
    return found


_KINDS = {"bl": {CALL}, "b": {TAIL, JUMP}}


def agree(image: KernelImage, found: Found, start: int, end: int, count: int) -> int:
    """Compares `count` functions; returns how many sites they have."""
    random_functions = random.Random(SEED)
    known = set(image.symbols.entries.addresses.tolist())
    targets = sorted(known & found.keys())
    total = 0
    for address in random_functions.sample(targets, min(count, len(targets))):
        mine = [site for site in find(image, address).calls if start <= site.address < end]
        assert [site.address for site in mine] == [at for at, _ in found[address]], hex(address)
        for site, (_, mnemonic) in zip(mine, found[address], strict=True):
            assert site.kind in _KINDS.get(mnemonic, {CONDITIONAL, JUMP}), site
        total += len(mine)
    return total


@pytest.mark.kernels
def test_objdump_sees_the_same_calls_in_two_mebibytes(tmp_path: Path) -> None:
    image = kernel_image("debian:6.12")
    start = image.symbols["set_memory_valid"] & -4096
    assert agree(image, objdump(image, start, start + (2 << 20), tmp_path), start, start + (2 << 20), 30) > 30


@pytest.mark.full
@pytest.mark.kernels
def test_objdump_sees_the_same_calls_in_the_whole_kernel(tmp_path: Path) -> None:
    image = kernel_image("debian:7.3")
    for start, end in code_ranges(image):
        assert agree(image, objdump(image, start, end, tmp_path), start, end, 400) > 400


# sites that are known by name


CALLERS = {
    "debian:6.1": {"arch_kexec_protect_crashkres": 1, "arch_kexec_unprotect_crashkres": 1},
    "debian:6.12": {
        "kfence_init_pool": 3,
        "kfence_guarded_free": 4,
        "__kfence_alloc": 1,
        "kfence_handle_page_fault": 2,
    },
    "debian:7.3": {
        "arm64_hibernate_pm_notify": 2,
        "mark_rodata_ro": 1,
        "set_direct_map_valid_noflush": 1,
        "kfence_init_pool": 3,
        "kfence_guarded_free": 4,
        "__kfence_alloc": 1,
        "kfence_handle_page_fault": 2,
    },
}


@pytest.mark.kernels
@pytest.mark.parametrize("name", CALLERS)
def test_who_calls_set_memory_valid(name: str) -> None:
    counts: dict[str, int] = defaultdict(int)
    found = find(kernel_image(name), "set_memory_valid")
    for site in found.calls:
        assert site.kind == CALL
        counts[site.function.partition(".")[0]] += 1
    assert counts == CALLERS[name]
    assert found.pointers == ()


@pytest.mark.kernels
def test_a_function_that_goes_round_does_not_call_itself() -> None:
    found = find(kernel_image("debian:6.12"), "__secondary_too_slow")
    assert ("__secondary_too_slow+0xc", JUMP) in [(site.place, site.kind) for site in found.calls]


@pytest.mark.kernels
def test_a_member_of_a_table_of_functions_is_found_as_a_pointer() -> None:
    image = kernel_image("debian:7.3")
    found = find(image, "pageattr_pte_entry")
    assert (found.calls, [(s.place, s.kind) for s in found.pointers]) == ((), [("pageattr_ops+0x20", POINTER)])
    assert image.word(found.pointers[0].address) == found.address


@pytest.mark.kernels
def test_an_argument_made_by_adrp_and_add_is_found_in_code() -> None:
    image = kernel_image("debian:6.12")
    found = find(image, "change_page_range").pointers
    users = {"__change_memory_common", "set_direct_map_invalid_noflush", "set_direct_map_default_noflush"}
    assert {site.function for site in found} == users
    assert {site.kind for site in found} == {CODE}


@pytest.mark.kernels
def test_an_export_is_a_relative_pointer() -> None:
    kinds = {site.place: site.kind for site in find(kernel_image("debian:7.3"), "kfree").pointers}
    assert kinds["__ksymtab_kfree"] == RELATIVE
    assert not [place for place in kinds if place.startswith("kallsyms")]


@pytest.mark.kernels
@pytest.mark.parametrize("name", ALL)
def test_the_linkers_lists_of_functions_are_left_out(name: str) -> None:
    image = kernel_image(name)
    assert find(image, "vfs_read").pointers == ()  # called by name only, and not exported
    assert len(find(image, "seq_lseek").pointers) > 50


@pytest.mark.kernels
def test_pointers_of_a_sample_of_functions_are_all_the_words_that_hold_them() -> None:
    image = kernel_image("debian:7.3")  # RELR: no rows that repeat a pointer
    words = np.frombuffer(image.data.data, "<u8", len(image.data) // 8)
    where: dict[int, list[int]] = defaultdict(list)
    for k in np.flatnonzero(words >> 48 == 0xFFFF).tolist():
        where[int(words[k])].append(image.base + 8 * k)
    start, end = image.symbols["__start_mcount_loc"], image.symbols["__stop_mcount_loc"]
    names = [n for n in image.symbols if n.startswith("seq_") and image.symbols.type(n) == "T"]
    for name in names:
        wanted = [at for at in where[image.symbols[name]] if not start <= at < end]
        assert [s.address for s in find(image, name).pointers if s.kind == POINTER] == wanted, name


# what cannot be found


@pytest.mark.kernels
def test_names_and_addresses_that_are_none() -> None:
    image = kernel_image("debian:7.3")
    with pytest.raises(SymbolError, match=r"no symbol kfence_init_pool; it has kfence_init_pool\.part\.0"):
        find(image, "kfence_init_pool")
    with pytest.raises(ValueError, match="0x1234: outside "):
        find(image, 0x1234)
    assert find(image, image.symbols["set_memory_valid"]) == find(image, "set_memory_valid")
