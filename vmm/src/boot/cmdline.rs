//! The kernel's command line: the user's, and without ACPI the words that name the devices (the kernel's
//! Documentation/admin-guide/kernel-parameters.txt, `virtio_mmio.device=`).

use super::{BootError, MmioDevice};

/// The user's line with a word for each of `named`; it has at most `most` bytes.
pub(crate) fn build(user: &str, named: &[MmioDevice], most: usize) -> Result<String, BootError> {
    if user.contains('\0') {
        return Err(BootError::CmdlineZero);
    }
    let (to_kernel, to_init) = user.split_at(end_of_kernels_words(user));
    let words = named
        .iter()
        .map(|MmioDevice { base, bytes, gsi }| format!("virtio_mmio.device={bytes:#x}@{base:#x}:{gsi}"));
    let mut line = to_kernel.to_owned();
    for word in words.chain((!to_init.is_empty()).then(|| to_init.to_owned())) {
        if !line.is_empty() && !line.ends_with(' ') {
            line.push(' ');
        }
        line.push_str(&word);
    }
    if line.len() > most {
        let with_devices = if named.is_empty() { "" } else { " with the words for its devices" };
        return Err(BootError::CmdlineLength { bytes: line.len(), with_devices, most });
    }
    Ok(line)
}

/// Where the words for the kernel end: what comes from a lone `--` on is for init.
fn end_of_kernels_words(line: &str) -> usize {
    let is_gap = |c: Option<char>| c.is_none_or(char::is_whitespace);
    let is_word = |at: usize| is_gap(line[..at].chars().next_back()) && is_gap(line[at + 2..].chars().next());
    line.match_indices("--").map(|(at, _)| at).find(|at| is_word(*at)).unwrap_or(line.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEVICES: [MmioDevice; 2] = [
        MmioDevice { base: 0xd000_0000, bytes: 0x1000, gsi: 5 },
        MmioDevice { base: 0xd000_1000, bytes: 0x1000, gsi: 23 },
    ];
    const WORDS: &str = "virtio_mmio.device=0x1000@0xd0000000:5 virtio_mmio.device=0x1000@0xd0001000:23";

    #[test]
    fn devices_are_named_before_the_words_for_init() {
        let line = |user| build(user, &DEVICES, 1000).unwrap();
        assert_eq!(line(""), WORDS);
        assert_eq!(line("quiet"), format!("quiet {WORDS}"));
        assert_eq!(line("a --b c-- -- d -- e"), format!("a --b c-- {WORDS} -- d -- e"));
        assert_eq!(line("-- d"), format!("{WORDS} -- d"));
        assert_eq!(build("a  b -- c ", &[], 1000).unwrap(), "a  b -- c ");
    }

    #[test]
    fn too_long_a_line_says_whether_the_devices_made_it_so() {
        let refused =
            |user, devices: &[MmioDevice], most| build(user, devices, most).unwrap_err().to_string();
        assert!(refused("four", &[], 3).contains("has 4 bytes and may have 3"));
        assert!(
            refused("four", &DEVICES, 20).contains("bytes with the words for its devices and may have 20")
        );
        build("four", &[], 4).unwrap();
        assert!(matches!(build("a\0b", &[], 9), Err(BootError::CmdlineZero)));
    }
}
