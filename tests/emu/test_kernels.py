"""emu.kernels and `pgtable kernel`: names and choice as rules, the cache against a fake apt, and the real mirror.

The fake apt (FAKE_APT below, on PATH as apt-get, apt-cache and apt-config) serves what mirror.json says, writes down
every call, and fails, hangs or dies where told to.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # its types are a package of their own
import pytest
from click.testing import CliRunner, Result

from emu import kernels
from emu.cli_kernel import kernel as command
from emu.kernels import Candidate, Kernel, KernelError, Name, choose, is_name, parse_name, version_key
from tests.emu.test_deb import make_deb
from tests.kernels import lack

ROOT = Path(__file__).resolve().parents[2]

# names


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("debian:6.1", Name(("6", "1"), None)),
        ("debian:6", Name(("6",), None)),
        ("debian:6.12.95", Name(("6", "12", "95"), None)),
        ("debian:7.2-16k", Name(("7", "2"), "16k")),
        ("debian:6.12-cloud", Name(("6", "12"), "cloud")),
        ("debian:6.12-arm64", Name(("6", "12"), "arm64")),
        ("debian:6.12-rt", Name(("6", "12"), "rt")),
    ],
)
def test_a_name_is_a_version_and_perhaps_a_flavour(text: str, name: Name) -> None:
    assert parse_name(text) == name


MALFORMED = [
    *("debian:", "debian:6.", "debian:.6", "debian:6..1", "debian:v6.1", "debian:six", "debian: 6.1", "debian:6.1 "),
    *("debian:6.1\n", "debian:٦.1", "debian:6.1+deb12", "6.1", "ubuntu:6.1", "Debian:6.1", "", "debian:6.1-"),
    *("debian:6.1-64k", "debian:6.1-Cloud", "debian:6.1-cloud-rt", "debian:6.1/../..", "debian:6.1-../x"),
]  # fmt: skip


@pytest.mark.parametrize("text", MALFORMED)
def test_a_malformed_name_is_one_sentence_that_mentions_files(text: str) -> None:
    with pytest.raises(KernelError, match=r"of the form debian:VERSION|asks for flavour") as caught:
        parse_name(text)
    assert str(caught.value).endswith("; the path of a kernel file can be given instead of a name")
    assert "\n" not in str(caught.value)


def test_what_is_meant_as_a_name() -> None:
    assert is_name("debian:6.1")
    assert is_name("debian:nonsense")
    assert not is_name("./debian/6.1")
    assert not is_name("vmlinuz")


# versions; dpkg is the judge

ORDERED = [
    *("6.1.9-1", "6.1.170-1", "6.1.176-1", "6.12~rc6-1", "6.12-1", "6.12.9-1", "6.12.95-1~bpo12+1"),
    *("6.12.95-1~deb12u1", "6.12.95-1", "6.12.95-1+b1", "6.12.95-2~bpo12+1", "6.12.95-2", "6.12.95-10", "6.12.107-1"),
    *("7.0-1", "10.0-1", "1:0.1-1"),
]  # fmt: skip
TRICKY = ["1.0", "1.0-0", "1.", "1", "1~", "1~~", "1~a", "1a", "1a0", "1A", "1+", "01", "0:1", "1.0~-1", "1.0-rc-1"]


def dpkg_says_less(a: str, b: str) -> bool:
    return subprocess.run(["dpkg", "--compare-versions", a, "lt-nl", b], capture_output=True).returncode == 0


@pytest.mark.skipif(not shutil.which("dpkg"), reason="dpkg is the judge: apt-get install dpkg")
def test_versions_sort_as_dpkg_sorts_them() -> None:
    pairs = itertools.permutations(ORDERED + TRICKY, 2)
    wrong = [(a, b) for a, b in pairs if dpkg_says_less(a, b) != (version_key(a) < version_key(b))]
    assert not wrong


def test_versions_sort_in_debian_order() -> None:
    backwards = ORDERED[::-1]
    assert sorted(backwards, key=version_key) == ORDERED


# choice


def candidate(version: str, flavour: str = "cloud", suite: str = "trixie") -> Candidate:
    upstream = version.rpartition("-")[0]
    return Candidate(f"linux-image-{version}-{flavour}", version, upstream, flavour, suite, 20_000_000)


MIRROR = [
    *(candidate("6.1.170-3", f, "bookworm") for f in ("arm64", "cloud", "rt")),
    *(candidate("6.1.176-1", f, "bookworm-security") for f in ("arm64", "cloud", "rt")),
    *(candidate("6.12.9-1", f, "trixie") for f in ("arm64", "cloud", "rt", "16k")),
    *(candidate("6.12.95-1~bpo12+1", f, "bookworm-backports") for f in ("arm64", "cloud")),
    *(candidate("6.12.95-1", f, "trixie-security") for f in ("arm64", "cloud")),
    *(candidate("6.12.107-1", f, "trixie") for f in ("arm64", "cloud", "rt", "16k")),
    *(candidate("7.2.12-1", f, "forky") for f in ("arm64", "cloud", "16k")),
    *(candidate("7.2.12-1~bpo13+1", f, "trixie-backports") for f in ("arm64", "cloud", "16k")),
    *(candidate("7.2.13-1", f, "sid") for f in ("arm64", "16k")),
    candidate("7.3.4-1~bpo13+1", "rt", "trixie-backports"),
]


@pytest.mark.parametrize(
    ("name", "version", "flavour"),
    [
        ("debian:6.1", "6.1.176-1", "cloud"),  # by components: 6.12.* is not 6.1
        ("debian:6.1.17", None, ""),  # nor is 6.1.176 a 6.1.17
        ("debian:6.1.170", "6.1.170-3", "cloud"),
        ("debian:6.1-rt", "6.1.176-1", "rt"),
        ("debian:6", "6.12.107-1", "cloud"),
        ("debian:6.12", "6.12.107-1", "cloud"),
        ("debian:6.12-16k", "6.12.107-1", "16k"),
        ("debian:6.12.95", "6.12.95-1~bpo12+1", "cloud"),  # a suite's own build of a source before security's
        ("debian:7.2.12", "7.2.12-1", "cloud"),  # of two such builds the newer
        ("debian:7.2", "7.2.13-1", "arm64"),  # the newest has no cloud flavour
        ("debian:7.2-cloud", "7.2.12-1", "cloud"),
        ("debian:7.3", None, ""),  # only rt: not what a plain name means
        ("debian:7.3-rt", "7.3.4-1~bpo13+1", "rt"),
        ("debian:06.12", None, ""),
    ],
)
def test_the_newest_match_over_all_suites_wins(name: str, version: str | None, flavour: str) -> None:
    for mirror in (MIRROR, MIRROR[::-1]):
        if version is None:
            with pytest.raises(KernelError, match="is not on the Debian mirror"):
                choose(mirror, name)
        else:
            chosen = choose(mirror, name)
            assert (chosen.version, chosen.flavour) == (version, flavour)


def test_a_security_update_of_the_same_upstream_version_wins() -> None:
    mirror = [candidate("6.12.90-1", suite="trixie"), candidate("6.12.90-2", suite="trixie-security")]
    assert choose(mirror, "debian:6.12").version == "6.12.90-2"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "debian:6.6",
            r"debian:6\.6 is not on the Debian mirror \(nearest there: 6\.1, 6\.12, 7\.2, 7\.3\); the path",
        ),
        ("debian:9", r"nearest there: 6\.12, 7\.2, 7\.3\)"),
        ("debian:6.12.96", r"nearest there: 6\.1\.176, 6\.12\.9, 6\.12\.95, 6\.12\.107, 7\.2\.12, 7\.2\.13\)"),
        (
            "debian:6.1-16k",
            r"debian:6\.1-16k is not on the Debian mirror, which has this version as arm64, cloud, rt;",
        ),
    ],
)
def test_an_unknown_name_says_what_is_nearby(name: str, message: str) -> None:
    with pytest.raises(KernelError, match=message):
        choose(MIRROR, name)


def test_an_empty_mirror_is_said() -> None:
    with pytest.raises(KernelError, match="nearest there: none"):
        choose([], "debian:6.1")


# the fake apt

FAKE_APT = """\
#!{python} -I
import json, os, re, shutil, sys, time
from pathlib import Path

