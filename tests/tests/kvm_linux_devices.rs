//! Linux with one of each virtio device, moved once. What the guest sees and what the host has decides; every command is typed at /dev/hvc0,
//! so the console carries all of it. The test Linux must have been built: guest-images/linux/build.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use guest_images::linux::Linux;
use tern_tests::real::{Host, Journey, Lab, Terms, Vm, limits, until};

/// Linux reports free memory only while it has more than 32 of the blocks that it reports: 128 MiB in a kernel without huge pages.
const MEMORY_BYTES: u64 = 320 << 20;
const DISK_BYTES: u64 = 32 << 20;
/// What the guest writes to memory, and frees. Only blocks of 4 MiB that are free as a whole are reported: some of it.
const FREED_BYTES: u64 = 24 << 20;
const BALLOON_BYTES: u64 = 32 << 20;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn linux_uses_every_device_before_and_after_a_move() {
    let lab = Lab::new().await;
    let (a, b) = lab.two_hosts().await;
    let disks = Disks::new(&lab);
    let mut here = launch(&lab, &a, &disks).await;

    random_numbers(&mut here).await;
    let sum = files(&mut here).await;
    read_only(&mut here, &disks).await;
    what_is_freed_goes_back_to_the_host(&mut here).await;
    inflate(&mut here).await;

    let mut there = receive(&lab, &b, &disks).await;
    let ticket = there.ticket().await;
    let held = memory_held(&here).await;
    let report = Journey::whole(&here, &ticket, Terms::default()).await;
    let report = report.unwrap_or_else(|error| panic!("the migration: {error:?}"));
    assert!(report.verified, "{report:#?}");
    // What the host no longer holds has not travelled, not even as a name. A round later the guest may use some of it again.
    let given_back = (MEMORY_BYTES - held) / page::PAGE_SIZE as u64;
    assert!(report.rungs.zero.pages >= given_back / 10 * 9, "{held} bytes were held: {report:#?}");
    here.assert_ends_well().await;

    let balloon = there.status().await.balloon.expect("it came with a balloon");
    assert_eq!((balloon.target_bytes, balloon.actual_bytes), (BALLOON_BYTES, BALLOON_BYTES));
    ask(&mut there, "echo 3 >/proc/sys/vm/drop_caches").await;
    assert_eq!(ask(&mut there, "sha256sum </mnt/first").await, sum, "the file is another one after the move");
    deflate(&mut there).await;
    random_numbers(&mut there).await;
    trim(&mut there, &disks).await;
    there.type_line("reboot -f").await;
    there.assert_ends_well().await;
}

/// The hosts' disks: one that the guest makes a file system on, and one that it may not write.
struct Disks {
    data: PathBuf,
    fixed: PathBuf,
}

impl Disks {
    fn new(lab: &Lab) -> Self {
        let (data, fixed) = (lab.dir().join("data.img"), lab.dir().join("fixed.img"));
        let file = fs::File::create(&data).expect("the lab takes a file");
        file.set_len(DISK_BYTES).expect("a sparse file");
        fs::write(&fixed, [7; 1 << 16]).expect("the lab takes a file");
        Self { data, fixed }
    }

    /// What the data disk takes of the host's storage.
    fn allocated(&self) -> u64 {
        fs::metadata(&self.data).expect("the disk is there").blocks() * 512
    }

    fn options(&self) -> Vec<OsString> {
        let mut words: Vec<OsString> = ["--console", "stdio", "--balloon", "on"].map(Into::into).into();
        words.extend(["--disk".into(), format!("path={},id=data", self.data.display()).into()]);
        words.extend(["--disk".into(), format!("path={},readonly=on", self.fixed.display()).into()]);
        words
    }
}

/// The shell is on the virtio console, which is on our pipes; the serial port writes to a file.
async fn launch(lab: &Lab, host: &Host, disks: &Disks) -> Vm {
    let linux = Linux::find().unwrap_or_else(|error| panic!("{error}"));
    let own = linux.command_line().unwrap_or_else(|error| panic!("{error}"));
    let serial = lab.fresh("serial");
    let mut args: Vec<OsString> = ["run", "--name", "devices", "--kernel"].map(Into::into).into();
    args.extend([linux.vmlinux().into(), "--initramfs".into(), linux.initramfs().into()]);
    args.extend(["--memory".into(), MEMORY_BYTES.to_string().into()]);
    args.extend(["--cmdline".into(), format!("{own} tern.shell=hvc0").into()]);
    args.extend(["--serial".into(), format!("file={}", serial.display()).into()]);
    args.extend(disks.options());
    let mut vm = Vm::start(lab, host, "here", None, args);
    until("Linux says on its serial port that it is up", limits::LINUX_BOOT, async || {
        vm.process().assert_alive();
        fs::read_to_string(&serial).is_ok_and(|said| said.contains("tern: READY")).then_some(())
    })
    .await;
    assert_eq!(ask(&mut vm, "tty").await, "/dev/hvc0");
    vm
}

async fn receive(lab: &Lab, host: &Host, disks: &Disks) -> Vm {
    let mut args: Vec<OsString> =
        ["receive", "--listen", "127.0.0.1:0", "--serial", "off"].map(Into::into).into();
    args.extend(disks.options());
    let mut vm = Vm::start(lab, host, "there", None, args);
    vm.wait_for("it listens", limits::START, |status| status.ticket.is_some()).await;
    vm
}

