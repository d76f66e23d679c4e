//! A buffer that nobody writes, summed for ever: memory that changes by itself is found.

use std::io;
use std::thread;

use crate::content::{Content, sum};
use crate::status::{Options, Status};

/// 2 MiB: a page of each kind of place, and little enough to be summed often.
const BYTES: usize = 2 << 20;

pub(crate) fn run(options: &Options) -> io::Result<()> {
    let mut status = Status::of("checksum")?;
    let mut buffer = vec![0; BYTES];
    Content::new(options.seed).fill(&mut buffer);
    let expected = sum(&buffer);
    loop {
        let found = sum(&buffer);
        if found != expected {
            let place = Content::new(options.seed).differs(&buffer);
            status.fail(format!("the sum is {found:#x}, not {expected:#x}; first wrong byte: {place:?}"));
        }
        status.round(&[("bytes", BYTES as u64)])?;
        thread::sleep(options.pause);
    }
}
