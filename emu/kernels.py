"""Debian's arm64 kernels by name: chosen, fetched by the host's own apt client, kept in a cache.

Rules of this file:
- NAME is `debian:VERSION[-FLAVOUR]`. VERSION is a prefix by components of the upstream version; the newest match over
  all suites wins. A name in the cache is not looked up again.
- apt does the network, the signatures and the checksums. Configuration, lists and state are ours alone, in the cache,
  so nothing is installed and no root is needed; the mirror is the one that the host's apt sources name.
- A reader never sees half of anything: files come by os.replace, folders by rename, writers hold one lock.

Layout of the cache: apt/ (private apt, and index.json: what it found), kernels/PACKAGE_VERSION/ (vmlinuz and
kernel.json), kernels/names.json (asked name -> folder), lock.
Source: apt.conf(5), sources.list(5), deb-version(7).
"""

from __future__ import annotations

import bisect
import fcntl
import hashlib
import json
import os
import platform
import re
import select
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

from emu import jsontext, writing
from emu.deb import DebError, read_member

Progress: TypeAlias = Callable[[str], None]

PREFIX = "debian:"
FLAVOURS = ("cloud", "arm64", "rt", "16k")
BOOKWORM = ("bookworm", "bookworm-backports", "bookworm-updates")
TRIXIE = ("trixie", "trixie-backports", "trixie-updates")
SUITES = (*BOOKWORM, *TRIXIE, "forky", "sid")
SECURITY_SUITES = ("bookworm-security", "trixie-security")
INDEX_AGE = 24 * 3600  # seconds that the index is reused for resolving new names
STALL = 120  # seconds without a sign of life after which apt is stopped
HINT = "the path of a kernel file can be given instead of a name"


class KernelError(ValueError):
    """A name that cannot be turned into a kernel file; the message is one sentence that also says what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(f"{text}; {HINT}")


# names


class Name(NamedTuple):
    """A parsed NAME: the components of its version and its flavour, None for the default one."""

    version: tuple[str, ...]
    flavour: str | None


_NAME = re.compile(r"debian:([0-9]+(?:\.[0-9]+)*)(?:-(.*))?")


def is_name(text: str) -> bool:
    """Whether `text` is meant as a kernel's name, not as a path."""
    return text.startswith(PREFIX)


def parse_name(name: str) -> Name:
    """The parts of `debian:VERSION[-FLAVOUR]`. Raises KernelError."""
    match = _NAME.fullmatch(name)
    if not match:
        raise KernelError(f"{name!r} is not of the form debian:VERSION[-FLAVOUR], for example debian:6.12")
    version, flavour = match.groups()
    if flavour is not None and flavour not in FLAVOURS:
        raise KernelError(f"{name!r} asks for flavour {flavour!r}, which is none of {', '.join(FLAVOURS)}")
    return Name(tuple(version.split(".")), flavour)


VersionKey: TypeAlias = list[tuple[tuple[int, ...], int]]


def version_key(version: str) -> tuple[int, VersionKey, VersionKey]:
    """A sort key that orders Debian versions as deb-version(7) does."""
    epoch, _, rest = version.rpartition(":")
    upstream, _, revision = rest.rpartition("-") if "-" in rest else (rest, "", "")
    return int(epoch or 0), _part_key(upstream), _part_key(revision)


def _part_key(part: str) -> VersionKey:
    # The empty pair that ends every list is what "~" sorts before and all else sorts after.
    pairs = re.findall(r"([^0-9]*)([0-9]*)", part or "0")  # no revision is as good as revision 0
    return [((*map(_letter_order, text), 0), int(digits or 0)) for text, digits in pairs]


def _letter_order(letter: str) -> int:
    if letter == "~":
        return -1
    return ord(letter) if letter.isalpha() else ord(letter) + 256


# what the mirror has


@dataclass(frozen=True)
class Candidate:
    """A kernel package on the mirror: `version` is the package's, `upstream` the kernel's, `size` the download's."""

    package: str
    version: str
    upstream: str
    flavour: str
    suite: str
    size: int

    @property
    def folder(self) -> str:
        """Its place in the cache."""
        return f"{self.package}_{self.version}"


