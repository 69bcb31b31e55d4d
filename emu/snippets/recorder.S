// Callbacks that write down how they were called and react as a script says: struct mm_walk_ops and the function of
// apply_to_page_range() point here, eight bytes of entry for each kind.
// State, at the address in the last word: count, limit, offset of `action` in struct mm_walk, log, script, and where
// entries may be stored to: VA and bytes.
// A log record is eight words: kind, x0 to x4, the word behind an entry pointer, the action as it was.
// A script row is four: flags (bit 0: store to the entry, bit 1: set the action), return value, action, word to store.

        mov     w9, #0                  // pgd_entry(entry, addr, next, walk)
        b       record
        mov     w9, #1                  // p4d_entry
        b       record
        mov     w9, #2                  // pud_entry
        b       record
        mov     w9, #3                  // pmd_entry
        b       record
        mov     w9, #4                  // pte_entry
        b       record
        mov     w9, #5                  // pte_hole(addr, next, depth, walk)
        b       record
        mov     w9, #6                  // hugetlb_entry(pte, hmask, addr, next, walk)
        b       record
        mov     w9, #7                  // test_walk(addr, next, walk)
        b       record
        mov     w9, #8                  // pre_vma(start, end, walk)
        b       record
        mov     w9, #9                  // post_vma(walk)
        b       record
        mov     w9, #10                 // install_pte(addr, next, new pte, walk)
        b       record
        mov     w9, #11                 // fn(pte, addr, data)

record: ldr     x17, state
        ldr     x10, [x17]
        ldr     x11, [x17, #8]
        cmp     x10, x11
        b.hs    overflow
        ldr     x12, [x17, #24]
        add     x12, x12, x10, lsl #6   // the record
        ldr     x13, [x17, #32]
        add     x13, x13, x10, lsl #5   // the script's row
        str     x9, [x12]
        stp     x0, x1, [x12, #8]
        stp     x2, x3, [x12, #24]
        str     x4, [x12, #40]

        mov     x14, x3                 // which argument is the walk
        cmp     w9, #6
        csel    x14, x4, x14, eq
        cmp     w9, #7
        csel    x14, x2, x14, eq
        cmp     w9, #8
        csel    x14, x2, x14, eq
        cmp     w9, #9
        csel    x14, x0, x14, eq
        cmp     w9, #11
        csel    x14, xzr, x14, eq
        ldr     x16, [x17, #16]
        mov     x15, #0
        cbz     x14, 1f
        ldr     w15, [x14, x16]
1:      str     x15, [x12, #56]

        mov     x15, #0                 // there is an entry to store to
        mov     x11, #0                 // the word behind an entry pointer
        cmp     w9, #5
        b.lo    2f
        cmp     w9, #6
        b.eq    2f
        cmp     w9, #11
        b.ne    3f
2:      ldr     x11, [x0]
        mov     x15, #1
3:      str     x11, [x12, #48]
        add     x10, x10, #1
        str     x10, [x17]              // only now does the record count: a run may be cut short anywhere

        ldp     x10, x11, [x13]
        ldp     x12, x13, [x13, #16]
        cmp     w9, #10                 // the new PTE is given in any case, 0 without a word for it
        csel    x0, x2, x0, eq
        b.eq    6f
        tbz     x10, #0, 4f
        cbz     x15, 4f
        ldp     x1, x2, [x17, #40]
        sub     x1, x0, x1
        cmp     x1, x2
        b.hs    4f
6:      str     x13, [x0]
4:      tbz     x10, #1, 5f
        cbz     x14, 5f
        str     w12, [x14, x16]
5:      mov     x0, x11
        ret

overflow:
        brk     #1
        nop
        .balign 8
state:  .quad   0
