"""`pgtable completion`: what makes a shell complete commands, options, their values, and SOURCE.

The words come from click's own completion, which runs `pgtable` with _PGTABLE_COMPLETE set. Bash has a script of our
own: it breaks words at `:` and `=`, which click's does not expect, and SOURCE may be `debian:7.3` or a file.
Source: the manual of bash, "Programmable Completion".
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import click
from click.shell_completion import (
    CompletionItem,
    ShellComplete,
    add_completion_class,
    get_completion_class,
    split_arg_string,
)

VARIABLE = "_PGTABLE_COMPLETE"
SCHEMES = ("raw:", "qmp:", "gdb:")
STUB = "gdb:127.0.0.1:1234"  # where QEMU's -s listens

_BASH = r"""%(complete_func)s() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$'\n' item word broken="" files=""
    word="${line##*[[:space:]=]}"
    [[ $COMP_WORDBREAKS == *:* ]] && broken="${word%%"${word##*:}"}"
    COMPREPLY=()
    for item in $(COMP_LINE="$line" %(complete_var)s=bash_complete "$1"); do
        case "$item" in
            plain,*) item="${item#plain,}"; COMPREPLY+=("${item#"$broken"}") ;;
            file,* | dir,*) files=yes ;;
        esac
    done
    if [[ -n $files && ${#COMPREPLY[@]} == 0 ]]; then
        compopt -o default
    elif [[ -n $files ]]; then
        for item in $(compgen -f -- "$word"); do
            [[ -d $item ]] && item="$item/"
            COMPREPLY+=("${item#"$broken"}")
        done
    fi
    [[ ${#COMPREPLY[@]} == 1 && ${COMPREPLY[0]} == *[:/] ]] && compopt -o nospace
    return 0
}
complete -o nosort -F %(complete_func)s %(prog_name)s
"""

EXAMPLE = """\b
Examples:
  pgtable completion bash > ~/.local/share/bash-completion/completions/pgtable
  pgtable completion zsh > "${fpath[1]}/_pgtable"
  pgtable completion fish > ~/.config/fish/completions/pgtable.fish
"""


class Bash(ShellComplete):
    """Bash, told the line and not its pieces."""

    name = "bash"
    source_template = _BASH

    def get_completion_args(self) -> tuple[list[str], str]:
        """The words before the one that is being written, without the program, and that one."""
        line = os.environ["COMP_LINE"]
        words = split_arg_string(line)
        incomplete = "" if line[-1:].isspace() else words.pop()
        return words[1:], incomplete

    def format_completion(self, item: CompletionItem) -> str:
        """A line for the script."""
        return f"{item.type},{item.value}"


def register() -> None:
    """Makes click use ours for bash."""
    add_completion_class(Bash)


@click.command(epilog=EXAMPLE)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that lets SHELL complete commands, options, their values, and SOURCE.

    Save it where the shell looks for such scripts, or for one session: source <(pgtable completion bash).
    """
    from emu.cli import cli

    register()
    kind = get_completion_class(shell)
    assert kind
    click.echo(kind(cli, {}, "pgtable", VARIABLE).source())


# what SOURCE may become


def sources(incomplete: str) -> list[CompletionItem]:
    """Cached kernels, schemes and files that begin so."""
    scheme, colon, rest = incomplete.partition(":")
    if colon and scheme == "qmp":
        return [CompletionItem(f"qmp:{name}") for name in _files(rest)]
    if colon and scheme == "raw":
        done, comma, last = rest.rpartition(",")
        return [CompletionItem(f"raw:{done}{comma}{name}") for name in _files(last)]
    words = (*_kernels(), STUB) if colon else (*_kernels(), *SCHEMES)
    known = [CompletionItem(word) for word in words if word.startswith(incomplete)]
    return known if colon else [*known, CompletionItem(incomplete, type="file")]


def _kernels() -> list[str]:
    from emu.kernels import cached

    return [kernel.name for kernel in cached() if kernel.name]


def _files(begin: str) -> Iterator[str]:
    """Paths that begin so, in order; those of folders end in a slash."""
    folder, name = os.path.split(begin)
    try:
        found = sorted(os.scandir(folder or "."), key=lambda entry: entry.name)
    except (OSError, ValueError):  # ValueError: a path with a NUL
        return
    for entry in found:
        if entry.name.startswith(name) and (name or not entry.name.startswith(".")):
            yield os.path.join(folder, entry.name) + ("/" if entry.is_dir() else "")
