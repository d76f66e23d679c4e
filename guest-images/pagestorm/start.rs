//! The supervisor stub: from the PVH entry (32-bit protected mode, paging off; Xen's "x86/HVM direct boot ABI") to
//! 64-bit ring 3 with IOPL 3, from where nothing comes back.
//!
//! Short on purpose: on a host that emulates ring 0 each instruction costs 0.7 µs, and some do not exist there
//! (fxsave does, xsave and int do not). Interrupts stay off in ring 3, and an exception is a bug: it ends in a triple
//! fault, and the monitor reports it with the registers. One exception is none: `hlt` in ring 3 raises #GP, whose handler
//! halts in its stead until the local APIC's timer interrupts (`idle.rs` fills the two gates and sets the timer).
//!
//! Page tables: identity, 2 MiB pages, writable by ring 3, all of `limits::MAPPED_BYTES`; part of the image rather
//! than built by a loop, with the accessed and dirty bits set so that the CPU never writes them. Selectors are
//! those of Linux (user code 0x33, user data 0x2b): a host that runs ring 3 without hardware virtualisation knows no
//! others.

use core::arch::global_asm;

use super::pagestorm::limits;

/// Page directories of 1 GiB each.
const DIRECTORIES: u64 = limits::MAPPED_BYTES >> 30;

global_asm!(
    // XEN_ELFNOTE_PHYS32_ENTRY: name size, descriptor size, type 18, "Xen", entry point.
    ".pushsection .note.Xen, \"a\", @note",
    ".balign 4",
    ".long 4, 8, 18",
    ".asciz \"Xen\"",
    ".quad pagestorm_start",
    ".popsection",
    // Static tables. 0x67: present, writable, user, accessed, dirty; 0x80: a 2 MiB page.
    ".pushsection .page_tables, \"aw\", @progbits",
    ".balign 4096",
    "page_tables: .quad page_table_3 + 0x67",
    ".balign 4096",
    "page_table_3:",
    ".set directory, page_table_2",
    ".rept {directories}",
    ".quad directory + 0x67",
    ".set directory, directory + 4096",
    ".endr",
    ".balign 4096",
    "page_table_2:",
    ".set frame, 0",
    ".rept {directories} * 512",
    ".quad frame + 0xe7",
    ".set frame, frame + 0x200000",
    ".endr",
    ".balign 8",
    "gdt:",
    ".quad 0, 0",
    ".quad 0x00af9b000000ffff", // 0x10: ring 0, 64-bit code
    ".quad 0x00cf93000000ffff", // 0x18: ring 0, data
    ".quad 0",
    ".quad 0x00cff3000000ffff", // 0x28 | 3: ring 3, data
    ".quad 0x00affb000000ffff", // 0x30 | 3: ring 3, 64-bit code
    "gdt_tss: .quad 0x0000890000000000 + {tss_bytes} - 1, 0", // 0x38: the TSS; the stub fills in its address
    "gdt_end:",
    "gdt_pointer: .word gdt_end - gdt - 1",
    ".long gdt",
    "idt_pointer: .word {idt_bytes} - 1",
    ".quad idt",
    ".balign 16",
    "tss: .long 0",
    ".quad handler_stack_top", // RSP0
    ".skip 102 - 12",
    ".word 104",              // where the map of ports follows: a clear bit allows one
    ".skip {ports} / 8",
    ".byte 0xff", // the CPU reads a byte more
    ".popsection",
    ".pushsection .bss.pages, \"aw\", @nobits",
    ".balign 4096",
    ".global kvmclock_page",
    "kvmclock_page: .skip 4096",
    ".global idt",
    "idt: .skip {idt_bytes}",
    "handler_stack: .skip 4096",
    "handler_stack_top:",
    "stack: .skip {stack_bytes}",
    "stack_top:",
    ".popsection",
    stack_bytes = const STACK_BYTES,
    directories = const DIRECTORIES,
    ports = const PORTS,
    tss_bytes = const 104 + PORTS / 8 + 1,
    idt_bytes = const IDT_BYTES,
    options(att_syntax)
);

