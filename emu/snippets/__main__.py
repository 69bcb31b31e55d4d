"""`python -m emu.snippets`: assembles the snippets again."""

from emu.snippets import remake

remake()