/// What a command prints, its lines as one.
async fn ask(vm: &mut Vm, command: &str) -> String {
    vm.forget_lines();
    // What the terminal echoes of this line is not what is looked for.
    vm.type_line(&format!("x=$({{ {command}; }} 2>&1); echo \"ans\"\"wer:\" $x")).await;
    let line = vm
        .line_within(&format!("answers `{command}`"), limits::LINUX_CHECK, |line| line.contains(ANSWER))
        .await;
    line.split_once(ANSWER).map(|(_, answer)| answer.trim().to_owned()).unwrap_or_default()
}

const ANSWER: &str = "answer:";

/// A line of /proc/meminfo, bytes.
async fn meminfo(vm: &mut Vm, field: &str) -> u64 {
    let answer = ask(vm, &format!("grep {field}: /proc/meminfo")).await;
    let kib = answer.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok());
    kib.unwrap_or_else(|| panic!("/proc/meminfo: {answer}")) << 10
}

/// What the host holds of the guest's memory: what its file has of storage.
async fn memory_held(vm: &Vm) -> u64 {
    let folder = format!("/proc/{}/fd", vm.status().await.pid);
    let is_memory =
        |path: &PathBuf| fs::read_link(path).is_ok_and(|to| to.to_string_lossy().starts_with("/memfd:"));
    let files =
        fs::read_dir(folder).expect("our own process").flatten().map(|entry| entry.path()).filter(is_memory);
    files
        .map(|path| fs::metadata(path).map_or(0, |file| file.blocks() * 512))
        .max()
        .expect("guest memory is a memfd")
}

async fn random_numbers(vm: &mut Vm) {
    assert!(ask(vm, "cat /sys/class/misc/hw_random/rng_current").await.starts_with("virtio_rng"));
    let (first, second) = (ask(vm, RANDOM).await, ask(vm, RANDOM).await);
    assert!(first.len() > 32 && first != second, "{first} and then {second}");
}

const RANDOM: &str = "dd if=/dev/hwrng bs=32 count=1 2>/dev/null | sha256sum";

/// A file system with a file on it, written down; the file's sum.
async fn files(vm: &mut Vm) -> String {
    let made = "mke2fs /dev/vda >/dev/null && mkdir -p /mnt && mount /dev/vda /mnt && cp /bin/busybox /mnt/first && sync && echo done";
    assert_eq!(ask(vm, made).await, "done");
    ask(vm, "sha256sum </mnt/first").await
}

async fn read_only(vm: &mut Vm, disks: &Disks) {
    assert_eq!(ask(vm, "cat /sys/block/vdb/ro").await, "1");
    let content = || fs::read(&disks.fixed).expect("the disk is there");
    let before = content();
    let refused = ask(vm, "dd if=/dev/zero of=/dev/vdb bs=512 count=1 conv=fsync || echo refused").await;
    assert!(refused.ends_with("refused"), "{refused}");
    assert_eq!(content(), before);
}

async fn what_is_freed_goes_back_to_the_host(vm: &mut Vm) {
    let before = memory_held(vm).await;
    let written = format!("dd if=/dev/zero of=/tmp/big bs=64k count={} && echo done", FREED_BYTES >> 16);
    assert!(ask(vm, &written).await.ends_with("done"));
    let full = memory_held(vm).await;
    assert!(full >= before + FREED_BYTES / 3, "{before} and then {full}");
    assert_eq!(ask(vm, "rm /tmp/big && echo done").await, "done");
    until("the guest reports what is free", limits::LINUX_CHECK, async || {
        (memory_held(vm).await + FREED_BYTES / 3 <= full).then_some(())
    })
    .await;
}

async fn inflate(vm: &mut Vm) {
    let free = meminfo(vm, "MemFree").await;
    vm.client().balloon(BALLOON_BYTES).await.expect("it has a balloon");
    settled(vm, BALLOON_BYTES).await;
    let left = meminfo(vm, "MemFree").await;
    assert!(left + BALLOON_BYTES / 4 * 3 <= free, "{free} bytes were free, and then {left}");
}

async fn deflate(vm: &mut Vm) {
    let free = meminfo(vm, "MemFree").await;
    vm.client().balloon(0).await.expect("it has a balloon");
    settled(vm, 0).await;
    let now = meminfo(vm, "MemFree").await;
    assert!(now >= free + BALLOON_BYTES / 4 * 3, "{free} bytes were free, and then {now}");
}

async fn settled(vm: &mut Vm, bytes: u64) {
    let settled = |balloon: vmm::machine::BalloonStatus| balloon.actual_bytes == bytes;
    vm.wait_for("the guest follows", limits::LINUX_CHECK, |status| status.balloon.is_some_and(settled)).await;
}

/// What the file system frees goes back to the host.
async fn trim(vm: &mut Vm, disks: &Disks) {
    let before = disks.allocated();
    assert_eq!(ask(vm, "rm /mnt/first && sync && fstrim /mnt && echo done").await, "done");
    let after = disks.allocated();
    assert!(after + (1 << 20) <= before, "the disk's file takes {before} bytes, and after fstrim {after}");
}
