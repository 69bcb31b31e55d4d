"""The gdb commands `pgtable walk`, `dump`, `find`, `audit`, `diff`, `map` and `explain`, on the guest that gdb holds.

This file runs inside gdb, by whatever Python gdb has (3.6 or newer): it imports nothing of pgtable, not even numpy.
`pgtable gdb-script` prints it with PYTHON and MODULES filled in. A command starts pgtable as a child process, whose
SOURCE is this process: it asks for memory and registers over a socket, and what it prints becomes gdb's output.

Rules of this file:
- Nothing is written to the guest. Memory is read in QEMU's physical mode, which is left again before anything else
  happens: Ctrl-C waits for that.
- An error is one sentence (gdb.GdbError). The exit code is in $_pgtable.
- The talk: a line of words asks; the answer is a line `ok N` or `no N`, then N bytes (see emu/sources/parent.py).
Source: the manual of GDB, "Python API".
"""

import codecs
import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import termios
from collections.abc import Callable, Iterator

import gdb

PYTHON = ""  # the interpreter that runs pgtable
MODULES = ""  # the folder of its packages

START = "import sys; sys.argv[0] = 'pgtable'; sys.path.insert(0, %r); from emu.cli import main; main()"
PAGE = 4096
ERROR = "pgtable: error: "
MASK = (1 << 64) - 1

# What each does, and whether it reads the guest.
COMMANDS = {
    "walk": ("Walk the guest's tables for an address: every step, and which bit decided.", True),
    "dump": ("List what the guest's tables map, merged and filtered.", True),
    "find": ("Which VAs reach a PA, where a table is referred to, where a word is.", True),
    "audit": ("Judge what the guest's tables map: rules, each with the ranges that offend.", True),
    "diff": ("What another source, a snapshot or dump, maps differently than the guest.", True),
    "map": ("Draw what the guest maps: an HTML page or an SVG, -o FILE.", True),
    "explain": ("What a descriptor or a register value says, bit by bit.", False),
}
USAGE = """{title}
Usage: pgtable {name} {arguments}
A word that begins with $, & or *, or has $ behind =, is an expression of gdb.
pgtable {name} --help tells the options; where that says SOURCE, here it is the guest."""
ARGUMENTS = {"walk": "VA... [OPTIONS]", "diff": "SOURCE [OPTIONS]", "explain": "WORD|REGISTER=VALUE... [OPTIONS]"}


def sentence(error: BaseException) -> str:
    """What an exception says, in one line."""
    return " ".join(str(error).split())


# what the child asks for


def check_guest() -> None:
    """Raises gdb.error where there is no guest that stands still."""
    thread = gdb.selected_thread()
    if thread is None:
        raise gdb.error("gdb holds no guest: use `target remote HOST:PORT` first")
    if thread.is_running():
        raise gdb.error("the guest is running: interrupt it first")


def packet(text: str) -> str:
    """The stub's answer to a packet."""
    said = gdb.execute("maintenance packet " + text, to_string=True)
    found = re.search('received: "(.*)"', said)
    return found.group(1) if found else ""