home = Path({home!r})
tool, *words = [Path(sys.argv[0]).name, *sys.argv[1:]]
with (home / "calls").open("a") as calls:
    calls.write(" ".join([tool, *words]) + "\\n")
mirror = json.loads((home / "mirror.json").read_text())
mode = mirror["modes"].get(tool + " " + words[0], "")
config = Path(os.environ["APT_CONFIG"]).read_text() if tool != "apt-config" else ""
status = next((int(w.split("=")[1]) for w in words if w.startswith("APT::Status-Fd=")), None)

if mode == "hang":
    time.sleep(600)
for line in mode.splitlines():
    print(line, file=sys.stderr)
if status is not None:
    os.write(status, b"dlstatus:1:0.0:a\\ndlstatus:1:41.7:a\\n")
    time.sleep(0.02)
    os.write(status, b"dlstatus:1:97.5:a\\n")
match tool, words[0]:
    case "apt-config", "shell":
        print("FILE='/nonexistent/sources.list'\\nPARTS=" + repr(str(home / "sources")))
    case "apt-config", "dump":
        print(mirror["config"])
    case "apt-get", "update":
        if not mirror["packages"]:
            sys.exit(100)
        lists = Path(re.search('Dir::State::Lists "(.*)"', config)[1])
        (lists / "mirror_trixie_main_binary-arm64_Packages.lz4").touch()
        sys.exit(100 if mode else 0)
    case "apt-cache", "pkgnames":
        print(*(p["package"] for p in mirror["packages"] if p["package"].startswith(words[1])), sep="\\n")
    case "apt-cache", "madison":
        for p in mirror["packages"]:
            for suite in p["suites"] if p["package"] in words else ():
                print(p["package"], p["version"], "mirror://x " + suite + "/main arm64 Packages", sep=" | ")
    case "apt-cache", "show":
        for p in mirror["packages"]:
            if p["package"] in words:
                print("Package:", p["package"] + "\\nVersion:", p["version"], end="\\n")
                print("Description: a kernel\\n of several lines\\nSize:", p["size"], end="\\n\\n")
    case "apt-get", "download":
        package, version = words[1].split("=")
        deb = Path(package + "_" + version + "_arm64.deb")
        shutil.copy(home / "debs" / deb.name, deb)
        if mode.startswith("E:"):
            sys.exit(100)
        if mode == "pause":
            (home / "pid").write_text(str(os.getpid()))
            (home / "pid").rename(home / "downloading")
            time.sleep(1)
    case _:
        sys.exit("unexpected call")
