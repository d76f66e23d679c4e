//! How long the lane waits, and how much it takes. None of these is an expectation of speed: they only end a run that hangs.

use std::time::Duration;

/// For one whole run of the first level.
pub const RUN: Duration = Duration::from_secs(300);
/// Between two lines of the inner driver that say it is alive.
pub const ALIVE_EVERY: Duration = Duration::from_secs(5);
/// Without any line from the first level: it has frozen.
pub const SILENCE: Duration = Duration::from_secs(90);
/// Runs in all, where the others failed.
pub const ATTEMPTS: usize = 2;

/// For a stock kernel to come to user space.
pub const BOOT: Duration = Duration::from_secs(150);
/// For a guest to move.
pub const MIGRATION: Duration = Duration::from_secs(180);
/// For a snapshot to be written, or read back.
pub const SNAPSHOT: Duration = Duration::from_secs(120);
/// For its guest to look at itself and say what it saw.
pub const CHECK: Duration = Duration::from_secs(60);

/// RAM of a stock kernel's guest that moves.
pub const GUEST_MIB: u32 = 160;
/// RAM of one that only boots: beyond 4 GiB. It touches little of it.
pub const BIG_GUEST_MIB: u32 = 4608;
/// What its kernel finds of that after its own share, at least.
pub const BIG_GUEST_FOUND_MIB: u32 = 4352;
/// Its disk.
pub const DISK_BYTES: u64 = 16 << 20;
/// RAM of the first level.
pub const FIRST_LEVEL_MIB: u32 = 1024;
/// Lines of the console that wait to be read.
pub const CONSOLE_LINES: usize = 1024;
/// Lines of the console that a failed run prints.
pub const TAIL_LINES: usize = 150;
/// A kernel that has unpacked itself to more than this is none.
pub const VMLINUX_BYTES: usize = 512 << 20;
