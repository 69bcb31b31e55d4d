"""Outside judges of address translation: questions, recorded answers, and QEMU to ask anew.

- `corpus`: cases (registers, table words, queries) with the answers of several QEMU versions, read and written.
- `qemu`: `Oracle`, the same questions put to a `qemu-system-aarch64` now; `guest` is the machine it runs.
- `cases`: random cases, deterministic for a seed; `shrink`: the smallest case that still fails.

Nothing here imports the model: what judges shares no line with what is judged.
"""
