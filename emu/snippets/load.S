// x0 = [x0]
        ldr     x0, [x0]
