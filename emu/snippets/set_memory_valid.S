// The chain that a kernel runs to make pages of kernel memory valid or invalid, in its 4-level 4K form:
//     set_memory_valid -> __change_memory_common -> apply_to_page_range -> change_page_range, then the TLB.
// x0 = address, w1 = number of pages, w2 = 1 to make them valid, 0 invalid. Returns 0, or -22 (-EINVAL) for an empty
// range, a hole or a block. The tables are reached through the linear map of RAM at 0x40000000, which begins at the
// start of the upper half; the root is TTBR1_EL1's.

set_memory_valid:
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        sbfiz   x1, x1, #12, #32        // bytes
        mov     w2, w2
        and     x2, x2, #1              // bits to set: VALID or none
        eor     x3, x2, #1              // bits to clear: the other way round
        bl      __change_memory_common
        ldp     x29, x30, [sp], #16
        ret

// x0 = start, x1 = bytes, x2 = bits to set, x3 = bits to clear
__change_memory_common:
        stp     x29, x30, [sp, #-48]!
        mov     x29, sp
        stp     x19, x20, [sp, #16]
        str     x21, [sp, #32]
        mov     x19, x0
        add     x20, x0, x1
        bl      apply_to_page_range
        mov     w21, w0
        dsb     ishst                   // the stores are seen before the invalidation
        sub     x1, x20, x19
        cmp     x1, #512 << 12
        b.hi    2f
        lsr     x0, x19, #12
        and     x0, x0, #(1 << 44) - 1  // VA[55:12]
        lsr     x1, x20, #12
        and     x1, x1, #(1 << 44) - 1
1:      cmp     x0, x1
        b.hs    3f
        tlbi    vaale1is, x0
        add     x0, x0, #1
        b       1b
2:      tlbi    vmalle1is
3:      dsb     ish
        isb
        mov     w0, w21
        ldr     x21, [sp, #32]
        ldp     x19, x20, [sp, #16]
        ldp     x29, x30, [sp], #48
        ret

// the same arguments; changes every PTE of the range
apply_to_page_range:
        stp     x29, x30, [sp, #-16]!
        mov     x29, sp
        add     x9, x0, x1              // end
        cmp     x0, x9
        b.hs    8f
        mrs     x10, tcr_el1
        ubfx    x10, x10, #16, #6       // T1SZ
        mov     x11, #-1
        mov     x12, #64
        sub     x12, x12, x10
        lsl     x11, x11, x12           // start of the upper half: the linear map
        mov     x12, #0x40000000
        sub     x11, x11, x12           // linear map address = PA + x11
        mrs     x12, ttbr1_el1
        and     x12, x12, #0xfffffffffffe
4:      mov     x13, x12                // table
        mov     x14, #39                // shift of level 0
5:      and     x13, x13, #0xfffffffff000
        add     x13, x13, x11
        lsr     x15, x0, x14
        and     x15, x15, #511
        add     x15, x13, x15, lsl #3   // the entry
        cmp     x14, #12
        b.eq    6f
        ldr     x13, [x15]
        and     x16, x13, #3
        cmp     x16, #3                 // a table?
        b.ne    8f
        sub     x14, x14, #9
        b       5b
6:      bl      change_page_range
        add     x0, x0, #1 << 12
        cmp     x0, x9
        b.lo    4b
        mov     w0, #0
7:      ldp     x29, x30, [sp], #16
        ret
8:      mov     w0, #-22
        b       7b

// x15 = PTE; a valid kernel-only PTE is ordered for the walker at once
change_page_range:
        ldr     x13, [x15]
        bic     x13, x13, x3
        orr     x13, x13, x2
        str     x13, [x15]
        mov     x16, #1                 // VALID
        movk    x16, #0x40, lsl #48     // and UXN
        orr     x17, x16, #1 << 6       // of these and USER
        and     x17, x13, x17
        cmp     x17, x16
        b.ne    9f
        dsb     ishst
        isb
9:      ret