"""


@dataclass
class Apt:
    """The fake's switches."""

    home: Path
    cache: Path

    def serve(self, *packages: dict[str, Any], modes: dict[str, str] | None = None, config: str = "") -> None:
        content = {"packages": packages, "modes": modes or {}, "config": config}
        (self.home / "mirror.json").write_text(json.dumps(content))

    def add(
        self, package: str, version: str, *suites: str, kernel: bytes = b"", size: int = 20_000_000
    ) -> dict[str, Any]:
        if kernel:
            files = {"./usr/share/doc": b"text", f"./boot/vmlinuz-{version}": kernel}
            if package.startswith("linux-binary"):
                files = {"./usr/lib/modules/x/kernel/a.ko": b"ko", f"./usr/lib/modules/{version}/vmlinuz": kernel}
            make_deb(self.home / "debs" / f"{package}_{version}_arm64.deb", files)
        return {"package": package, "version": version, "suites": suites or ["trixie"], "size": size}

    def calls(self) -> list[str]:
        """The calls since last asked, without their options."""
        file = self.home / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        file.unlink(missing_ok=True)
        return [line.split(" -o ")[0] for line in lines]

    def debris(self) -> list[str]:
        """Whatever in the cache is not whole."""
        return [str(p) for p in (self.cache / "kernels").rglob("*") if p.name.startswith(".") or p.suffix == ".deb"]


