//! A network for guests: a namespace of its own with a bridge and TAPs, and a TCP connection into a guest.
//!
//! It needs root; a test without root leaves it out ([`Net::if_root`]). The vmm processes and the connection's other end run in the
//! namespace, so that nothing of the machine's own network is touched.

use std::cell::Cell;
use std::ffi::OsString;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{ChildStdin, ChildStdout, Command};
use tokio::time::timeout;

use super::lab::finish;
use super::{Lab, Process, limits};

/// TAPs of a network; each vmm process takes the next one.
const TAPS: usize = 8;

/// Connects to a guest's port 7000, trying until it listens; then for each line of its input sends one, and prints the answer.
const COUNTER: &str = r#"
until { exec 3<>"/dev/tcp/$1/7000"; } 2>/dev/null; do sleep 0.2; done
echo connected
while read -r line; do
  printf '%s\n' "$line" >&3
  IFS= read -r answer <&3 || exit 1
  printf '%s\n' "$answer"
done
"#;

/// Fetches a page from a guest's web server and prints the SHA-256 sum of what comes after the header. Anything but a page is a failure.
const FETCH: &str = r#"
exec 3<>"/dev/tcp/$1/80" || exit 1
printf 'GET %s HTTP/1.0\r\n\r\n' "$2" >&3
IFS= read -r status <&3
[[ $status == 'HTTP/1.'?' 200 '* ]] || { echo "it answers: $status" >&2; exit 1; }
sed '1,/^\r$/d' <&3 | sha256sum
"#;

/// A network namespace with a bridge and TAPs. Dropping it removes it.
#[derive(Debug)]
pub struct Net {
    namespace: String,
    taken: Cell<usize>,
}

impl Net {
    /// The guest's address; the bridge has .1.
    pub const GUEST: &'static str = "10.99.0.2";

    /// A network, if this process is root.
    pub async fn if_root() -> Option<Self> {
        let id = finish(Command::new("id").arg("-u")).await;
        if id.stdout.trim() != "0" {
            eprintln!("not root: this test runs without a network");
            return None;
        }
        // Tests of one process run side by side, each in a namespace of its own.
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let namespace = format!("tern-test-{}-{number}", std::process::id());
        let net = Self { namespace, taken: Cell::new(0) };
        let namespace = &net.namespace;
        ip(&format!("netns add {namespace}")).await;
        ip(&format!("-n {namespace} link set lo up")).await;
        ip(&format!("-n {namespace} link add br0 type bridge")).await;
        ip(&format!("-n {namespace} addr add 10.99.0.1/24 dev br0")).await;
        ip(&format!("-n {namespace} link set br0 up")).await;
        for number in 0..TAPS {
            ip(&format!("-n {namespace} tuntap add tap{number} mode tap")).await;
            ip(&format!("-n {namespace} link set tap{number} master br0 up")).await;
        }
        Some(net)
    }

    /// A TAP that no other process has.
    #[must_use]
    pub fn tap(&self) -> String {
        let number = self.taken.get();
        assert!(number < TAPS, "a network has {TAPS} TAPs");
        self.taken.set(number + 1);
        format!("tap{number}")
    }

    /// The words after `ip` that run `program` with `args` in the namespace.
    #[must_use]
    pub fn inside(&self, program: &Path, args: Vec<OsString>) -> Vec<OsString> {
        let mut words: Vec<OsString> = ["netns", "exec", &self.namespace].map(Into::into).into();
        words.push(program.into());
        words.extend(args);
        words
    }

    /// The SHA-256 sum of a page of the guest's web server, over a connection of its own.
    pub async fn fetch(&self, path: &str) -> String {
        let words = ["-c", FETCH, "fetch", Self::GUEST, path].map(Into::into).into();
        let said = finish(Command::new("ip").args(self.inside(Path::new("bash"), words))).await;
        assert!(said.ok, "http://{}{path}: {}", Self::GUEST, said.stderr);
        said.stdout
    }

    /// A TCP connection to the guest's `count`, once it is open.
    pub async fn connect(&self, lab: &Lab) -> Counter {
        let words = ["-c", COUNTER, "counter", Self::GUEST].map(Into::into).into();
        let words = self.inside(Path::new("bash"), words);
        let mut process = lab.start("counter", Path::new("ip"), &words);
        let (input, output) = process.take_pipes();
        let mut counter = Counter { process, input, answers: BufReader::new(output).lines(), count: 0 };
        assert_eq!(counter.answer().await, "connected");
        counter
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        // Processes of the test may still be ending in it; the namespace goes with the last of them.
        let removed = std::process::Command::new("ip").args(["netns", "del", &self.namespace]).status();
        if !removed.is_ok_and(|status| status.success()) {
            eprintln!("the network namespace {} could not be removed", self.namespace);
        }
    }
}

async fn ip(words: &str) {
    let said = finish(Command::new("ip").args(words.split(' '))).await;
    assert!(said.ok, "ip {words}: {}", said.stderr);
}

/// A TCP connection into a guest, which counts the lines that it gets on it.
#[derive(Debug)]
pub struct Counter {
    process: Process,
    input: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    count: u64,
}

impl Counter {
    /// Sends a line and panics unless the guest has counted it and all before.
    pub async fn count(&mut self) {
        self.process.assert_alive();
        self.input.write_all(b"one more\n").await.expect("the connection's process takes a line");
        self.count += 1;
        let answer = self.answer().await;
        assert_eq!(answer, self.count.to_string(), "the guest lost count on an open connection");
    }

    async fn answer(&mut self) -> String {
        let answer = timeout(limits::TCP, self.answers.next_line()).await;
        let answer = answer.unwrap_or_else(|_| panic!("no answer over TCP after {} lines", self.count));
        answer
            .expect("a pipe can be read")
            .unwrap_or_else(|| panic!("the connection broke after {} lines", self.count))
    }
}