@dataclass(frozen=True)
class Kernel:
    """A kernel in the cache: what was asked for, what that was resolved to, and the image file."""

    name: str
    package: str
    version: str
    upstream: str
    flavour: str
    suite: str
    path: Path
    sha256: str

    def __fspath__(self) -> str:
        return str(self.path)


# Since 6.19 and 7.x linux-image-* is an empty package and the image is in linux-binary-*.
_PACKAGE = re.compile(r"linux-(?:image|binary)-[0-9]\S*?-(cloud-arm64|rt-arm64|arm64-16k|arm64)(-unsigned)?")
_FLAVOUR_OF = {"cloud-arm64": "cloud", "rt-arm64": "rt", "arm64-16k": "16k", "arm64": "arm64"}
_LEAST_SIZE = 1_000_000  # bytes; empty packages have 2 kB, images 10 MB and more
_REBUILD = re.compile(r"~(bpo|deb)[0-9]+[+u][0-9]+$")


def choose(candidates: Iterable[Candidate], name: str) -> Candidate:
    """The newest candidate that `name` matches. Raises KernelError, which says what there is nearby."""
    asked = parse_name(name)
    everything = list(candidates)
    depth = len(asked.version)
    matches = [c for c in everything if tuple(c.upstream.split(".")[:depth]) == asked.version]
    if not matches:
        raise KernelError(f"{name} is not on the Debian mirror (nearest there: {_nearby(everything, asked)})")
    wanted = (asked.flavour,) if asked.flavour else ("cloud", "arm64")
    of_flavour = [c for c in matches if c.flavour in wanted]
    if not of_flavour:
        there = ", ".join(sorted({c.flavour for c in matches}))
        raise KernelError(f"{name} is not on the Debian mirror, which has this version as {there}")
    return max(of_flavour, key=lambda c: (_rank(c), c.flavour == "cloud"))


def _rank(c: Candidate) -> tuple[Any, ...]:
    # The same source may be built for several suites (6.12.95-1, 6.12.95-1~bpo12+1). Of these builds a suite's own
    # archive goes before its security archive, which keeps what it has superseded for no fixed time: the name then
    # means the same kernel for longer.
    return version_key(_REBUILD.sub("", c.version)), c.suite not in SECURITY_SUITES, version_key(c.version)


def _nearby(candidates: list[Candidate], asked: Name) -> str:
    """The versions on either side of the one asked for, in as many components as were asked for (two at least)."""
    depth = max(2, len(asked.version))
    versions = sorted({".".join(c.upstream.split(".")[:depth]) for c in candidates}, key=version_key)
    at = bisect.bisect(versions, version_key(".".join(asked.version)), key=version_key)
    return ", ".join(versions[max(0, at - 3) : at + 3]) or "none"


def available(*, update: bool = False, progress: Progress | None = None) -> list[Candidate]:
    """All kernels on the mirror, newest last. Raises KernelError."""
    with _locked(progress) as root:
        return _Apt(root, progress).index(update=update)


def resolve(name: str, progress: Progress | None = None) -> Candidate:
    """The package that `name` means now; nothing is downloaded but the index. Raises KernelError."""
    parse_name(name)
    return choose(available(progress=progress), name)


# the cache


def cache_dir() -> Path:
    """Where kernels are kept; PGTABLE_CACHE moves it."""
    if root := os.environ.get("PGTABLE_CACHE"):
        return Path(root).absolute()
    from platformdirs import user_cache_dir  # only who has not set it needs it

    return Path(user_cache_dir("pgtable"))


def fetch(name: str, *, update: bool = False, progress: Progress | None = None) -> Kernel:
    """The kernel that `name` means, from the cache, else from the mirror; `update` asks the mirror in any case.

    `progress` is called with short messages. Raises KernelError.
    """
    parse_name(name)
    if not update and (kernel := _recall(name)):
        return kernel
    with _locked(progress) as root:
        folder = _install(_Apt(root, progress), name, update=update)
        _write_json(root / "kernels" / "names.json", {**_names(root), name: folder})
    if not (kernel := _recall(name)):
        raise KernelError(f"{name} was fetched but is damaged in the cache {root}")
    return kernel


