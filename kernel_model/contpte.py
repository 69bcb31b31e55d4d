"""arch/arm64/mm/contpte.c: what is read from a PTE of a contiguous run, whose AF and dirty state are shared.

Rules of this file: a build without CONFIG_ARM64_CONTPTE (`Variant.contpte`) reads the entry and no other. Sources:
contpte.c contpte_ptep_get, contpte_ptep_get_lockless, contpte_is_consistent; asm/pgtable.h ptep_get, pte_mkdirty.
"""

from __future__ import annotations

from collections.abc import Iterator

from kernel_model.mm import Kernel, Runaway
from kernel_model.names import Bits


def ptep_get(kernel: Kernel, ptep: int) -> int:
    """ptep_get() of the PTE at PA `ptep`: young and dirty if any entry of its run is."""
    pte = kernel.read(ptep)
    if kernel.variant.contpte and pte_valid_cont(kernel.bits, pte):
        for _, each in _run(kernel, ptep):
            pte = _gather(kernel.bits, pte, each)
    return pte


def ptep_get_lockless(kernel: Kernel, ptep: int) -> int:
    """ptep_get_lockless(): the same, read again until the run is consistent.

    Raises Runaway for a run that is not, since nothing changes meanwhile: the kernel reads it for ever.
    """
    pte = first = kernel.read(ptep)
    if not kernel.variant.contpte or not pte_valid_cont(kernel.bits, pte):
        return pte
    for at, each in _run(kernel, ptep):
        if not _is_consistent(kernel, first, each, (at - ptep) // 8):
            raise Runaway(f"contpte_ptep_get_lockless: the run at {ptep:#x} does not fit")
        pte = _gather(kernel.bits, pte, each)
    return pte


def pte_valid_cont(bits: Bits, pte: int) -> bool:
    """pte_valid_cont()."""
    return pte & (bits.VALID | bits.CONT) == bits.VALID | bits.CONT


def pte_dirty(bits: Bits, pte: int) -> bool:
    """pte_dirty(): software says so, or hardware may write."""
    return bool(pte & bits.DIRTY) or pte & (bits.WRITE | bits.RDONLY) == bits.WRITE


def pte_mkdirty(bits: Bits, pte: int) -> int:
    """pte_mkdirty(): what may be written becomes writable for hardware."""
    pte |= bits.DIRTY
    return pte & ~bits.RDONLY if pte & bits.WRITE else pte


def _run(kernel: Kernel, ptep: int) -> Iterator[tuple[int, int]]:
    """(PA, entry) of the run around `ptep` (contpte_align_down)."""
    size = kernel.levels.contiguous["PTE"] // kernel.levels.page_size * 8
    start = ptep & -size
    return ((at, kernel.read(at)) for at in range(start, start + size, 8))


def _gather(bits: Bits, pte: int, each: int) -> int:
    pte = pte_mkdirty(bits, pte) if pte_dirty(bits, each) else pte
    return pte | each & bits.AF


def _is_consistent(kernel: Kernel, first: int, each: int, distance: int) -> bool:
    """contpte_is_consistent(): valid, contiguous, the address that follows, and equal but for AF and dirty."""
    bits, page = kernel.bits, kernel.levels.page_size
    follows = bits.pte_to_phys(each) == bits.pte_to_phys(first) + distance * page
    return pte_valid_cont(bits, each) and follows and _old_clean(bits, first, page) == _old_clean(bits, each, page)


def _old_clean(bits: Bits, pte: int, page: int) -> int:
    """pte_pgprot() of pte_mkold(pte_mkclean())."""
    return bits.pgprot(pte & ~(bits.DIRTY | bits.AF) | bits.RDONLY, page)