@contextlib.contextmanager
def physical() -> "Iterator[None]":
    """Addresses are physical inside; then they are again what they were."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        before = "1" if packet("qqemu.PhyMemMode") == "1" else "0"
        try:
            if packet("Qqemu.PhyMemMode:1") != "OK":
                raise gdb.error("the stub does not read physical memory, as QEMU's does")
            yield
        finally:
            packet("Qqemu.PhyMemMode:" + before)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def pages(*pas: str) -> bytes:
    """For each PA, in hex, 1 and its page, or 0 where there is no memory."""
    guest, parts = gdb.selected_inferior(), []
    with physical():
        for pa in pas:
            try:
                parts.append(b"\1" + bytes(guest.read_memory(int(pa, 16), PAGE)))
            except gdb.MemoryError:
                parts.append(b"\0")
    return b"".join(parts)


def ranges() -> bytes:
    """Where QEMU says that there is RAM."""
    return bytes(gdb.execute("monitor info mtree -f", to_string=True).replace("\r", ""), "utf-8")


def registers(*names: str) -> bytes:
    """Lines NAME=VALUE of those that the target has, of the selected CPU."""
    found = []
    for name in names:
        with contextlib.suppress(gdb.error):
            value = gdb.parse_and_eval("$" + name)
            if value.type.code != gdb.TYPE_CODE_VOID:
                found.append(f"{name}={int(value) & MASK:#x}")
    return bytes("\n".join(found), "ascii")


def symbol(name: str) -> bytes:
    """Its address; nothing where gdb has no such symbol."""
    try:
        return bytes(f"{int(gdb.parse_and_eval(f'&{chr(39)}{name}{chr(39)}')) & MASK:#x}", "ascii")
    except gdb.error:
        return b""


def place(va: str) -> bytes:
    """An address by gdb's symbols, NAME or NAME+0xOFFSET; nothing where there is none."""
    found = re.match(r"(\S+)(?: \+ (\d+))? (?:in section|of) ", gdb.execute("info symbol " + va, to_string=True))
    if not found:
        return b""
    return bytes(found.group(1) + (f"+{int(found.group(2)):#x}" if found.group(2) else ""), "utf-8")


ANSWERS: "dict[str, Callable[..., bytes]]" = {
    "pages": pages,
    "ranges": ranges,
    "registers": registers,
    "symbol": symbol,
    "place": place,
}


class Link:
    """Our end of the socket over which the child asks."""

    def __init__(self) -> None:
        self.socket, self.theirs = socket.socketpair()
        self.rest = b""

    def fileno(self) -> int:
        """For select."""
        return self.socket.fileno()

    def keep_ours(self) -> None:
        """The child has the other end."""
        self.theirs.close()

    def close(self) -> None:
        """Our end."""
        self.socket.close()

    def take(self) -> bool:
        """Answers what has been asked; False when nobody will ask any more."""
        try:
            data = self.socket.recv(1 << 16)
            *lines, self.rest = (self.rest + data).split(b"\n")
            for line in lines:
                self.answer(*line.decode().split())
        except OSError:  # the child is gone
            return False
        return bool(data)

    def answer(self, what: str, *words: str) -> None:
        """Sends the answer, or why there is none."""
        try:
            check_guest()
            kind, content = "ok", ANSWERS[what](*words)
        except gdb.error as error:
            kind, content = "no", bytes(sentence(error), "utf-8")
        # Without the flag a child that is gone would end gdb.
        self.socket.sendall(bytes(f"{kind} {len(content)}\n", "ascii") + content, getattr(socket, "MSG_NOSIGNAL", 0))


# what the child prints


class Output:
    """A pipe, or a terminal, whose text becomes gdb's."""

    def __init__(self, like_terminal: bool) -> None:
        self.ours, self.theirs = os.openpty() if like_terminal else os.pipe()
        if like_terminal:
            mode = termios.tcgetattr(self.theirs)
            mode[1] &= ~termios.OPOST  # line ends stay
            termios.tcsetattr(self.theirs, termios.TCSANOW, mode)
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def fileno(self) -> int:
        """For select."""
        return self.ours

    def keep_ours(self) -> None:
        """The child has the other end."""
        os.close(self.theirs)

    def close(self) -> None:
        """Our end."""
        os.close(self.ours)

    def take(self) -> bool:
        """Passes on what there is; False at the end."""
        try:
            data = os.read(self.ours, 1 << 16)
        except OSError:  # a terminal that nobody has any more
            data = b""
        self.show(self.decoder.decode(data, not data))
        return bool(data)

    def show(self, text: str) -> None:
        """Gives text to gdb."""
        gdb.write(text)


class Errors(Output):
    """The child's stderr: its one sentence of an error is kept, the rest shown."""

    rest, error = "", ""

    def show(self, text: str) -> None:
        """Takes whole lines."""
        *lines, self.rest = (self.rest + text).split("\n")
        for line in lines:
            if line.startswith(ERROR):
                self.error = line
            else:
                gdb.write(line + "\n", gdb.STDERR)


# the child


