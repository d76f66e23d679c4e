//! A stock kernel's warnings, less those that are known to be the emulator's doing.

use crate::real::LATE;

/// What a kernel warns of when its CPU is late, as every CPU is that is emulated twice: it says so, and that it does nothing about it.
const SLOW: [&str; 2] = ["clocksource: Long readout interval, skipping watchdog check", LATE];

/// QEMU before 8.2 does not intercept XSETBV ("target/i386: check intercept for XSETBV", October 2023), so that KVM never hears which state its
/// guest enables, and CPUID's leaf 0xd goes on saying the size for none of it: 576 bytes. (Seen with KVM's tracepoints: the guest's kernel
/// executes XSETBV, and there is no such exit.) Linux sees the difference to its own sum, does without XSAVE, and says so in a block
/// from `BLOCK_BEGINS` to `BLOCK_ENDS` and a list of the leaf.
const XSAVE: &str = "XSAVE consistency problem: size ";
const XSAVE_ENDS: &str = " != kernel_size 576";
const XSAVE_LIST: &str = "CPUID[0d, ";
const BLOCK_BEGINS: &str = "------------[ cut here ]------------";
const BLOCK_ENDS: &str = "---[ end trace ";

/// What a kernel says while it boots of the processor that QEMU is told to be, whose microcode QEMU has not, of a machine that has
/// no PCI, and of busybox' small inodes.
const BOOT: [&str; 5] = [
    "Speculative Return Stack Overflow: IBPB-extending microcode not applied!",
    "Speculative Return Stack Overflow: WARNING: See https://kernel.org/doc/",
    "PCI: Fatal: No config space access function found",
    "PCI: System does not support PCI",
    "ext2 filesystem being mounted at /mnt supports timestamps until 2038",
];

/// The lines of `warnings` that nothing here explains.
pub(super) fn unexplained(warnings: &[String]) -> Vec<String> {
    let mut left = Vec::new();
    let mut lines = warnings.iter().map(|line| text(line)).peekable();
    while let Some(line) = lines.next() {
        if line == BLOCK_BEGINS && lines.peek().is_some_and(|next| is_xsave(next)) {
            lines.by_ref().find(|line| line.starts_with(BLOCK_ENDS));
            continue;
        }
        let known = SLOW.iter().chain(&BOOT).chain([&XSAVE_LIST]);
        if !known.into_iter().any(|known| line.starts_with(known)) {
            left.push(line.to_owned());
        }
    }
    left
}

fn is_xsave(line: &str) -> bool {
    line.starts_with(XSAVE) && line.ends_with(XSAVE_ENDS)
}

/// `line` as the kernel's log has it, without its level and time: `<4>[    9.509598] …`.
fn text(line: &str) -> &str {
    let line =
        line.split_once('>').filter(|(level, _)| level.starts_with('<')).map_or(line, |(_, rest)| rest);
    line.split_once("] ").filter(|(time, _)| time.starts_with('[')).map_or(line, |(_, rest)| rest)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unexplained_of(lines: &[&str]) -> Vec<String> {
        unexplained(&lines.iter().map(|line| (*line).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn a_slow_cpu_is_explained_and_other_warnings_are_not() {
        assert!(unexplained_of(&[]).is_empty());
        assert!(unexplained_of(&["<4>[   20.000001] hrtimer: interrupt took 20 ns"]).is_empty());
        assert!(unexplained_of(&["hrtimer: interrupt took 20 ns"]).is_empty());
        assert_eq!(unexplained_of(&["<3>[    1.5] clocksource: skewed"]), ["clocksource: skewed"]);
    }

    #[test]
    fn xsave_without_its_intercept_is_explained_and_no_other_block_is() {
        let xsave = [
            "<4>[    9.509598] ------------[ cut here ]------------",
            "<4>[    9.509598] XSAVE consistency problem: size 2696 != kernel_size 576",
            "<4>[    9.509598] WARNING: CPU: 0 PID: 0 at arch/x86/kernel/fpu/xstate.c:606",
            "<4>[    9.509598] ---[ end trace 0000000000000000 ]---",
            "<4>[    9.509598] CPUID[0d, 00]: eax=00000207 ebx=00000240",
        ];
        assert!(unexplained_of(&xsave).is_empty());
        let other = xsave.map(|line| line.replace("576", "832"));
        assert_eq!(unexplained(&other).len(), 4, "all but the list");
        assert_eq!(unexplained_of(&[xsave[0], "WARNING: something else"]).len(), 2);
    }
}
