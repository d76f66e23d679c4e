//! QEMU, its console, and what it says there.

use std::fs;
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use super::inputs::FirstLevel;
use super::limits;
use super::verdict::{Part, Step, Verdict};

const QEMU: &str = "qemu-system-x86_64";
/// All that TCG can do, under the name of a Zen: what QEMU calls it by itself is a K8 whose local timer stops when it halts, and
/// Linux' remedy for that (its erratum 400) lets guests oversleep.
const CPU: &str = "max,family=23,model=1,stepping=2";
/// `no_timer_check`: on a loaded host TCG's timer is too late for the check, and the kernel would give up.
const KERNEL_WORDS: &str = "console=ttyS0 panic=-1 loglevel=4 no_timer_check";

/// Why a run of the first level proves nothing, or proves something wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LaneError {
    /// QEMU is not there.
    #[error("{QEMU} cannot be started: install qemu-system-x86")]
    Qemu(#[source] io::Error),
    /// The console's log cannot be written.
    #[error("the console's log cannot be written to {}", path.display())]
    Log {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The first level stands still, or takes too long.
    #[error("the first level {what}")]
    Frozen {
        /// How that was seen.
        what: String,
    },
    /// A step failed.
    #[error("step {step:?} failed: {said}")]
    Step {
        /// Which.
        step: Step,
        /// Whether something did not come in time.
        timed_out: bool,
        /// Why.
        said: String,
    },
    /// The first level did not come up.
    #[error("the first level ended ({status}) before its first step")]
    NotUp {
        /// How QEMU ended.
        status: ExitStatus,
    },
    /// The first level ended before all steps were done.
    #[error("the first level ended ({status}) without {missing:?}")]
    Ended {
        /// How QEMU ended.
        status: ExitStatus,
        /// The steps that nobody reported.
        missing: Vec<Step>,
    },
}

impl LaneError {
    /// Whether this can be a machine under TCG that sleeps for ever: then another try may tell. Whatever else went wrong, went wrong.
    #[must_use]
    pub fn may_be_a_freeze(&self) -> bool {
        match self {
            Self::Frozen { .. } => true,
            Self::Step { timed_out, .. } => *timed_out,
            Self::Qemu(_) | Self::Log { .. } | Self::NotUp { .. } | Self::Ended { .. } => false,
        }
    }
}

/// A running QEMU. Dropping it kills it.
struct Machine {
    child: Child,
    lines: Receiver<String>,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended by itself, which is as well.
        let _ended = self.child.kill().and_then(|()| self.child.wait());
    }
}

/// Runs the first level with `part` of the steps once. Each verdict is passed to `tell` as it comes; the whole console goes to `log`.
/// # Errors
/// If a step failed or is missing, or the first level froze.
pub fn run(
    first_level: &FirstLevel,
    part: Part,
    log: &Path,
    mut tell: impl FnMut(&Verdict),
) -> Result<(), LaneError> {
    let mut machine = start(first_level, part)?;
    let console = follow(&machine.lines, &mut tell);
    fs::write(log, console.text).map_err(|source| LaneError::Log { path: log.to_owned(), source })?;
    // One that failed for another reason than time decides.
    let failed = || console.verdicts.iter().filter(|verdict| !verdict.ok);
    if let Some(verdict) = failed().find(|verdict| !verdict.timed_out).or_else(|| failed().next()) {
        let Verdict { step, timed_out, said, .. } = verdict.clone();
        return Err(LaneError::Step { step, timed_out, said });
    }
    if let Some(what) = console.frozen {
        return Err(LaneError::Frozen { what });
    }
    let status = machine.child.wait().map_err(LaneError::Qemu)?;
    if console.verdicts.is_empty() {
        return Err(LaneError::NotUp { status });
    }
    let is_missing = |step: &Step| console.verdicts.iter().all(|verdict| verdict.step != *step);
    let missing: Vec<Step> = part.steps().iter().copied().filter(is_missing).collect();
    if missing.is_empty() && status.success() { Ok(()) } else { Err(LaneError::Ended { status, missing }) }
}

fn start(first_level: &FirstLevel, part: Part) -> Result<Machine, LaneError> {
    let mut child = Command::new(QEMU)
        .args(["-accel", "tcg,thread=multi", "-cpu", CPU, "-smp", "1", "-nodefaults", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio", "-m", &limits::FIRST_LEVEL_MIB.to_string()])
        // What stands behind a lone -- the kernel passes to init.
        .args(["-append", &format!("{KERNEL_WORDS} -- {}", part.name())])
        .arg("-kernel")
        .arg(&first_level.kernel)
        .arg("-initrd")
        .arg(&first_level.initramfs)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(LaneError::Qemu)?;
    let console = child.stdout.take().expect("it was piped");
    let (sender, lines) = sync_channel(limits::CONSOLE_LINES);
    thread::spawn(move || {
        let mut console = BufReader::new(console);
        let mut line = Vec::new();
        while matches!(console.read_until(b'\n', &mut line), Ok(1..)) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
            line.clear();
        }
    });
    Ok(Machine { child, lines })
}

/// What the console said until it was closed, or until it said nothing more.
#[derive(Default)]
struct Console {
    text: String,
    verdicts: Vec<Verdict>,
    frozen: Option<String>,
}

fn follow(lines: &Receiver<String>, tell: &mut impl FnMut(&Verdict)) -> Console {
    let deadline = Instant::now() + limits::RUN;
    let mut console = Console::default();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left.min(limits::SILENCE)) {
            Ok(line) => {
                if let Some(verdict) = Verdict::find(&line) {
                    tell(&verdict);
                    console.verdicts.push(verdict);
                }
                console.text.push_str(&line);
                console.text.push('\n');
                if left == Duration::ZERO {
                    console.frozen = Some(format!("was not done after {} s", limits::RUN.as_secs()));
                    return console;
                }
            }
            Err(RecvTimeoutError::Disconnected) => return console,
            Err(RecvTimeoutError::Timeout) => {
                let waited = left.min(limits::SILENCE).as_secs();
                console.frozen = Some(format!("has said nothing for {waited} s, not even that it is alive"));
                return console;
            }
        }
    }
}