def cached() -> list[Kernel]:
    """The kernels in the cache by asked name, oldest version first, then those that no name means any more."""
    root = cache_dir()
    names = _names(root)
    kept = [_load(root, name, folder) for name, folder in names.items()]
    known = sorted((k for k in kept if k), key=lambda k: (version_key(k.version), k.name))
    with suppress(OSError):
        others = sorted({p.parent.name for p in (root / "kernels").glob("[!.]*/kernel.json")} - set(names.values()))
        known += [k for k in (_load(root, "", folder) for folder in others) if k]
    return known


def _recall(name: str) -> Kernel | None:
    root = cache_dir()
    folder = _names(root).get(name)
    return _load(root, name, folder) if folder else None


def _names(root: Path) -> dict[str, str]:
    with suppress(OSError, ValueError):
        names = jsontext.loads((root / "kernels" / "names.json").read_bytes())
        if isinstance(names, dict):
            return {name: folder for name, folder in names.items() if isinstance(folder, str)}
    return {}


def _load(root: Path, name: str, folder: str) -> Kernel | None:
    """The kernel in a folder of the cache; None where it is not whole."""
    place = root / "kernels" / folder
    with suppress(OSError, ValueError, KeyError, TypeError):
        facts = jsontext.loads((place / "kernel.json").read_bytes())
        if (place / "vmlinuz").stat().st_size == facts["size"]:
            parts = {key: str(facts[key]) for key in ("package", "version", "upstream", "flavour", "suite", "sha256")}
            return Kernel(name=name, path=place / "vmlinuz", **parts)
    return None


def _install(apt: _Apt, name: str, *, update: bool) -> str:
    """Put the kernel that `name` means into the cache; its folder."""
    candidate = choose(apt.index(update=update), name)
    if _load(apt.root, name, candidate.folder):
        return candidate.folder
    try:
        _unpack(apt, name, candidate)
    except KernelError:
        if apt.updated:
            raise
        return _install(apt, name, update=True)  # the mirror may have replaced the package since the index was read
    return candidate.folder


def _unpack(apt: _Apt, name: str, candidate: Candidate) -> None:
    kernels = apt.root / "kernels"
    for left in kernels.glob(".*"):  # of a process that was killed: the lock is ours
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    part = kernels / f".part-{os.getpid()}"
    part.mkdir(parents=True)
    try:
        _fill(apt, name, candidate, part)
        final = kernels / candidate.folder
        if final.exists():  # damaged, or it would have been used
            shutil.rmtree(final)
        part.rename(final)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fill(apt: _Apt, name: str, candidate: Candidate, part: Path) -> None:
    deb = apt.download(candidate, part)
    try:
        member, content = read_member(deb, _is_kernel)
    except DebError as error:
        raise KernelError(f"{candidate.package} {candidate.version} cannot be unpacked ({error})") from None
    deb.unlink()
    writing.write(part / "vmlinuz", content)
    facts = {"name": name, **asdict(candidate), "download": candidate.size, "size": len(content), "member": member}
    _write_json(part / "kernel.json", {**facts, "sha256": hashlib.sha256(content).hexdigest()})


def _is_kernel(member: str) -> bool:
    """boot/vmlinuz-VERSION, and since 6.19 usr/lib/modules/VERSION/vmlinuz."""
    return member.startswith("boot/vmlinuz-") or bool(re.fullmatch(r"usr/lib/modules/[^/]+/vmlinuz", member))


def _write_json(path: Path, content: Any) -> None:
    writing.write(path, json.dumps(content, indent=1) + "\n")


@contextmanager
def _locked(progress: Progress | None) -> Iterator[Path]:
    """The cache directory, held by this process alone."""
    root = cache_dir()
    try:
        (root / "kernels").mkdir(parents=True, exist_ok=True)
        with (root / "lock").open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                _tell(progress, "waiting for another process that fetches a kernel")
                fcntl.flock(file, fcntl.LOCK_EX)
            yield root
    except OSError as error:
        raise KernelError(f"the cache {root} cannot be used ({error.strerror or error})") from None


def _tell(progress: Progress | None, message: str) -> None:
    if progress:
        progress(message)


# apt

