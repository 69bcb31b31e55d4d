// x0 = what AT S1E1R says of address x0 (PAR_EL1), x1 = what AT S1E0W says.
        at      s1e1r, x0
        isb
        mrs     x2, par_el1
        at      s1e0w, x0
        isb
        mrs     x1, par_el1
        mov     x0, x2