def environment(link: Link) -> "dict[str, str]":
    """That of gdb, with gdb's width and style."""
    found = {**os.environ, "PGTABLE_PARENT": str(link.theirs.fileno())}
    width = gdb.parameter("width")
    if width:
        found["COLUMNS"] = str(width)
    if not gdb.parameter("style enabled"):
        found["NO_COLOR"] = "1"
    return found


def start(words: "list[str]", link: Link, out: Output, err: Output) -> "subprocess.Popen[bytes]":
    """Starts pgtable with these words. Raises gdb.GdbError."""
    try:
        if not os.path.isdir(os.path.join(MODULES, "emu")):
            raise gdb.GdbError(f"{ERROR}pgtable is not in {MODULES} any more: print this script again")
        return subprocess.Popen(
            [PYTHON, "-E", "-P", "-c", START % MODULES, *words],
            stdin=subprocess.DEVNULL,
            stdout=out.theirs,
            stderr=err.theirs,
            pass_fds=[link.theirs.fileno()],
            env=environment(link),
            start_new_session=True,  # Ctrl-C is ours
        )
    except OSError as error:
        raise gdb.GdbError(f"{ERROR}{PYTHON} cannot be run ({error.strerror}): print this script again") from None
    finally:
        for end in (link, out, err):
            end.keep_ours()


def run(words: "list[str]", like_terminal: bool) -> None:
    """Runs pgtable with these words, answers it, shows what it prints, keeps its exit code. Raises gdb.GdbError."""
    ends = link, out, err = Link(), Output(like_terminal), Errors(False)
    try:
        child = start(words, link, out, err)
        try:
            serve(*ends)
        except BaseException:  # Ctrl-C, or q in gdb's pager
            child.kill()
            raise
        finally:
            code = child.wait()
    finally:
        for end in ends:
            end.close()
    gdb.set_convenience_variable("_pgtable", code)
    if err.error:
        raise gdb.GdbError(err.error)


def serve(*ends: "Link | Output") -> None:
    """Until the child has closed everything."""
    left = set(ends)
    while left:
        for end in select.select(left, [], [])[0]:
            if not end.take():
                left.remove(end)


# the commands


def number(expression: str) -> str:
    """The value of an expression of gdb. Raises gdb.GdbError."""
    try:
        return f"{int(gdb.parse_and_eval(expression)) & MASK:#x}"
    except (gdb.error, TypeError, ValueError) as error:
        raise gdb.GdbError(f"{ERROR}{expression}: {sentence(error)}") from None


def evaluated(word: str) -> str:
    """A word of the command line: expressions become numbers."""
    if word.startswith(("$", "&", "*")):
        return number(word)
    name, equals, value = word.partition("=")
    return name + equals + number(value) if value.startswith("$") else word


class Command(gdb.Command):
    """One `pgtable NAME`."""

    def __init__(self, name: str, title: str, reads_guest: bool) -> None:
        self.__doc__ = USAGE.format(name=name, title=title, arguments=ARGUMENTS.get(name, "[OPTIONS]"))
        self.words = [name, "parent:gdb"] if reads_guest else [name]
        super().__init__("pgtable " + name, gdb.COMMAND_DATA, gdb.COMPLETE_SYMBOL if name == "walk" else -1)

    def invoke(self, text: str, from_tty: bool) -> None:
        """Called by gdb."""
        words = [evaluated(word) for word in gdb.string_to_argv(text)]
        run([*self.words, *words], from_tty and os.isatty(1))


class Pgtable(gdb.Command):
    """AArch64 page tables: of the guest that gdb holds, and of words."""

    def __init__(self) -> None:
        super().__init__("pgtable", gdb.COMMAND_DATA, gdb.COMPLETE_COMMAND, True)

    def invoke(self, text: str, from_tty: bool) -> None:
        """Called by gdb where no known command follows."""
        if text:
            raise gdb.GdbError(f"{ERROR}there is no command {text.split()[0]}; help pgtable lists them")
        gdb.execute("help pgtable")


Pgtable()
for _name, (_title, _reads_guest) in COMMANDS.items():
    Command(_name, _title, _reads_guest)
