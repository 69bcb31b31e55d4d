// Calls x0 and comes back.
        mov     x19, x30
        blr     x0
        mov     x30, x19
