// Loads eight bytes from x0 + 4: a page boundary in between is two translations.
        ldur    x0, [x0, #4]
