// The whole program of a QEMU guest that calls set_memory_valid again and again with the MMU on, then powers off.
// It starts with the MMU off, at a PA that TTBR0 maps to itself. The words behind it are filled in by tcg.py.

start:
        adr     x20, parameters
        ldp     x0, x1, [x20], #16
        msr     mair_el1, x0
        msr     tcr_el1, x1
        ldp     x0, x1, [x20], #16
        msr     ttbr0_el1, x0
        msr     ttbr1_el1, x1
        ldp     x0, x21, [x20], #16     // SCTLR_EL1; the VA
        tlbi    vmalle1
        dsb     sy
        isb
        msr     sctlr_el1, x0
        isb
        ldp     x22, x23, [x20], #16    // pages; calls
        ldp     x24, x25, [x20], #16    // the function; a stack
        mov     sp, x25
1:      mov     x0, x21
        mov     x1, x22
        and     x2, x23, #1
        blr     x24
        cbnz    x0, 2f                  // refused: hang, which the caller's time limit tells
        subs    x23, x23, #1
        b.ne    1b
        mov     w0, #0x0008             // PSCI SYSTEM_OFF
        movk    w0, #0x8400, lsl #16
        hvc     #0
2:      b       2b
        .balign 16
parameters:
