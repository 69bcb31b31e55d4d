// The program that runs inside QEMU, at EL3 with its MMU off: it does a list of operations and writes down
// what came of each. The Python side is guest.py; `guest.hex` is this file, assembled:
//
//     aarch64-linux-gnu-as -march=armv8.5-a -o guest.o guest.S && aarch64-linux-gnu-objcopy -O binary guest.o guest.bin
//
// Mailbox (at MAILBOX):  +0 operations left   +8 next operation   +16 next outcome
//                        +24 SCTLR_EL3 of the regime under test   +32 VA of `page` below   +40 PAN bit for SPSR
// Operation, 2 words:    address of a thunk, X1
// Outcome, 8 words:      how it ended (0 returned, 1 exception at EL3, 2 exception from a lower EL, 3 any other vector),
//                        X0, ESR_EL3, ESR_EL1, FAR_EL1, ESR_EL2, FAR_EL2, HPFAR_EL2
// A semihosting READC waits for the next list, a WRITEC says that it is done.
// The directory at the end names every thunk, so that nobody else has to know this file's layout.
// X19 and X20 are never changed: the SCTLR_EL3 of the start, the mailbox.

	.equ	MAILBOX_HIGH, 0x4024
	.equ	EL0T, 0x3c0			// SPSR with D, A, I, F masked
	.equ	EL1H, 0x3c5
	.equ	EL2H, 0x3c9

	.text	0				// subsections: 0 the program, one page; 1 `page`; 2 the directory
image:	b	start
	.word	page - image
	.word	directory - image
	.word	end - image

start:	movz	x20, #MAILBOX_HIGH, lsl #16
	mrs	x19, sctlr_el3
	adr	x0, vectors
	msr	vbar_el3, x0
	isb
wait:	mov	w0, #7				// SYS_READC
	mov	x1, #0
	hlt	#0xf000
next:	ldp	x21, x22, [x20]
	cbz	x21, done
	ldp	x8, x1, [x22]
	mov	x0, #0
	blr	x8
	mov	x2, #0
