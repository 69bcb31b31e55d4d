"""Files are written whole or not at all, in every way that writing can fail; a command writes nothing else.

Judges: the kernel's own full disk (a tmpfs of a few pages, /dev/full) and its limit of a file's size.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from emu import writing
from tests.emu.synthetic import make
from tests.fuzz.harness import ROOT
from tests.fuzz.tables import ram
from tests.pgtable.hand import ROOT as BASE
from tests.pgtable.hand import tcr

OLD = b"what was there"


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def pgtable(*arguments: str | Path, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    program = [sys.executable, "-c", "from emu.cli import main; main()", *map(str, arguments)]
    given = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(program, cwd=cwd, env=given, capture_output=True, text=True, check=False)


def one_sentence(done: subprocess.CompletedProcess[str], *says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("pgtable: error: ")
    for part in says:
        assert part in last, last


@pytest.fixture
def source(tmp_path: Path) -> tuple[str, ...]:
    """A raw dump with tables, and its registers."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "ram").write_bytes(ram())
    values = [f"TTBR{i}_EL1={BASE:#x}" for i in (0, 1)] + [f"TCR_EL1={tcr():#x}", "SCTLR_EL1=1", "MAIR_EL1=0xff"]
    return (f"raw:{tmp_path / 'in' / 'ram'}@{BASE:#x}", *(part for value in values for part in ("--reg", value)))


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 KiB."""
    place = tmp_path / "tiny"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "none", place], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("only root mounts a small file system")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


# the helper


def test_a_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with writing.replacing(path) as file:
        file.write(b"new")
        assert not path.exists()
    assert files(tmp_path) == {"file": b"new"}
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()
    writing.write(path, "süß")
    assert files(tmp_path) == {"file": "süß".encode()}


def _umask() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return umask


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError()])
def test_an_error_leaves_what_was_there(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "file").write_bytes(OLD)

    def fail() -> None:
        with writing.replacing(tmp_path / "file") as file:
            file.write(b"half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert files(tmp_path) == {"file": OLD}


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_is_full_at_the_end_leaves_what_was_there(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / "file").write_bytes(OLD)
    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        writing.write(tmp_path / "file", b"new")
    assert files(tmp_path) == {"file": OLD}


def test_it_is_on_the_disk_before_it_has_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    for name in ("fsync", "replace"):
        call: Callable[..., None] = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, call=call, name=name: (done.append(name), call(*a)))
    writing.write(tmp_path / "file", b"new")
    assert done == ["fsync", "replace"]


def test_new_takes_no_file_that_is_there(tmp_path: Path) -> None:
    writing.write(tmp_path / "file", OLD, new=True)
    with pytest.raises(FileExistsError):
        writing.write(tmp_path / "file", b"new", new=True)
    assert files(tmp_path) == {"file": OLD}


def test_links_stay_and_devices_are_written_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(OLD)
    (tmp_path / "link").symlink_to("file")
    writing.write(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    (tmp_path / "null").symlink_to("/dev/null")
    writing.write(tmp_path / "null", b"gone")
    assert Path("/dev/null").is_char_device()


def test_no_other_code_of_ours_opens_a_file_to_write_it() -> None:
    """But for QEMU's temporary folders, pipes, a lock, a trace that grows with a run, and xz inside the helper."""
    allowed = {
        "emu/writing.py": 2,
        "emu/guest.py": 4,
        "emu/tracing.py": 1,
        "emu/kernels.py": 4,
        "emu/judge/corpus.py": 1,
    }
    allowed |= {"emu/snippets/__init__.py": 1}
    pattern = r"""open\([^()]*["'][wxa]b?["']|\.write_(bytes|text)\(|mkstemp|NamedTemporaryFile"""
    done = subprocess.run(["grep", "-rEc", "--include=*.py", pattern, "emu", "pgtable", "kernel_model"], cwd=ROOT,
                          capture_output=True, text=True, check=True)  # fmt: skip
    found = dict(line.split(":") for line in done.stdout.splitlines() if not line.endswith(":0"))
    assert {name: int(n) for name, n in found.items()} == allowed


# commands


