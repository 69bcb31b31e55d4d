"""Memory that a guest shares with its host: set_memory_encrypted, set_memory_decrypted, and what a realm does there.

Rules of this file:
- Only a realm registers anything: elsewhere both calls do nothing. (A guest of pKVM does too, and is not modelled.)
- Pages are invalid while the monitor changes them, and stay so when it refuses.
Sources: arch/arm64/mm/mem_encrypt.c; arch/arm64/mm/pageattr.c (__set_memory_enc_dec), arch/arm64/include/asm/rsi.h.
"""

from __future__ import annotations

from enum import IntEnum

from kernel_model import pageattr
from kernel_model.levels import U64
from kernel_model.mm import EINVAL, Kernel
from kernel_model.pageattr import Masks, valid_masks

RSI_CHANGE_DESTROYED = 1


class Ripas(IntEnum):
    """enum ripas: the state of a page of the realm's address space."""

    RSI_RIPAS_EMPTY = 0
    RSI_RIPAS_RAM = 1


def set_memory_encrypted(kernel: Kernel, addr: int, numpages: int) -> int:
    """set_memory_encrypted(addr, numpages): the realm's own again. Returns 0 or a negative error number."""
    return _dispatch(kernel, addr, numpages, "set_memory_encrypted")


def set_memory_decrypted(kernel: Kernel, addr: int, numpages: int) -> int:
    """set_memory_decrypted(addr, numpages): shared with the host. Returns 0 or a negative error number."""
    return _dispatch(kernel, addr, numpages, "set_memory_decrypted")


def _dispatch(kernel: Kernel, addr: int, numpages: int, name: str) -> int:
    """An unaligned address is warned of and counts as done."""
    in_realm = kernel.variant.knows_realms and kernel.settings.realm
    if not in_realm and not kernel.settings.crypt_ops:
        return 0
    if addr % kernel.levels.page_size:
        kernel.warn(name)
        return 0
    if not in_realm:
        return kernel.call_out(f"crypt_ops.{name.removeprefix('set_memory_')}", addr, numpages & (1 << 32) - 1)
    realm = realm_set_memory_encrypted if name == "set_memory_encrypted" else realm_set_memory_decrypted
    return realm(kernel, addr, numpages)


def realm_set_memory_encrypted(kernel: Kernel, addr: int, numpages: int) -> int:
    """realm_set_memory_encrypted()."""
    ret = __set_memory_enc_dec(kernel, addr, numpages, encrypt=True)
    if ret:
        kernel.warn("realm_set_memory_encrypted")
    return ret


def realm_set_memory_decrypted(kernel: Kernel, addr: int, numpages: int) -> int:
    """realm_set_memory_decrypted()."""
    ret = __set_memory_enc_dec(kernel, addr, numpages, encrypt=False)
    if ret:
        kernel.warn("realm_set_memory_decrypted")
    return ret


def __set_memory_enc_dec(kernel: Kernel, addr: int, numpages: int, *, encrypt: bool) -> int:
    if not kernel.settings.realm:
        return 0
    if not is_lm_address(kernel, addr):
        return -EINVAL
    size, shared = pageattr._size(kernel, numpages), kernel.settings.ns_shared
    invalid = valid_masks(kernel.bits, 0)
    masks = Masks(invalid.set, invalid.clear | shared) if encrypt else Masks(invalid.set | shared, invalid.clear)
    ret = _change_memory(kernel, addr, size, masks)
    if ret:
        return ret
    start = kernel.virt_to_phys(addr)
    state = Ripas.RSI_RIPAS_RAM if encrypt else Ripas.RSI_RIPAS_EMPTY
    ret = rsi_set_memory_range(kernel, start, start + size & U64, state)
    return ret or _change_memory(kernel, addr, size, valid_masks(kernel.bits, 1))


_change_memory = pageattr.__change_memory_common


def is_lm_address(kernel: Kernel, addr: int) -> bool:
    """__is_lm_address(): between PAGE_OFFSET and PAGE_END of the build, whatever part of it is in use."""
    levels = kernel.levels
    page_offset, page_end = -(1 << levels.config_va_bits), -(1 << levels.va_bits_min - 1)
    return (addr - page_offset & U64) < page_end - page_offset


def rsi_set_memory_range(kernel: Kernel, start: int, end: int, state: Ripas) -> int:
    """rsi_set_memory_range(): PAs. The monitor may stop on the way; one that answers out of range is refused."""
    while start != end:
        kernel.step("rsi_set_memory_range")
        kernel.called("rsi_set_addr_range_state", start, end, state, RSI_CHANGE_DESTROYED)
        status, top, response = kernel.rsi(start, end, state, RSI_CHANGE_DESTROYED)
        if status or response or not start <= top <= end:
            return -EINVAL
        start = top
    return 0