record:	ldp	x21, x22, [x20]
	ldr	x23, [x20, #16]
	mrs	x3, esr_el3
	mrs	x4, esr_el1
	mrs	x5, far_el1
	mrs	x6, esr_el2
	mrs	x7, far_el2
	mrs	x8, hpfar_el2
	stp	x2, x0, [x23]
	stp	x3, x4, [x23, #16]
	stp	x5, x6, [x23, #32]
	stp	x7, x8, [x23, #48]
	sub	x21, x21, #1
	add	x22, x22, #16
	add	x23, x23, #64
	stp	x21, x22, [x20]
	str	x23, [x20, #16]
	b	next
done:	add	x1, x20, #48
	mov	w0, #3				// SYS_WRITEC
	hlt	#0xf000
	b	wait

same:	msr	sctlr_el3, x19			// the MMU was on if this was an AT of the EL3 regime
	isb
	mov	x2, #1
	b	record
lower:	mov	x2, #2
	b	record
other:	msr	sctlr_el3, x19
	isb
	mov	x2, #3
	b	record

// Thunks. Each one also leaves a line for the directory.
	.macro	line name
	.pushsection .text, 2
	.word	88f - image
	.ascii	"\name"
	.balign	32, 0
	.popsection
88:
	.endm

	.macro	register name, code=none
	line	"MSR \name"
	.ifc	\code, none
	msr	\name, x1
	.else
	msr	\code, x1
	.endif
	isb
	ret
	.endm

	.macro	identity name, code=none
	line	"MRS \name"
	.ifc	\code, none
	mrs	x0, \name
	.else
	mrs	x0, \code
	.endif
	ret
	.endm

	.macro	result name, code=none		// not an identity: what the last exception left
	line	"READ \name"
	.ifc	\code, none
	mrs	x0, \name
	.else
	mrs	x0, \code
	.endif
	ret
	.endm

	.macro	at_op name, op1, crm, op2
	line	"AT \name"
	sys	#\op1, c7, c\crm, #\op2, x1
	isb
	mrs	x0, par_el1
	ret
	.endm

	.macro	at_el3 name, crm, op2		// only here is the program itself translated: its page must be mapped 1:1
	line	"AT \name"
	ldr	x6, [x20, #24]
	msr	sctlr_el3, x6
	isb
	sys	#6, c7, c\crm, #\op2, x1
	isb
	mrs	x0, par_el1
	msr	sctlr_el3, x19
	isb
	ret
	.endm

	.macro	try name, spsr, insn:vararg	// an access to the VA in X1 by an instruction of `page`; X0 is 0
	.pushsection .text, 1
77:	\insn
	.if	(\spsr) == EL0T
	svc	#0
	.else
	smc	#0
	.endif
	.balign	16
	.popsection
	line	"TRY \name"
	ldr	x9, [x20, #32]
	add	x9, x9, #(77b - page)
	mov	x10, #\spsr
	b	leave
	.endm

	.macro	fetch name, spsr
	line	"TRY \name"
	and	x9, x1, #~3
	mov	x10, #\spsr
	b	leave
	.endm

	.text	1
page:
	.text	2
directory:
	.text	0

	line	"TLBI"
	tlbi	alle1
	tlbi	alle2
	tlbi	alle3
	dsb	sy
	isb
	ret
	line	"TLBI PAALL"			// what granule protection checks remember, and the walks' reads of tables
	sys	#6, c8, c7, #4
	dsb	sy
	isb
	ret
	line	"MSR PAN"
	lsl	x1, x1, #22
	msr	s3_0_c4_c2_3, x1
	ret
	line	"MSR SCTLR_EL3"
	str	x1, [x20, #24]
	ret

leave:	ldr	x11, [x20, #40]			// to EL0, EL1 or EL2; comes back through `lower`
	orr	x10, x10, x11
	tlbi	alle1
	tlbi	alle2
	dsb	sy
	msr	esr_el1, xzr
	msr	far_el1, xzr
	msr	esr_el2, xzr
	msr	far_el2, xzr
	msr	hpfar_el2, xzr
	msr	spsr_el3, x10
	msr	elr_el3, x9
	eret

	register SCR_EL3
	register HCR_EL2
	register HCRX_EL2, s3_4_c1_c2_2
	register SCTLR_EL1
	register SCTLR2_EL1, s3_0_c1_c0_3
	register TCR_EL1
	register TCR2_EL1, s3_0_c2_c0_3
	register TTBR0_EL1
	register TTBR1_EL1
	register MAIR_EL1
	register MAIR2_EL1, s3_0_c10_c2_1
	register PIR_EL1, s3_0_c10_c2_3
	register PIRE0_EL1, s3_0_c10_c2_2
	register POR_EL1, s3_0_c10_c2_4
	register POR_EL0, s3_3_c10_c2_4
	register VBAR_EL1
	register SCTLR_EL2
	register SCTLR2_EL2, s3_4_c1_c0_3
	register TCR_EL2
	register TCR2_EL2, s3_4_c2_c0_3
	register TTBR0_EL2
	register TTBR1_EL2, s3_4_c2_c0_1
	register MAIR_EL2
	register MAIR2_EL2, s3_4_c10_c1_1
	register PIR_EL2, s3_4_c10_c2_3
	register PIRE0_EL2, s3_4_c10_c2_2
	register POR_EL2, s3_4_c10_c2_4
	register VBAR_EL2
	register VTCR_EL2
	register VTTBR_EL2
	register VSTCR_EL2, s3_4_c2_c6_2
	register VSTTBR_EL2, s3_4_c2_c6_0
	register S2PIR_EL2, s3_4_c10_c2_5
	register S2POR_EL1, s3_0_c10_c2_5
	register TCR_EL3
	register TTBR0_EL3
	register MAIR_EL3
	register SCTLR2_EL3, s3_6_c1_c0_3
	register MAIR2_EL3, s3_6_c10_c1_1
	register PIR_EL3, s3_6_c10_c2_3
	register GPTBR_EL3, s3_6_c2_c1_4
	register GPCCR_EL3, s3_6_c2_c1_6

	result	FAR_EL3
	result	MFAR_EL3, s3_6_c6_c0_5

	identity MIDR_EL1
	identity ID_AA64PFR0_EL1
	identity ID_AA64PFR1_EL1
	identity ID_AA64PFR2_EL1, s3_0_c0_c4_2
	identity ID_AA64ISAR0_EL1
	identity ID_AA64ISAR1_EL1
	identity ID_AA64ISAR2_EL1, s3_0_c0_c6_2
	identity ID_AA64MMFR0_EL1
	identity ID_AA64MMFR1_EL1
	identity ID_AA64MMFR2_EL1
	identity ID_AA64MMFR3_EL1, s3_0_c0_c7_3
	identity ID_AA64MMFR4_EL1, s3_0_c0_c7_4

	at_op	S1E1R, 0, 8, 0
	at_op	S1E1W, 0, 8, 1
	at_op	S1E0R, 0, 8, 2
	at_op	S1E0W, 0, 8, 3
	at_op	S1E1RP, 0, 9, 0
	at_op	S1E1WP, 0, 9, 1
	at_op	S1E1A, 0, 9, 2
	at_op	S1E2R, 4, 8, 0
	at_op	S1E2W, 4, 8, 1
	at_op	S1E2A, 4, 9, 2
	at_op	S12E1R, 4, 8, 4
	at_op	S12E1W, 4, 8, 5
	at_op	S12E0R, 4, 8, 6
	at_op	S12E0W, 4, 8, 7
	at_el3	S1E3R, 8, 0
	at_el3	S1E3W, 8, 1
	at_el3	S1E3A, 9, 2

	// The first six keep their places in `page`: a few recorded answers hold the address of one.
	try	LD1, EL1H, ldrb w0, [x1]
	try	ST1, EL1H, strb w0, [x1]
	try	LDT, EL1H, ldtrb w0, [x1]
	try	STT, EL1H, sttrb w0, [x1]
	try	LD0, EL0T, ldrb w0, [x1]
	try	ST0, EL0T, strb w0, [x1]
	try	LD2, EL2H, ldrb w0, [x1]
	try	ST2, EL2H, strb w0, [x1]
	try	LDT2, EL2H, ldtrb w0, [x1]
	try	STT2, EL2H, sttrb w0, [x1]
	try	SWP1, EL1H, swpb w0, w0, [x1]
	try	SWP0, EL0T, swpb w0, w0, [x1]
	fetch	EX1, EL1H
	fetch	EX0, EL0T
	fetch	EX2, EL2H

	.balign	2048
vectors:
	.macro	vector target
	.balign	128
	b	\target
	.endm
	.rept	4
	vector	other
	.endr
	vector	same
	.rept	3
	vector	other
	.endr
	vector	lower
	.rept	7
	vector	other
	.endr
	.balign	128
	.text	2
end:
