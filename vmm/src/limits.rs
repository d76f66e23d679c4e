//! Every bound of this crate.

use std::time::Duration;

/// Connections to the control socket at one time; more wait in the kernel's backlog.
pub const CONTROL_CONNECTIONS: usize = 64;
/// The longest request body, bytes.
pub const REQUEST_BODY_BYTES: usize = 16 * 1024;
/// The longest response body that the client takes, bytes (event streams are bounded by the line).
pub const RESPONSE_BODY_BYTES: usize = 1024 * 1024;
/// The longest line of an event stream that the client takes, bytes.
pub const EVENT_LINE_BYTES: usize = 64 * 1024;
/// Events that a slow reader may be behind before it loses the oldest and is told so.
pub const EVENT_BACKLOG: usize = 256;
/// The shortest time between two progress events.
pub const PROGRESS_PERIOD: Duration = Duration::from_millis(100);
/// How long the client waits for an answer that does not stand for long work.
pub const CLIENT_ANSWER: Duration = Duration::from_secs(30);
/// How long a cancelled migration may take to let the VM go on here before the caller is told that it still ends.
pub const CANCEL_WAIT: Duration = Duration::from_secs(20);
/// How long a migration may stand in doubt before the request that started it is answered so; the source goes on asking.
pub const IN_DOUBT_ANSWER: Duration = Duration::from_secs(30);
/// How long an ending process lets answers that are under way reach their operators.
pub const DRAIN: Duration = Duration::from_secs(5);
/// The first wait before the site's peer is tried again; doubles up to [`SITE_RETRY_LONGEST`].
pub const SITE_RETRY_FIRST: Duration = Duration::from_millis(250);
/// The longest wait before the site's peer is tried again.
pub const SITE_RETRY_LONGEST: Duration = Duration::from_secs(10);
/// The longest path of a Unix socket, bytes, without its final NUL (`sun_path` of unix(7)).
pub const SOCKET_PATH_BYTES: usize = 107;
/// The longest `--downtime`, milliseconds.
pub const DOWNTIME_MS: u64 = 60 * 60 * 1000;
/// The longest name of a VM, bytes.
pub const NAME_BYTES: usize = 64;
/// The longest `to` of a migration, bytes.
pub const DESTINATION_BYTES: usize = 512;
/// The most virtual CPUs of a VM: as many as the MultiProcessor table has room for in one kibibyte.
pub const CPUS_MAX: u8 = 32;
/// RAM comes in multiples of this: one region of the manifest.
pub const MEMORY_GRANULE_BYTES: u64 = 2 << 20;
