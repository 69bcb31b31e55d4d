"""Stores of descriptors with the barriers that order them for the walker, and lazy MMU mode, which queues those.

Rules of this file:
- Only a valid entry is ordered: a PTE that EL0 can neither read nor execute, any valid PMD or PUD entry, and every
  P4D and PGD entry, a cleared one too.
- In a kernel with lazy MMU mode a barrier that falls due inside a section waits for its end, or for the end of a
  section inside. In an interrupt no section is entered, left or seen.
- A top-level entry is stored where it is: the fixmap detour for swapper_pg_dir is not modelled.
Sources: arch/arm64/include/asm/pgtable.h (set_pte, set_pmd, queue_pte_barriers), include/linux/pgtable.h
(lazy_mmu_mode_enable and its kin), mm/memory.c and mm/pgtable-generic.c (pXd_clear_bad).
"""

from __future__ import annotations

from kernel_model.levels import Fold
from kernel_model.mm import Kernel


def set_pte(kernel: Kernel, pte: int, value: int) -> None:
    """set_pte(), __set_pte(): `value` into the entry at PA `pte`."""
    kernel.write(pte, value)
    if kernel.bits.valid_kernel(value):
        queue_pte_barriers(kernel)


def set_pmd(kernel: Kernel, pmd: int, value: int) -> None:
    """set_pmd(), set_pud(): `value` into the entry at PA `pmd`."""
    kernel.write(pmd, value)
    if kernel.bits.pte_valid(value):
        queue_pte_barriers(kernel)


set_pud = set_pmd


def set_p4d(kernel: Kernel, p4d: int, value: int) -> None:
    """set_p4d(), set_pgd(): `value` into the entry at PA `p4d`."""
    kernel.write(p4d, value)
    queue_pte_barriers(kernel)


set_pgd = set_p4d
SET = {"PGD": set_pgd, "P4D": set_p4d, "PUD": set_pud, "PMD": set_pmd}


def clear_bad(kernel: Kernel, name: str, entry: int) -> None:
    """pgd_clear_bad() and its kin: the entry becomes none, unless its level is compiled away.

    `name`: "PGD", "P4D", "PUD" or "PMD".
    """
    if getattr(kernel.levels, name.lower()).fold is not Fold.COMPILE:
        SET[name](kernel, entry, 0)


def queue_pte_barriers(kernel: Kernel) -> None:
    """queue_pte_barriers(): now, or at the end of the lazy section."""
    if is_lazy_mmu_mode_active(kernel):
        kernel.lazy.pending = True
    else:
        emit_pte_barriers(kernel)


def emit_pte_barriers(kernel: Kernel) -> None:
    """emit_pte_barriers()."""
    kernel.barrier("dsb ishst", "isb")


def is_lazy_mmu_mode_active(kernel: Kernel) -> bool:
    """is_lazy_mmu_mode_active()."""
    lazy = kernel.lazy
    return _lazy(kernel) and lazy.enable_count > 0 and lazy.pause_count == 0


def lazy_mmu_mode_enable(kernel: Kernel) -> None:
    """lazy_mmu_mode_enable(): a section begins, or one inside another."""
    if _lazy(kernel) and not kernel.lazy.pause_count:
        kernel.lazy.enable_count += 1


def lazy_mmu_mode_disable(kernel: Kernel) -> None:
    """lazy_mmu_mode_disable(): a section ends; what is pending is emitted, also where an outer one goes on."""
    if _lazy(kernel) and not kernel.lazy.pause_count:
        kernel.lazy.enable_count -= 1
        _flush_pending(kernel)


def lazy_mmu_mode_pause(kernel: Kernel) -> None:
    """lazy_mmu_mode_pause(): no section is active until the matching resume."""
    if _lazy(kernel):
        kernel.lazy.pause_count += 1
        if kernel.lazy.pause_count == 1 and kernel.lazy.enable_count:
            _flush_pending(kernel)


def lazy_mmu_mode_resume(kernel: Kernel) -> None:
    """lazy_mmu_mode_resume()."""
    if _lazy(kernel):
        kernel.lazy.pause_count -= 1


def _lazy(kernel: Kernel) -> bool:
    """The kernel has lazy MMU mode, and may use it here."""
    return kernel.variant.lazy_barriers and not kernel.context.in_interrupt


def _flush_pending(kernel: Kernel) -> None:
    """arch_flush_lazy_mmu_mode()."""
    if kernel.lazy.pending:
        kernel.lazy.pending = False
        emit_pte_barriers(kernel)
