//! A VM is launched, looked at, paused, resumed and stopped; and whatever is missing or wrong at a launch is named.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tern_tests::real::lab::{Said, finish, run};
use tern_tests::real::{Guest, Lab, Vm, binaries};
use tokio::process::Command;
use vmm::control::api::{VmState, VmStatus};

fn words(words: &[&str]) -> Vec<OsString> {
    words.iter().map(Into::into).collect()
}

/// `vmm COMMAND --control SOCKET --json`, as an operator types it.
async fn ask(vm: &Vm, command: &str) -> VmStatus {
    let mut args = words(&[command, "--json", "--control"]);
    args.push(vm.control().into());
    let said = run("vmm", &args).await;
    assert!(said.ok, "vmm {command}: {}", said.stderr);
    serde_json::from_str(&said.stdout).expect("--json prints the status")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_vm_boots_beats_stands_still_goes_on_and_stops() {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let guest = Guest::default();
    let mut vm = Vm::launch(&lab, &host, "first", &guest).await;
    let check = vm.self_check().await;
    assert!(check.pages_written > 0, "{check}");

    let status = ask(&vm, "status").await;
    assert_eq!((status.name.as_deref(), status.state), (Some("first"), VmState::Running));
    assert_eq!((status.memory_bytes, status.cpus), (Some(guest.memory_bytes), Some(1)));
    assert_eq!(status.ticket, None, "it waits for no VM");

    // Each of these commands is a process of its own: time enough for a guest that runs on to beat.
    let paused = ask(&vm, "pause").await;
    assert_eq!(paused.state, VmState::Paused);
    assert_eq!(ask(&vm, "pause").await.heartbeat, paused.heartbeat, "paused again, it still stands still");
    assert_eq!(ask(&vm, "status").await.heartbeat, paused.heartbeat);
    assert_eq!(ask(&vm, "resume").await.state, VmState::Running);
    let later = vm.assert_lives().await;
    assert!(later.pages_written > check.pages_written && later.heartbeats > check.heartbeats, "{later}");

    ask(&vm, "stop").await;
    vm.assert_ends_well().await;
    assert!(!vm.control().exists(), "the control socket goes with its process");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_ends_by_itself_ends_its_process_well() {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let mut args = words(&["run", "--cmdline", "nonsense=1", "--memory", "32M", "--kernel"]);
    args.push(lab.kernel().into());
    let mut vm = Vm::start(&lab, &host, "nonsense", None, args);
    let line = vm.line_that("says why not", |line| line.starts_with("pagestorm: cannot start")).await;
    assert!(line.contains("nonsense"), "{line}");
    vm.assert_ends_well().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_process_on_one_control_socket_is_refused_and_the_first_goes_on() {
    let lab = Lab::new().await;
    let host = lab.host("a").await;
    let mut vm = Vm::launch(&lab, &host, "first", &Guest::default()).await;
    let said = launch(&lab, vm.control(), &["--memory", "32M"]).await;
    names(&said, 1, &["another process listens on", "first.sock", "choose another path"]);
    vm.assert_lives().await;
}

/// `vmm run` of pagestorm with its serial port off, and what it says when that comes to nothing.
async fn launch(lab: &Lab, control: &Path, options: &[&str]) -> Said {
    run("vmm", &launch_args(lab, control, &lab.kernel(), options)).await
}

fn launch_args(lab: &Lab, control: &Path, kernel: &Path, options: &[&str]) -> Vec<OsString> {
    let mut args = words(&["run", "--serial", "off", "--kernel"]);
    args.push(kernel.into());
    args.extend(["--control".into(), control.into()]);
    args.extend(["--identity".into(), lab.dir().join("refused.key").into()]);
    args.extend(words(options));
    args
}

/// Panics unless the command failed with `code` and standard error has every one of `needles`.
fn names(said: &Said, code: i32, needles: &[&str]) {
    let missing: Vec<_> = needles.iter().filter(|needle| !said.stderr.contains(**needle)).collect();
    assert!(missing.is_empty() && said.code == Some(code), "{missing:?} are not in {said:#?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_the_files_is_named() {
    let lab = Lab::new().await;
    let control = lab.dir().join("control.sock");
    let kernel =
        async |path: &Path| run("vmm", &launch_args(&lab, &control, path, &["--memory", "32M"])).await;

    names(&kernel(&lab.dir().join("no-kernel")).await, 1, &["no-kernel", "No such file"]);
    let text = lab.dir().join("text");
    fs::write(&text, "This is no kernel.\n".repeat(100)).expect("a file");
    names(&kernel(&text).await, 1, &["text", "no kernel that can be started", "vmlinux"]);
    let cut = lab.dir().join("cut");
    fs::write(&cut, &guest_images::PAGESTORM[..guest_images::PAGESTORM.len() / 2]).expect("a file");
    names(&kernel(&cut).await, 1, &["cut"]);

    let missing = launch(&lab, &control, &["--memory", "32M", "--initramfs", "no-initramfs"]).await;
    names(&missing, 1, &["no-initramfs", "No such file"]);
    let missing =
        launch(&lab, &control, &["--memory", "32M", "--load", "file=no-content,addr=0x1000000"]).await;
    names(&missing, 1, &["no-content", "No such file"]);
    let missing = launch(&lab, &control, &["--memory", "32M", "--site", "no-peer.sock"]).await;
    names(&missing, 1, &["no-peer.sock", "dht serve"]);
    assert!(!control.exists(), "no launch that failed leaves its control socket behind");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_the_memory_is_named() {
    let lab = Lab::new().await;
    let control = lab.dir().join("control.sock");
    let content = lab.dir().join("content");
    fs::write(&content, vec![7; 1 << 20]).expect("a file");
    let load = |addr: &str| format!("file={},addr={addr}", content.display());

    names(&launch(&lab, &control, &["--memory", "3M"]).await, 2, &["--memory", "multiple of 2M"]);
    names(&launch(&lab, &control, &["--memory", "much"]).await, 2, &["--memory", "512M or 4G"]);
    let overlap = launch(&lab, &control, &["--memory", "32M", "--load", &load("0x100000")]).await;
    names(&overlap, 1, &["overlap", "content", "put one of them elsewhere"]);
    let beyond = launch(&lab, &control, &["--memory", "32M", "--load", &load("0x1ff8000")]).await;
    names(&beyond, 1, &["content", "does not fit", "raise --memory"]);
    let far = launch(&lab, &control, &["--memory", "32M", "--load", &load("0xffffffffffff0000")]).await;
    names(&far, 1, &["content", "does not fit"]);
    // pagestorm's image begins at 1 MiB.
    let little = launch(&lab, &control, &["--memory", "2M", "--load", &load("0x1c0000")]).await;
    names(&little, 1, &["does not fit", "raise --memory"]);
    let cmdline = "x".repeat(100_000);
    names(
        &launch(&lab, &control, &["--memory", "32M", "--cmdline", &cmdline]).await,
        1,
        &["command line", "may have", "shorten"],
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_path_that_is_no_socket_is_left_alone() {
    let lab = Lab::new().await;
    let control = lab.dir().join("precious");
    fs::write(&control, "precious").expect("a file");
    names(&launch(&lab, &control, &["--memory", "32M"]).await, 1, &["precious", "not a socket"]);
    assert_eq!(fs::read_to_string(&control).expect("it is still there"), "precious");
}

/// Both need root: without it the test says so and proves nothing.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn kvm_that_is_absent_or_forbidden_is_named() {
    let lab = Lab::new().await;
    if run_as("id", &["-u"]).await.stdout.trim() != "0" {
        eprintln!("not run: it takes root to be another user or to hide /dev/kvm");
        return;
    }
    fs::set_permissions(lab.dir(), fs::Permissions::from_mode(0o777)).expect("the directory is ours");
    let vmm = lab.dir().join("vmm");
    fs::copy(binaries::path("vmm"), &vmm).expect("a copy that another user reaches");
    let launch =
        |control: &str| launch_args(&lab, &lab.dir().join(control), &lab.kernel(), &["--memory", "32M"]);

    let mut nobody = Command::new("setpriv");
    nobody.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(&vmm);
    let is_open = fs::metadata("/dev/kvm").expect("it is there").permissions().mode() & 0o006 == 0o006;
    if is_open {
        eprintln!("not run: everybody may open /dev/kvm here");
    } else {
        let said = finish(nobody.args(launch("nobody.sock"))).await;
        names(&said, 1, &["no permission to open /dev/kvm", "group kvm"]);
    }

    let mut hidden = Command::new("unshare");
    hidden.args(["--mount", "sh", "-c", "mount -t tmpfs none /dev && exec \"$@\"", "sh"]).arg(&vmm);
    let said = finish(hidden.args(launch("hidden.sock"))).await;
    if said.stderr.starts_with("unshare:") || said.stderr.starts_with("mount:") {
        eprintln!("not run: mounts are forbidden here: {}", said.stderr);
    } else {
        names(&said, 1, &["/dev/kvm does not exist: load the kernel module"]);
    }
}

async fn run_as(program: &str, args: &[&str]) -> Said {
    finish(Command::new(program).args(args)).await
}