_CONFIG = """\
Dir::Etc::Main "/dev/null";
Dir::Etc::Parts "/dev/null";
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "{root}/sources.list.d";
Dir::Etc::Preferences "/dev/null";
Dir::Etc::PreferencesParts "/dev/null";
Dir::State "{root}";
Dir::State::Lists "{root}/lists";
Dir::State::Status "/dev/null";
Dir::Cache "{root}/cache";
Dir::Cache::SrcPkgCache "";
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; }};
APT::Sandbox::User "root";
Acquire::Languages "none";
Acquire::GzipIndexes "true";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
"""
# How the host reaches its mirrors is its own affair; hooks, pins, other indexes and leave to skip signatures are not.
_HOST_CONFIG = re.compile(r"Acquire::(https?|Retries|ForceIPv[46]|Check-Valid-Until|Check-Date)\b", re.IGNORECASE)
_KEYRINGS = tuple(Path("/usr/share/keyrings") / f"debian-archive-keyring.{kind}" for kind in ("pgp", "gpg"))
_DEBIAN_SUITES = (*SUITES, "bullseye", "duke", "stable", "oldstable", "testing", "unstable")


# A suite that the mirror lacks, or whose key the host lacks, is skipped; apt reports it in one of these ways.
_ABSENT = re.compile(r"(does not have|no longer has) a Release file|is not signed|Failed to fetch \S+ +40[34]\b")


class _Source(NamedTuple):
    """One line or stanza of apt's sources."""

    uri: str
    suites: tuple[str, ...]
    components: tuple[str, ...]
    keyring: str


class _Apt:
    """The host's apt client with configuration, lists and state of our own."""

    def __init__(self, root: Path, progress: Progress | None) -> None:
        self.root, self.home, self.progress = root, root / "apt", progress
        self.updated = False

    def index(self, *, update: bool = False) -> list[Candidate]:
        """The kernels on the mirror as of now (`update`), else as of a day ago at most."""
        file = self.home / "index.json"
        if not update and (known := _fresh_index(file)):
            return known
        self._update()
        found = sorted(self._candidates(), key=_rank)
        if not found:
            raise KernelError("the host's Debian mirror lists no arm64 kernel")
        _write_json(file, {"schema": "pgtable.kernel-index/1", "kernels": [asdict(c) for c in found]})
        self.updated = True
        return found

    def download(self, c: Candidate, into: Path) -> Path:
        """The package's file, its checksum verified by apt."""
        label = f"fetching {c.package} {c.version} ({c.size / 1e6:.0f} MB)"
        done = self._run("apt-get", "download", f"{c.package}={c.version}", cwd=into, label=label)
        files = list(into.glob("*.deb"))
        if done.code or len(files) != 1:
            raise KernelError(f"{c.package} {c.version} cannot be downloaded ({done.reason})")
        return files[0]

    def _update(self) -> None:
        self._configure()
        done = self._run("apt-get", "update", label="reading the Debian mirror's index")
        absent = [problem for problem in done.problems if _ABSENT.search(problem)]
        serious = [problem for problem in done.problems if problem not in absent]
        if serious or not any((self.home / "lists").glob("*_Packages*")):
            raise KernelError(f"the host's Debian mirror cannot be read ({(*serious, *absent, 'no index')[0]})")
        for problem in absent:
            _tell(self.progress, f"skipped: {problem}")

    def _configure(self) -> None:
        sources = _private_sources(_host_sources(self._run))
        host = [line for line in self._run("apt-config", "dump", own=False).output if _HOST_CONFIG.match(line)]
        for folder in ("lists/partial", "cache/archives/partial", "sources.list.d"):
            (self.home / folder).mkdir(parents=True, exist_ok=True)
        (self.home / "sources.list.d" / "pgtable.sources").write_text(sources)
        config = self.home / "apt.conf"
        config.touch(0o600)  # the host's proxy may come with a password
        config.write_text(_CONFIG.format(root=self.home.resolve()) + "\n".join(host) + "\n")

    def _candidates(self) -> Iterator[Candidate]:
        names = [n for kind in ("image", "binary") for n in self._run("apt-cache", "pkgnames", f"linux-{kind}-").output]
        packages = sorted(name for name in names if _PACKAGE.fullmatch(name))
        if not packages:
            return
        suites = _suites(self._run("apt-cache", "madison", *packages).output)
        stanzas = _stanzas(self._run("apt-cache", "show", *packages).output)
        sizes = {(s["Package"], s["Version"]): int(s["Size"]) for s in stanzas}
        images = {key: size for key, size in sizes.items() if size >= _LEAST_SIZE and key in suites}
        for (package, version), size in images.items():
            match = _PACKAGE.fullmatch(package)
            if match and not (match[2] and (package.removesuffix(match[2]), version) in images):
                upstream = version.rpartition(":")[2].rpartition("-")[0]
                yield Candidate(package, version, upstream, _FLAVOUR_OF[match[1]], suites[package, version], size)

    def _run(self, *command: str, own: bool = True, cwd: Path | None = None, label: str = "") -> _Done:
        program = shutil.which(command[0])
        if not program:
            raise KernelError(f"{command[0]} is not on PATH, and Debian's kernels are fetched with it")
        environment = {**os.environ, "LC_ALL": "C.UTF-8"}
        if own:
            environment["APT_CONFIG"] = str(self.home.resolve() / "apt.conf")
        return _run([program, *command[1:]], environment, cwd, lambda done: _tell(self.progress, label + done))