SOURCES = """\
# the host's mirror
Types: deb deb-src
URIs: mirror://own/debian
Suites: trixie
 trixie-updates
Components: main contrib
Signed-By: /keys/own.gpg

Types: deb
URIs: mirror://own/security
Suites: trixie-security
Components: main
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Apt:
    home, tools, cache = tmp_path / "apt", tmp_path / "bin", tmp_path / "cache"
    for folder in (home / "debs", home / "sources", tools):
        folder.mkdir(parents=True)
    (home / "sources" / "debian.sources").write_text(SOURCES)
    script = tools / "apt-get"
    script.write_text(FAKE_APT.format(python=sys.executable, home=str(home)))
    script.chmod(0o755)
    for name in ("apt-cache", "apt-config"):
        (tools / name).symlink_to(script)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("PGTABLE_CACHE", str(cache))
    monkeypatch.delenv("APT_CONFIG", raising=False)
    fake = Apt(home, cache)
    fake.serve(
        fake.add("linux-image-6.1.0-50-cloud-arm64", "6.1.176-1", "bookworm", "bookworm-security", kernel=b"six one"),
        fake.add("linux-image-6.1.0-50-cloud-arm64-unsigned", "6.1.176-1", "bookworm", kernel=b"unsigned"),
        fake.add("linux-image-6.1.0-50-cloud-arm64-dbg", "6.1.177-1", "bookworm", size=900_000_000),
        fake.add("linux-image-6.1-cloud-arm64", "6.1.178-1", "bookworm", size=1500),
        fake.add("linux-image-arm64", "7.9-1", size=1500),
        fake.add("linux-binary-7.3.4-cloud-arm64", "7.3.4-1", "sid", kernel=b"seven three"),
        fake.add("linux-image-7.3.4-cloud-arm64", "7.3.4-1", "sid", size=1900),
        fake.add("linux-image-7.2.1-arm64-16k-unsigned", "7.2.1-1", "forky", kernel=b"only unsigned"),
        fake.add("linux-image-8.0-arm64", "8.0.1-1", "experimental", kernel=b"not ours"),
    )
    return fake


def rows(found: list[Candidate]) -> list[tuple[str, str, str, str]]:
    return [(c.package, c.upstream, c.flavour, c.suite) for c in found]


def test_available_lists_images_and_nothing_else(apt: Apt) -> None:
    assert rows(kernels.available()) == [
        ("linux-image-6.1.0-50-cloud-arm64", "6.1.176", "cloud", "bookworm"),
        ("linux-image-7.2.1-arm64-16k-unsigned", "7.2.1", "16k", "forky"),
        ("linux-binary-7.3.4-cloud-arm64", "7.3.4", "cloud", "sid"),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [("debian:6.1", b"six one"), ("debian:7.3", b"seven three"), ("debian:7.2-16k", b"only unsigned")],
)
def test_fetch_gives_the_image_and_says_what_it_is(apt: Apt, name: str, content: bytes) -> None:
    got = kernels.fetch(name)
    assert got.path.read_bytes() == content
    assert Path(got) == got.path
    assert got.name == name
    assert got.sha256 == hashlib.sha256(content).hexdigest()
    assert got.path.parent.name == f"{got.package}_{got.version}"
    assert kernels.cached() == [got]
    assert apt.debris() == []


def test_a_cached_name_is_not_looked_up_again(apt: Apt) -> None:
    first = kernels.fetch("debian:6.1")
    assert apt.calls()
    assert kernels.fetch("debian:6.1") == first
    assert apt.calls() == []


def test_a_cached_name_needs_no_lock(apt: Apt) -> None:
    first = [kernels.fetch(name) for name in ("debian:6.1", "debian:7.3")]
    (apt.cache / "lock").unlink()
    (apt.cache / "lock").mkdir()  # so that whoever wants it fails
    assert [kernels.fetch(name) for name in ("debian:6.1", "debian:7.3")] == first
    with pytest.raises(KernelError, match="cannot be used"):
        kernels.fetch("debian:7.2-16k")


def test_the_index_is_read_once_a_day(apt: Apt) -> None:
    kernels.fetch("debian:6.1")
    assert "apt-get update" in apt.calls()
    kernels.fetch("debian:7.3")
    assert apt.calls() == ["apt-get download linux-binary-7.3.4-cloud-arm64=7.3.4-1"]
    assert kernels.resolve("debian:7.2-16k").suite == "forky"
    assert apt.calls() == []
    yesterday = time.time() - kernels.INDEX_AGE - 1
    os.utime(apt.cache / "apt" / "index.json", (yesterday, yesterday))
    kernels.fetch("debian:7.2-16k")
    assert "apt-get update" in apt.calls()


def test_another_name_for_a_cached_package_is_no_download(apt: Apt) -> None:
    first = kernels.fetch("debian:6.1")
    apt.calls()
    second = kernels.fetch("debian:6.1.176-cloud")
    assert apt.calls() == []
    assert (second.path, second.name) == (first.path, "debian:6.1.176-cloud")


def test_update_asks_the_mirror_and_keeps_the_older_kernel(apt: Apt) -> None:
    old = kernels.fetch("debian:6.1")
    apt.serve(apt.add("linux-image-6.1.0-51-cloud-arm64", "6.1.180-1", "bookworm", kernel=b"newer"))
    assert kernels.fetch("debian:6.1") == old
    new = kernels.fetch("debian:6.1", update=True)
    assert new.path.read_bytes() == b"newer"
    assert kernels.fetch("debian:6.1") == new
    assert [(k.name, k.path) for k in kernels.cached()] == [("debian:6.1", new.path), ("", old.path)]
    apt.calls()
    kernels.fetch("debian:6.1", update=True)
    assert not any("download" in call for call in apt.calls())


def test_a_package_that_the_mirror_has_replaced_is_looked_up_again(apt: Apt) -> None:
    kernels.available()
    (apt.home / "debs" / "linux-image-6.1.0-50-cloud-arm64_6.1.176-1_arm64.deb").unlink()
    apt.serve(apt.add("linux-image-6.1.0-51-cloud-arm64", "6.1.180-1", "bookworm", kernel=b"newer"))
    assert kernels.fetch("debian:6.1").upstream == "6.1.180"


def test_progress_is_told_in_percent(apt: Apt) -> None:
    told: list[str] = []
    kernels.fetch("debian:6.1", progress=told.append)
    subjects = ("reading the Debian mirror's index", "fetching linux-image-6.1.0-50-cloud-arm64 6.1.176-1 (20 MB)")
    assert told == [f"{subject}: {percent} %" for subject in subjects for percent in (41, 97)]


# what apt is given

HOST_CONFIG = """\
APT::Update::Post-Invoke:: "touch /tmp/hook";
DPkg::Pre-Invoke:: "false";
Acquire::http::Proxy "http-proxy";
Acquire::Check-Valid-Until "false";
Acquire::AllowInsecureRepositories "1";
Acquire::Languages:: "en";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "true";"""


def test_apt_gets_the_hosts_mirror_and_proxy_but_neither_hooks_nor_leave_to_trust(apt: Apt) -> None:
    mirror = json.loads((apt.home / "mirror.json").read_text())
    apt.serve(*mirror["packages"], config=HOST_CONFIG)
    kernels.available()
    config = (apt.cache / "apt" / "apt.conf").read_text()
    assert [line for line in HOST_CONFIG.splitlines() if line in config] == [
        'Acquire::http::Proxy "http-proxy";',
        'Acquire::Check-Valid-Until "false";',
    ]
    assert (apt.cache / "apt" / "apt.conf").stat().st_mode & 0o77 == 0
    sources = (apt.cache / "apt" / "sources.list.d" / "pgtable.sources").read_text().split("\n\n")
    found = {s.split("Suites: ")[1].split()[0]: s for s in sources if s}
    assert set(found) == {*kernels.SUITES, *kernels.SECURITY_SUITES}
    assert all("/keys/own.gpg" in found[suite] and "own/debian\n" in found[suite] for suite in kernels.SUITES)
    assert all("own/security\n" in found[suite] for suite in kernels.SECURITY_SUITES)


MIRRORS = [
    ("deb mirror://a/debian trixie main\n", "a/debian"),
    (
        "# deb mirror://z sid main\ndeb-src mirror://y sid main\ndeb [signed-by=/k] mirror://b sid main # x\n",
        "b",
    ),
    ("deb mirror://other jammy main\ndeb mirror://c/debian stable contrib main\n", "c/debian"),
    ("deb cdrom:[Debian]/ trixie main\ndeb mirror://d bullseye main\n", "d"),
    ("deb mirror://e/added sid main\ndeb mirror://e/own bookworm main\n", "e/own"),
]


@pytest.mark.parametrize(("text", "uri"), MIRRORS, ids=[uri for _, uri in MIRRORS])
def test_one_line_sources(apt: Apt, monkeypatch: pytest.MonkeyPatch, text: str, uri: str) -> None:
    monkeypatch.setattr(kernels, "_own_codename", lambda: "bookworm")
    disabled = "Types: deb\nURIs: mirror://off\nSuites: bookworm\nComponents: main\nEnabled: no\n"
    (apt.home / "sources" / "debian.sources").unlink()
    (apt.home / "sources" / "0.sources").write_text(disabled)
    (apt.home / "sources" / "a.list").write_text(text)
    (apt.home / "sources" / "0.list.save").write_text("deb mirror://backup bookworm main\n")
    kernels.available()
    sources = (apt.cache / "apt" / "sources.list.d" / "pgtable.sources").read_text()
    assert {line for line in sources.splitlines() if line.startswith("URIs")} == {f"URIs: mirror://{uri}"}


# what goes wrong


def refused(name: str = "debian:6.1") -> str:
    with pytest.raises(KernelError) as caught:
        kernels.fetch(name)
    text = str(caught.value)
    assert text.endswith("; the path of a kernel file can be given instead of a name")
    assert "\n" not in text
    return text


def modes(apt: Apt, **modes: str) -> None:
    """Set the fake's modes; `apt_get_update` is the call `apt-get update`."""
    mirror = json.loads((apt.home / "mirror.json").read_text())
    calls = {key.replace("_", "-", 1).replace("_", " "): mode for key, mode in modes.items()}
    apt.serve(*mirror["packages"], modes=calls)


