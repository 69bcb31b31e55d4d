// [x0] = x1
        str     x1, [x0]