/// Ports from 0 on that ring 3 may use. IOPL 3 allows them all, but a host that runs ring 3 natively has no IOPL to give
/// and goes by the map in the TSS instead.
const PORTS: usize = 0x400;
/// 256 gates of 16 bytes.
const IDT_BYTES: usize = 4096;
/// Ring 3's stack.
const STACK_BYTES: usize = 64 << 10;

global_asm!(
    ".pushsection .text.start, \"ax\", @progbits",
    ".code32",
    ".global pagestorm_start",
    "pagestorm_start:",
    "cli",
    "cld",
    "mov %ebx, %ebp", // hvm_start_info, which cpuid would lose
    // kvmclock: CPUID says "KVMKVMKVM" at 0x40000000 and KVM_FEATURE_CLOCKSOURCE2 (bit 3) at 0x40000001.
    "xor %edi, %edi",
    "mov $0x40000000, %eax",
    "cpuid",
    "cmp $0x4b4d564b, %ebx",
    "jne 1f",
    "cmp $0x564b4d56, %ecx",
    "jne 1f",
    "mov $0x40000001, %eax",
    "cpuid",
    "test $8, %al",
    "jz 1f",
    "mov $kvmclock_page + 1, %eax", // bit 0: enable
    "xor %edx, %edx",
    "mov $0x4b564d01, %ecx",
    "wrmsr",
    "mov $1, %edi",
    "1:",
    "mov $0x620, %eax", // PAE, OSFXSR, OSXMMEXCPT
    "mov %eax, %cr4",
    "mov $page_tables, %eax",
    "mov %eax, %cr3",
    "mov $0xc0000080, %ecx", // EFER.LME
    "rdmsr",
    "or $0x100, %eax",
    "wrmsr",
    "mov $0x80010033, %eax", // PG, WP, NE, ET, MP, PE; neither EM nor TS, so that SSE works
    "mov %eax, %cr0",
    "lgdt gdt_pointer",
    "ljmp $0x10, $2f",
    ".code64",
    "2:",
    "mov $0x18, %eax",
    "mov %eax, %ss",
    "mov $0x2b, %eax",
    "mov %eax, %ds",
    "mov %eax, %es",
    "mov $stack_top, %esp",
    "lidt idt_pointer",
    "mov $tss, %eax",
    "mov %ax, gdt_tss + 2",
    "shr $16, %eax",
    "mov %al, gdt_tss + 4",
    "mov %ah, gdt_tss + 7",
    "mov $0x38, %eax",
    "ltr %ax",
    "pushq $0x2b",
    "pushq $stack_top",
    "pushq $0x3002", // IOPL 3, interrupts off
    "pushq $0x33",
    "pushq $3f",
    "iretq",
    // Ring 3. The loader may have left anything in the .bss of an image that lies in loaded memory; the kvmclock page
    // is in use already.
    "3:",
    "mov %edi, %esi", // second argument: whether there is a kvmclock
    "mov $stack, %edi",
    "mov $bss_end, %ecx",
    "sub %edi, %ecx",
    "xor %eax, %eax",
    "rep stosb",
    "mov %ebp, %edi", // first argument: hvm_start_info
    "call pagestorm_main",
    "ud2",
    // #GP from ring 3. RAX is free there (idle.rs); the error code is on top, the faulting address below it.
    ".global halt_handler",
    "halt_handler:",
    "mov 8(%rsp), %rax",
    "cmpb $0xf4, (%rax)",
    "jne 4f",
    "incq 8(%rsp)",
    "add $8, %rsp",
    "sti",
    "hlt",
    "cli",
    "iretq",
    "4: ud2",
    // The timer, which can only interrupt the hlt above.
    ".global timer_handler",
    "timer_handler:",
    "mov $0xfee000b0, %eax", // end of interrupt
    "movl $0, (%rax)",
    "iretq",
    ".popsection",
    options(att_syntax)
);
