// The first process of a kernel that is to be left alive: prints a mark, then sleeps for ever, 50 ms at a time, so that
// its system call can be met. What lies behind the code are its data; ppoll() leaves the interval alone because the
// program is mapped read-only.
        adr     x1, mark
        mov     x0, #1                  // standard output
        mov     x2, #24
        mov     x8, #64                 // write
        svc     #0
again:  mov     x0, #0
        mov     x1, #0
        adr     x2, interval
        mov     x3, #0
        mov     x8, #73                 // ppoll
        svc     #0
        b       again
interval:
        .xword  0, 50000000
mark:   .ascii  "\n[pgtable: user space]\r\n"
