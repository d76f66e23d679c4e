//! The kernel's own complaints, from /dev/kmsg.

use std::fs::OpenOptions;
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;

/// Messages of this level (`KERN_WARNING`) and graver ones count.
const WARNING: u64 = 4;
/// `O_NONBLOCK` of Linux on x86-64: at the end the read must say so rather than wait for the next message.
const NONBLOCK: i32 = 0o4000;
/// No record of /dev/kmsg is longer (`CONSOLE_EXT_LOG_MAX`).
const RECORD_BYTES: usize = 8192;

/// The text of every warning so far that the kernel still has in its buffer.
pub(crate) fn warnings() -> io::Result<Vec<String>> {
    let mut kmsg = OpenOptions::new().read(true).custom_flags(NONBLOCK).open("/dev/kmsg")?;
    let mut record = vec![0; RECORD_BYTES];
    let mut warnings = Vec::new();
    loop {
        match kmsg.read(&mut record) {
            Ok(0) => return Ok(warnings),
            Ok(bytes) => warnings.extend(warning(&String::from_utf8_lossy(&record[..bytes]))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(warnings),
            // Older records were overwritten while we read: go on with what is left.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            Err(error) => return Err(error),
        }
    }
}

/// The text of `record` ("level,sequence,microseconds,flags;text", then lines of a dictionary), if it is a warning
/// of the kernel: the low three bits of the first number are the level, the others who wrote it (0: the kernel).
fn warning(record: &str) -> Option<String> {
    let (head, text) = record.split_once(';')?;
    let level: u64 = head.split(',').next()?.parse().ok()?;
    (level <= WARNING).then(|| text.lines().next().unwrap_or_default().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_of_the_kernel_are_told_from_the_rest() {
        let text = Some("clocksource: skewed".to_owned());
        assert_eq!(warning("4,339,5140900,-;clocksource: skewed\n SUBSYSTEM=x\n"), text);
        assert_eq!(warning("6,339,5140900,-;all is well\n"), None);
        assert_eq!(warning("12,339,5140900,-;a user's warning\n"), None);
        assert_eq!(warning("nonsense"), None);
    }
}
