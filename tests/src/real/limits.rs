//! How long the lab waits for what must come. None of these is an expectation of speed: they only end a test that hangs.

use std::time::Duration;

/// Between two looks at a condition that nobody announces.
pub const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// For a process to start and answer, a guest to boot and say that it is ready.
pub const START: Duration = Duration::from_secs(60);
/// For the guest to look at every page that it wrote.
pub const SELF_CHECK: Duration = Duration::from_secs(60);
/// For Linux to boot and start its workloads, where KVM emulates its supervisor code on a busy machine.
pub const LINUX_BOOT: Duration = Duration::from_secs(400);
/// For a Linux guest to run its checks, and for its workloads to do another round.
pub const LINUX_CHECK: Duration = Duration::from_secs(180);
/// For an answer over TCP from a guest that may be moving.
pub const TCP: Duration = Duration::from_secs(120);
/// Between two lines on a TCP connection while its guest moves: enough to be there at the switchover, little enough not to be the load.
pub const BETWEEN_COUNTS: Duration = Duration::from_millis(50);
/// For the next heartbeat.
pub const HEARTBEAT: Duration = Duration::from_secs(30);
/// For a process to end after it was told to, or after its VM has left.
pub const END: Duration = Duration::from_secs(30);
/// For all content of a site to be indexed and announced.
pub const INDEXED: Duration = Duration::from_secs(120);
/// For a migration to come to its end, or to its next phase.
pub const MIGRATION: Duration = Duration::from_secs(120);
/// For an end of a migration to notice that the other is gone, and to say what it makes of that.
pub const SETTLED: Duration = Duration::from_secs(90);

/// Stories that run at one time in one process. Most of a story is waiting for the link.
pub const STORIES: usize = 7;
/// Lines of a log that a failing test prints.
pub const LOG_LINES: usize = 60;
/// Lines of a guest's serial port that wait to be read.
pub const SERIAL_LINES: usize = 1024;