def test_without_apt(apt: Apt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(apt.home))
    assert "apt-config is not on PATH" in refused()


def test_without_a_debian_mirror(apt: Apt) -> None:
    (apt.home / "sources" / "debian.sources").write_text(
        "Types: deb\nURIs: mirror://x\nSuites: jammy\nComponents: main\n"
    )
    assert "the host's apt sources name no Debian mirror" in refused()


def test_a_suite_that_the_mirror_lacks_is_skipped(apt: Apt) -> None:
    lacking = "E: The repository 'mirror://x sid Release' does not have a Release file."
    modes(apt, apt_get_update=lacking)
    told: list[str] = []
    assert kernels.fetch("debian:6.1", progress=told.append).upstream == "6.1.176"
    assert f"skipped: {lacking[3:]}" in told


@pytest.mark.parametrize(
    "words",
    [
        "W: Failed to fetch mirror://x/InRelease  Temporary failure resolving 'x'",
        "E: Failed to fetch mirror://x/InRelease  500  Internal Server Error",
        "E: Write error - write (28: No space left on device)",
    ],
)
def test_a_mirror_that_cannot_be_read_is_no_smaller_mirror(apt: Apt, words: str) -> None:
    modes(apt, apt_get_update=words)
    assert words[3:] in refused()
    assert not (apt.cache / "apt" / "index.json").exists()


def test_a_mirror_without_any_of_the_suites(apt: Apt) -> None:
    apt.serve(modes={"apt-get update": "E: The repository 'mirror://x trixie Release' does not have a Release file."})
    assert "cannot be read (The repository 'mirror://x trixie Release'" in refused()


def test_a_failing_download_leaves_nothing(apt: Apt) -> None:
    modes(apt, apt_get_download="E: Failed to fetch mirror://x/a.deb  Hash Sum mismatch")
    assert "Hash Sum mismatch" in refused()
    assert apt.debris() == []
    assert kernels.cached() == []


@pytest.mark.parametrize("call", ["apt_get_update", "apt_get_download", "apt_cache_show"])
def test_an_apt_that_hangs_is_stopped(apt: Apt, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    monkeypatch.setattr(kernels, "STALL", 1)
    modes(apt, **{call: "hang"})
    start = time.monotonic()
    assert "gave no sign of life for 1 seconds" in refused()
    assert time.monotonic() - start < 20
    assert apt.debris() == []


def test_a_package_without_an_image(apt: Apt) -> None:
    apt.serve(apt.add("linux-image-6.1.0-50-cloud-arm64", "6.1.176-1", "bookworm"))
    make_deb(apt.home / "debs" / "linux-image-6.1.0-50-cloud-arm64_6.1.176-1_arm64.deb", {"./boot/config": b"y"})
    assert "cannot be unpacked" in refused()
    assert apt.debris() == []


def test_a_cache_that_cannot_be_written(apt: Apt) -> None:
    apt.cache.write_text("a file where the folder should be")
    assert f"the cache {apt.cache} cannot be used" in refused()


def test_a_damaged_cache_entry_is_fetched_again(apt: Apt) -> None:
    path = kernels.fetch("debian:6.1").path
    path.write_bytes(b"six")
    assert kernels.cached() == []
    assert kernels.fetch("debian:6.1").path.read_bytes() == b"six one"
    (path.parent / "kernel.json").write_text("{")
    assert kernels.fetch("debian:6.1").path.read_bytes() == b"six one"
    (apt.cache / "kernels" / "names.json").write_text("[]")
    assert kernels.fetch("debian:6.1").path.read_bytes() == b"six one"


# several processes

FETCH = """
import sys
from emu import kernels
print(kernels.fetch(sys.argv[1], progress=lambda message: print(message, file=sys.stderr)).path)
"""


def start_fetch(name: str = "debian:6.1") -> subprocess.Popen[str]:
    program = [sys.executable, "-c", FETCH, name]
    return subprocess.Popen(program, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not come"
        time.sleep(0.01)


def test_two_processes_at_once_fetch_once(apt: Apt) -> None:
    modes(apt, apt_get_download="pause")
    both = [start_fetch(), start_fetch()]
    outputs = [p.communicate(timeout=60) for p in both]
    assert [p.returncode for p in both] == [0, 0], outputs
    assert len({out for out, _ in outputs}) == 1
    assert Path(outputs[0][0].strip()).read_bytes() == b"six one"
    assert sorted(c.split()[1] for c in apt.calls() if c.startswith("apt-get")) == ["download", "update"]
    assert any("waiting for another process" in err for _, err in outputs)


@pytest.fixture
def paused(apt: Apt) -> Iterator[subprocess.Popen[str]]:
    """A process in the middle of its download."""
    modes(apt, apt_get_download="pause")
    process = start_fetch()
    wait_for(apt.home / "downloading")
    yield process
    process.kill()
    process.communicate()


def test_a_half_written_kernel_is_never_seen(apt: Apt, paused: subprocess.Popen[str]) -> None:
    while paused.poll() is None:
        for known in kernels.cached():
            assert known.path.read_bytes() == b"six one"
        whole = [p for p in (apt.cache / "kernels").glob("linux-*") if not (p / "kernel.json").exists()]
        assert whole == []
    assert [k.name for k in kernels.cached()] == ["debian:6.1"]


def test_ctrl_c_leaves_nothing_and_nobody(apt: Apt, paused: subprocess.Popen[str]) -> None:
    paused.send_signal(signal.SIGINT)
    _, err = paused.communicate(timeout=10)
    assert "KeyboardInterrupt" in err
    with pytest.raises(ProcessLookupError):
        os.kill(int((apt.home / "downloading").read_text()), 0)
    assert apt.debris() == []
    assert kernels.cached() == []


def test_a_killed_process_leaves_nothing_that_lasts(apt: Apt, paused: subprocess.Popen[str]) -> None:
    paused.kill()
    paused.wait()
    assert kernels.cached() == []
    (apt.cache / "kernels" / ".names.json.1").touch()  # killed while it wrote that
    modes(apt)
    assert kernels.fetch("debian:6.1").path.read_bytes() == b"six one"
    assert apt.debris() == []


# the command line


def run(*words: str, code: int = 0) -> Result:
    result = CliRunner().invoke(command, words)
    assert result.exit_code == code, result.output
    return result


def answer(name: str, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run(*words, "--json").stdout)
    schema = json.loads((ROOT / "docs" / "schema" / f"{name}.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(found, schema)
    assert next(iter(found.items())) == ("schema", f"pgtable.{name}/1")
    return found


def test_fetch_prints_the_answer_on_stdout_and_progress_on_stderr(apt: Apt) -> None:
    result = run("fetch", "debian:6.1")
    assert str(apt.cache) in result.stdout
    assert "fetching" not in result.stdout
    assert result.stderr.splitlines() == [
        "reading the Debian mirror's index",
        "fetching linux-image-6.1.0-50-cloud-arm64 6.1.176-1 (20 MB)",
    ]
    assert answer("kernel-fetch", "fetch", "debian:6.1")["upstream"] == "6.1.176"


def test_list_shows_the_cache_and_with_all_the_mirror(apt: Apt) -> None:
    assert answer("kernel-list", "list")["kernels"] == []
    assert "pgtable kernel fetch" in run("list").stderr
    kernels.fetch("debian:7.3")
    assert [k["name"] for k in answer("kernel-list", "list")["kernels"]] == ["debian:7.3"]
    everything = answer("kernel-list", "list", "--all")["kernels"]
    names = [(k["name"], bool(k["path"])) for k in everything]
    assert names == [("debian:7.3", True), ("debian:6.1.176-cloud", False), ("debian:7.2.1-16k", False)]
    assert "debian:7.2.1-16k" in run("list", "--all").stdout


def test_every_name_that_list_all_prints_means_the_package_beside_it(apt: Apt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "available", lambda **_: sorted(MIRROR, key=kernels._rank))
    named = [k for k in answer("kernel-list", "list", "--all")["kernels"] if k["name"]]
    assert [choose(MIRROR, k["name"]).package for k in named] == [k["package"] for k in named]
    assert len(named) < len(MIRROR)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("fetch", "debian:9"), "debian:9 is not on the Debian mirror"),
        (("fetch", "vmlinuz"), "'vmlinuz' is not of the form debian:VERSION"),
        (("info", "debian:x"), "'debian:x' is not of the form debian:VERSION"),
        (("info", "/nonexistent/vmlinuz"), "/nonexistent/vmlinuz does not exist"),
        (("info", "debian:6.1"), "no kernel image"),  # what the fake serves is none
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(apt: Apt, words: tuple[str, ...], message: str) -> None:
    result = run(*words, code=2)
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("pgtable: error: ")


# the real mirror


def real(name: str) -> Kernel:
    try:
        return kernels.fetch(name)
    except KernelError as error:
        lack("kernels", f"no kernel {name}: `pgtable kernel fetch {name}` says: {error}")
        raise


@pytest.mark.kernels
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("debian:6.1", "linux-image-6.1.0-[0-9]+-cloud-arm64"),
        ("debian:6.12", r"linux-image-6\.12\.[0-9]+\+deb13.*-cloud-arm64"),
        ("debian:7.3", r"linux-binary-7\.3\..*-cloud-arm64"),
        ("debian:7.2-16k", r"linux-binary-7\.2\..*-arm64-16k"),
        ("debian:6.12.95", r"linux-image-6\.12\.95\+deb12-cloud-arm64"),
    ],
)
def test_real_kernels_are_what_their_names_say(name: str, package: str) -> None:
    got = real(name)
    content = got.path.read_bytes()
    assert re.fullmatch(package, got.package)
    assert content[0x38:0x3C] == b"ARMd"
    assert hashlib.sha256(content).hexdigest() == got.sha256
    assert f"Linux version {got.package.split('-', 2)[2]} ".encode() in content
    assert (content.find(b"\0walk_page_range_novma\0") >= 0) == (name in ("debian:6.1", "debian:6.12.95"))


@pytest.mark.kernels
def test_real_info_says_what_the_kernel_is() -> None:
    real("debian:7.2-16k")
    found = answer("kernel-info", "info", "debian:7.2-16k")
    assert (found["page_size"], found["levels"], found["va_bits"], found["va_bits_min"]) == (16384, 4, 52, 47)
    assert found["compiler"].startswith("aarch64-linux-gnu-gcc")
    assert found["symbols"] > 50_000
    by_path = answer("kernel-info", "info", found["path"])
    assert {k: v for k, v in by_path.items() if v != found[k]} == {
        "source": found["path"], "package": None, "version": None, "suite": None
    }  # fmt: skip


@pytest.mark.kernels
@pytest.mark.full
def test_real_cold_fetch_in_a_cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    warm = real("debian:7.3")
    monkeypatch.setenv("PGTABLE_CACHE", str(tmp_path / "a cache"))
    told: list[str] = []
    cold = kernels.fetch("debian:7.3", progress=told.append)
    assert cold.path != warm.path
    assert cold.path.is_relative_to(tmp_path)
    assert any(message.endswith("100 %") for message in told)
    assert {"bookworm", "trixie"} <= {c.suite for c in kernels.available()}
