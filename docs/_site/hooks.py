"""What mkdocs calls when it builds the site.

- `<!-- made: NAME -->` in a page becomes what NAME makes from the code (MADE).
- Each module of the three packages gets a page, which mkdocstrings fills from its docstrings; the command line's own
  modules do not: their reference is the commands'.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # mkdocs is run as a program: the checkout is not on its path

from docs._site import commands, evidence, layouts, modules  # noqa: E402

MADE: dict[str, Callable[[], str]] = {
    "stage 1": lambda: layouts.stage(stage2=False),
    "stage 2": lambda: layouts.stage(stage2=True),
    "128-bit": layouts.wide_descriptors,
    "registers": layouts.all_registers,
    "syndromes": layouts.all_syndromes,
    "tlbi operands": layouts.tlbi_operands,
    "commands": commands.all_commands,
    "schemas": commands.all_schemas,
    **evidence.MADE,
    **{f"modules of {package}": partial(modules.listed, package) for package in modules.PACKAGES},
}
_MARK = re.compile(r"^<!-- made: (.+) -->$", re.M)


def made(markdown: str) -> str:
    """A page with everything put in; KeyError for a name that nothing makes."""
    return _MARK.sub(lambda match: MADE[match[1]](), markdown)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """mkdocs' event."""
    return re.sub(r"^<!-- (?:setup\n.*?^|not run: [^\n]*)-->\n", "", made(markdown), flags=re.M | re.S)


def on_files(files: Files, config: MkDocsConfig, **_: Any) -> Files:
    """mkdocs' event."""
    for module in modules.every_module():
        package = module.partition(".")[0]
        text = f"# {module}\n\n[{package}](../{package}.md), one of its modules.\n\n::: {module}\n"
        files.append(File.generated(config, f"reference/python/{module}.md", content=text))
    return files