def _fresh_index(file: Path) -> list[Candidate]:
    with suppress(OSError, ValueError, KeyError, TypeError):
        if 0 <= time.time() - file.stat().st_mtime < INDEX_AGE:
            return [Candidate(**row) for row in jsontext.loads(file.read_bytes())["kernels"]]
    return []


def _suites(madison: Iterable[str]) -> dict[tuple[str, str], str]:
    """The suite of each package and version, from rows `package | version | URI suite/component ...`."""
    order = (*SECURITY_SUITES[::-1], *SUITES[::-1])  # where there are several, the last one counts
    rows = [[part.strip() for part in line.split("|")] for line in madison if line.count("|") == 2]
    found = [(row[0], row[1], row[2].split()[1].rpartition("/")[0]) for row in rows]
    known = sorted((f for f in found if f[2] in order), key=lambda f: order.index(f[2]))
    return {(package, version): suite for package, version, suite in known}


def _stanzas(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """deb822 paragraphs, fields by name."""
    for paragraph in "\n".join(line for line in lines if not line.startswith("#")).split("\n\n"):
        joined = re.sub(r"\n[ \t]+", " ", paragraph.strip())
        pairs = (line.partition(":") for line in joined.splitlines())
        if fields := {key: value.strip() for key, _, value in pairs}:
            yield fields


# the mirror


def _host_sources(run: Callable[..., _Done]) -> list[_Source]:
    words = ("FILE", "Dir::Etc::sourcelist/f", "PARTS", "Dir::Etc::sourceparts/d")
    places = dict(p.split("=", 1) for p in shlex.split("\n".join(run("apt-config", "shell", *words, own=False).output)))
    files = [Path(places["FILE"])] if places.get("FILE") else []
    if places.get("PARTS"):
        files += sorted(Path(places["PARTS"]).glob("*"))
    sources: list[_Source] = []
    for file in files:
        with suppress(OSError, UnicodeDecodeError):
            if file.suffix == ".sources":
                sources += _deb822_sources(file.read_text())
            elif file.suffix == ".list":
                sources += _line_sources(file.read_text())
    return sources


def _deb822_sources(text: str) -> Iterator[_Source]:
    for stanza in _stanzas(re.sub(r"\n\s*\n", "\n\n", text).splitlines()):
        fields = {key.lower(): value.split() for key, value in stanza.items()}
        if "deb" in fields.get("types", ()) and fields.get("uris") and fields.get("enabled", ["yes"]) != ["no"]:
            suites, components = (tuple(fields.get(key, ())) for key in ("suites", "components"))
            yield _Source(fields["uris"][0], suites, components, " ".join(fields.get("signed-by", ())))


def _line_sources(text: str) -> Iterator[_Source]:
    for line in text.splitlines():
        if match := re.match(r"\s*deb\s+(?:\[(.*?)\]\s*)?(\S+)\s+(\S+)\s+([^#]*)", line):
            options, uri, suite, components = match.groups()
            signed = re.search(r"signed-by=(\S+)", options or "")
            yield _Source(uri, (suite,), tuple(components.split()), signed[1] if signed else "")


def _private_sources(host: list[_Source]) -> str:
    """Our sources file: the host's Debian mirror, and its security mirror if any, with the suites we look into."""
    debian = [s for s in host if "main" in s.components and not s.uri.startswith("cdrom:")]
    mirrors = [s for s in debian if set(s.suites) & set(_DEBIAN_SUITES)]
    security = [s for s in debian if set(s.suites) & {f"{suite}-security" for suite in _DEBIAN_SUITES}]
    if not mirrors:
        raise KernelError("the host's apt sources name no Debian mirror")
    own = _own_codename()  # whoever serves the host itself goes before mirrors that were added
    mirror = max(mirrors, key=lambda s: own in s.suites)
    stanzas = [_stanza(mirror, suite) for suite in SUITES]
    return "\n".join(stanzas + [_stanza(s, suite) for s in security[:1] for suite in SECURITY_SUITES])


def _own_codename() -> str:
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


def _stanza(source: _Source, suite: str) -> str:
    keyrings = {str(path) for path in _KEYRINGS if path.exists()}
    if source.keyring.startswith("/"):
        keyrings.add(source.keyring)  # a mirror may be signed again by who runs it
    signed = f"Signed-By: {' '.join(sorted(keyrings))}\n" if keyrings else ""
    return f"Types: deb\nURIs: {source.uri}\nSuites: {suite}\nComponents: main\nArchitectures: arm64\n{signed}"


# processes


class _Done(NamedTuple):
    """What a finished command left."""

    code: int
    output: list[str]
    errors: list[str]

    @property
    def problems(self) -> list[str]:
        """What apt says went wrong. That a mirror cannot be reached is but a warning of its."""
        return [m[1] for line in self.errors if (m := _PROBLEM.match(line))]

    @property
    def reason(self) -> str:
        """The first problem, else the last words."""
        return (*self.problems, *self.errors[-1:], f"exit code {self.code}")[0]


_PROBLEM = re.compile(r"(?:(?:E|Error): |(?:W|Warning): (?=Failed to fetch))(.*)")


def _run(command: list[str], environment: dict[str, str], cwd: Path | None, tell: Progress) -> _Done:
    """Run to the end. KernelError if nothing is heard for STALL seconds; nobody is left behind on the way out."""
    status, child_end = os.pipe()
    if command[0].endswith("apt-get"):
        command = [*command, "-o", f"APT::Status-Fd={child_end}"]
    with (
        os.fdopen(status, "rb", 0) as news,
        os.fdopen(child_end, "wb", 0) as theirs,
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
    ):
        streams: dict[str, Any] = {
            "stdin": subprocess.DEVNULL,
            "stdout": out,
            "stderr": err,
            "pass_fds": (child_end,),
        }
        # A session of its own: apt's helpers are stopped with it, and Ctrl-C reaches it through us alone.
        child = subprocess.Popen(command, env=environment, cwd=cwd, start_new_session=True, **streams)
        try:
            theirs.close()
            _follow(news, Path(command[0]).name, tell)
            return _Done(child.wait(STALL), _lines(out), _lines(err))
        except subprocess.TimeoutExpired:
            raise _stalled(Path(command[0]).name) from None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def _follow(news: IO[bytes], program: str, tell: Progress) -> None:
    """Pass on the percentages in `dlstatus:FILE:PERCENT:TEXT` lines until the command closes its end."""
    shown = ""
    while True:
        if not select.select([news], [], [], STALL)[0]:
            raise _stalled(program)
        if not (chunk := news.read(1 << 16)):
            return
        percent = re.findall(rb"^dlstatus:\d+:(\d+)", chunk, re.MULTILINE)
        if percent and (now := f": {percent[-1].decode()} %") != shown:
            tell(now)
            shown = now


def _stalled(program: str) -> KernelError:
    return KernelError(f"{program} gave no sign of life for {STALL} seconds and was stopped")


def _lines(file: IO[bytes]) -> list[str]:
    file.seek(0)
    return file.read().decode("utf-8", "replace").splitlines()
