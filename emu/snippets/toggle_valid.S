// Flips VALID of the descriptor at [x0] x1 times, each time with the TLB maintenance for address x2.
1:      cbz     x1, 2f
        ldr     x3, [x0]
        eor     x3, x3, #1
        str     x3, [x0]
        dsb     ishst
        lsr     x4, x2, #12
        and     x4, x4, #(1 << 44) - 1
        tlbi    vaale1is, x4
        dsb     ish
        isb
        sub     x1, x1, #1
        b       1b
2:      mov     x0, x3