def test_a_full_disk_gives_one_sentence_and_leaves_no_half_file(source: tuple[str, ...], tiny: Path) -> None:
    (tiny / "map.svg").write_bytes(OLD)
    (tiny / "filler").write_bytes(bytes(24 << 10))
    commands = (
        ("map", *source, "-o", tiny / "map.svg"),
        ("map", *source, "-o", tiny / "map.html"),
        ("audit", *source, "--junit", tiny / "verdicts.xml"),
        ("gdb-script", "-o", tiny / "script.py"),
    )
    for command in commands:
        done = pgtable(*command)
        if command[0] == "audit" and done.returncode in (0, 1):
            continue  # its few lines did fit
        one_sentence(done, "No space left on device")
    assert set(files(tiny)) - {"verdicts.xml"} == {"map.svg", "filler"}
    assert (tiny / "map.svg").read_bytes() == OLD


def test_a_full_disk_behind_stdout_gives_one_sentence(source: tuple[str, ...]) -> None:
    program = [sys.executable, "-c", "from emu.cli import main; main()", "dump", *source, "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(program, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    one_sentence(done, "No space left on device")
    assert len(done.stderr.splitlines()) <= 2


def test_a_limit_of_the_size_of_files_gives_one_sentence(source: tuple[str, ...], tmp_path: Path) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    out = tmp_path / "out"
    out.mkdir()
    program = [sys.executable, "-c", "from emu.cli import main; main()", "map", *source, "-o", str(out / "a.html")]
    done = subprocess.run(program, cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, check=False)
    one_sentence(done, "File too large")
    assert files(out) == {}


@pytest.mark.full
def test_commands_write_nothing_but_their_output(source: tuple[str, ...], tmp_path: Path) -> None:
    places = {name: tmp_path / name for name in ("here", "home", "tmp", "cache")}
    for place in places.values():
        place.mkdir()
    environment = {"HOME": str(places["home"]), "TMPDIR": str(places["tmp"]), "PGTABLE_CACHE": str(places["cache"])}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1"}
    commands = (
        ("walk", *source, "0x0"), ("dump", *source), ("find", *source, "--pa", "0x80000000"),
        ("audit", *source, "--junit", "v.xml"), ("map", *source, "-o", "m.svg"), ("explain", "0x3"),
        ("find", source[0], "--roots"), ("walk", source[0], "0x0"), ("map", "--explorer", "-o", "e.html"),
    )  # fmt: skip
    for command in commands:
        assert pgtable(*command, cwd=places["here"], **environment).returncode in (0, 1, 2)
    assert set(files(places["here"])) == {"v.xml", "m.svg", "e.html"}
    for name in ("home", "tmp", "cache"):
        assert files(places[name]) == {}, name


# the cache, and several processes

READ = "import sys; from emu.image import KernelImage; print(len(KernelImage.load(sys.argv[1]).symbols.entries))"


def reader(kernel: Path, cache: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PGTABLE_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", READ, kernel], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )


def test_processes_that_share_a_cache_do_not_harm_each_other(tmp_path: Path) -> None:
    """Four read the same new kernel at once, one of them is killed in the middle; what is kept is whole."""
    kernel, cache = tmp_path / "kernel", tmp_path / "cache"
    kernel.write_bytes(made := bytes(make().content))
    several = [reader(kernel, cache) for _ in range(4)]
    end = time.monotonic() + 30
    while not list(cache.rglob("*")) and time.monotonic() < end:
        time.sleep(0.001)
    several[0].kill()
    answers = {process.communicate()[0] for process in several[1:]}
    several[0].communicate()
    assert len(answers) == 1
    place = next(cache.glob("images/*"))
    meta = json.loads((place / "meta.json").read_bytes())
    assert all((place / name).stat().st_size == row[0] for name, row in meta["files"].items())
    assert reader(kernel, cache).communicate()[0] in answers
    assert kernel.read_bytes() == made


def test_a_full_disk_under_the_cache_is_no_error(tmp_path: Path, tiny: Path) -> None:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(bytes(make().content))
    process = reader(kernel, tiny)
    assert int(process.communicate()[0]) > 600
    assert process.returncode == 0
    assert not [name for name in files(tiny) if Path(name).name.startswith(".")]


def test_what_killed_writers_left_goes_after_an_hour(tmp_path: Path) -> None:
    from emu import imagecache

    for name, age in ((".data.1-aa", 7200), (".data.2-bb", 10)):
        (tmp_path / name).write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    imagecache.store(tmp_path, {}, {})
    assert set(files(tmp_path)) == {".data.2-bb", "meta.json"}
