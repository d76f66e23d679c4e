//! Kernels of every format: started on the real /dev/kvm, refused when broken, and ended by the guest itself.
#![expect(clippy::unwrap_used, reason = "a test's helpers fail the test")]

mod tiny;

use std::io::Write as _;
use std::process::{Command, Stdio};

use proptest::prelude::*;
use proptest::sample::Index;
use tiny::{Assembler, COUNTERS, Place, elf, elf_of, wait_for_beats, wait_for_text};
use vmm::boot::{BootError, KernelError, check_kernel};
use vmm::config::{BootProtocol, Load, VmConfig};
use vmm::machine::{Machine, MachineError, RunState, StopReason};

const PROTOCOLS: [BootProtocol; 3] = [BootProtocol::Auto, BootProtocol::Pvh, BootProtocol::Linux64];

/// A guest for Linux's 64-bit entry: it prints its command line, the first byte of its initramfs, the beginning of its ACPI
/// tables and the number of runs in its memory map. Then `p` powers off, `q` resets, and `r` jumps to the firmware's entry, whose
/// instructions are the same in every mode.
fn code64() -> Vec<u8> {
    let mut a = Assembler::default();
    a.put(&[0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    a.put(&[0x89, 0xf3, 0x8b, 0xb3, 0x28, 0x02, 0x00, 0x00]); // mov ebx, esi; mov esi, [rbx + 0x228]: the command line
    a.label("text").put(&[0xac, 0x84, 0xc0]).jump(0x74, "initramfs").put(&[0xee]).jump(0xeb, "text"); // lodsb; test; out
    a.label("initramfs").put(&[0x8b, 0xb3, 0x18, 0x02, 0x00, 0x00]); // mov esi, [rbx + 0x218]
    a.put(&[0x85, 0xf6]).jump(0x74, "tables").put(&[0xac, 0xee]); // test esi, esi; lodsb; out
    a.label("tables").put(&[0x48, 0x8b, 0x73, 0x70]); // mov rsi, [rbx + 0x70]
    a.put(&[0x48, 0x85, 0xf6]).jump(0x74, "map").put(&[0xac, 0xee, 0xac, 0xee, 0xac, 0xee]);
    a.label("map").put(&[0x8a, 0x83, 0xe8, 0x01, 0x00, 0x00]); // mov al, [rbx + 0x1e8]
    a.put(&[0x04, b'0', 0xee, 0xb0, b'\n', 0xee]); // add al, '0'; out; newline
    a.label("turn").put(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01]).jump(0x74, "turn"); // in al, 0x3fd; test al, 1
    a.put(&[0x66, 0xba, 0xf8, 0x03, 0xec]); // in al, 0x3f8
    a.put(&[0x3c, b'q']).jump(0x74, "reset").put(&[0x3c, b'r']).jump(0x74, "firmware");
    a.put(&[0x3c, b'p']).jump(0x74, "off").put(&[0x0f, 0x0b]); // ud2, and there is no handler
    a.label("firmware").put(&[0xb8, 0xf0, 0xff, 0x0f, 0x00, 0xff, 0xe0]); // mov eax, 0xffff0; jmp rax
    a.label("reset").put(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4]); // out 0x64, 0xfe
    a.label("off").put(&[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4]); // out 0x600, 0x34
    a.link()
}

/// Where the parts of a setup header stand in the file.
const HEADER_END: usize = 0x201;
const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const VERSION: usize = 0x206;
const LOADFLAGS: usize = 0x211;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PAYLOAD_LENGTH: usize = 0x24c;
const INIT_SIZE: usize = 0x260;

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// A bzImage with one sector of setup code, at home at 2 MiB, movable by 2 MiB.
fn bzimage() -> Vec<u8> {
    let code = code64();
    let protected = (0x200 + code.len()).next_multiple_of(16);
    let mut image = vec![0; 1024 + protected];
    put(&mut image, SETUP_SECTS, &[1]);
    put(&mut image, SYSSIZE, &u32::try_from(protected / 16).unwrap().to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS");
    put(&mut image, VERSION, &0x20fu16.to_le_bytes());
    put(&mut image, LOADFLAGS, &[1]);
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    put(&mut image, 0x230, &0x20_0000u32.to_le_bytes());
    put(&mut image, 0x234, &[1]);
    put(&mut image, XLOADFLAGS, &1u16.to_le_bytes());
    put(&mut image, CMDLINE_SIZE, &2047u32.to_le_bytes());
    put(&mut image, PAYLOAD_LENGTH, &0x200u32.to_le_bytes());
    put(&mut image, 0x258, &0x20_0000u64.to_le_bytes());
    put(&mut image, INIT_SIZE, &0x10_0000u32.to_le_bytes());
    put(&mut image, 1024 + 0x200, &code);
    image
}

fn launch(config: &VmConfig) -> std::sync::Arc<Machine> {
    Machine::launch(config).unwrap_or_else(|e| panic!("these tests need a working /dev/kvm: {e}"))
}

/// Starts the guest, waits for what it prints, tells it `word`, and waits for its end.
fn run(place: &Place, config: &VmConfig, printed: &str, word: u8) -> StopReason {
    let machine = launch(config);
    machine.resume().unwrap();
    wait_for_text(&place.path("console"), printed);
    tiny::wait("room", || machine.serial_input(&[word]) == 1);
    let mut ended = None;
    tiny::wait("the end", || {
        if let RunState::Stopped(reason) = &*machine.watch().borrow() {
            ended = Some(reason.clone());
        }
        ended.is_some()
    });
    ended.unwrap()
}

#[test]
fn an_elf_kernel_with_a_note_starts_by_pvh() {
    let place = Place::new();
    let machine = launch(&place.config());
    machine.resume().unwrap();
    wait_for_beats(&machine, 3);
    let mut page = Box::new([0; page::PAGE_SIZE]);
    machine.memory().read_page(COUNTERS[0], &mut page);
    assert_ne!(page[..4], [0; 4]);
}

#[test]
fn an_elf_kernel_starts_by_the_64_bit_protocol() {
    let place = Place::new();
    let kernel = place.file("vmlinux", &elf_of(&code64(), false));
    let initramfs = Some(place.file("initramfs", &[b'!'; 5000]));
    let config = VmConfig { kernel, initramfs, ..place.config() };
    assert_eq!(run(&place, &config, "hello!RSD3\n", b'p'), StopReason::Guest);
}

#[test]
fn an_elf_kernel_that_can_do_both_starts_as_it_is_told() {
    let place = Place::new();
    let kernel = place.file("vmlinux", &elf_of(&code64(), true));
    let config = VmConfig { kernel, boot: BootProtocol::Linux64, acpi: false, ..place.config() };
    assert_eq!(run(&place, &config, "3\n", b'q'), StopReason::Guest);
}

#[test]
fn a_bzimage_starts_where_it_wants_to_stand() {
    let place = Place::new();
    let kernel = place.file("bzImage", &bzimage());
    let initramfs = Some(place.file("initramfs", &[b'!'; 5000]));
    let config = VmConfig { kernel, initramfs, ..place.config() };
    assert_eq!(run(&place, &config, "hello!RSD3\n", b'q'), StopReason::Guest);
}

/// Debian's kernels restarted through the BIOS, which is not there, and ran through zeros for ever.
#[test]
fn a_guest_that_jumps_to_the_firmware_has_restarted() {
    let place = Place::new();
    let kernel = place.file("bzImage", &bzimage());
    let config = VmConfig { kernel, acpi: false, ..place.config() };
    assert_eq!(run(&place, &config, "3\n", b'r'), StopReason::Guest);
}

#[test]
fn a_bzimage_gives_way_and_its_memory_map_goes_beyond_4_gib() {
    let place = Place::new();
    let kernel = place.file("bzImage", &bzimage());
    let loads = vec![Load { file: place.file("data", &[7; 3000]), addr: 0x20_0000 }];
    let config = VmConfig { kernel, loads, memory_bytes: 5 << 30, ..place.config() };
    assert_eq!(
        run(&place, &config, "helloRSD4\n", b'x'),
        StopReason::Failed("virtual CPU 0: triple fault".to_owned())
    );
}

#[test]
fn what_a_bzimage_needs_is_checked_before_anything_is_written() {
    let place = Place::new();
    let refused = |image: &[u8], change: &dyn Fn(&mut VmConfig)| {
        let mut config = VmConfig { kernel: place.file("bzImage", image), ..place.config() };
        change(&mut config);
        match Machine::launch(&config).expect_err("it should have been refused") {
            MachineError::Boot(error) => error,
            other => panic!("{other}"),
        }
    };
    let error = refused(&bzimage(), &|c| c.cmdline = "x".repeat(2048));
    assert!(matches!(error, BootError::CmdlineLength { bytes: 2048, most: 2047, .. }), "{error}");
    let error = refused(&bzimage(), &|c| c.memory_bytes = 2 << 20);
    assert!(matches!(error, BootError::NoRoomForKernel { bytes: 0x10_0000, from: 0x20_0000 }), "{error}");
    let mut rigid = bzimage();
    put(&mut rigid, 0x234, &[0]);
    let error = refused(&rigid, &|c| c.memory_bytes = 2 << 20);
    assert!(matches!(error, BootError::OutOfMemory { .. }), "{error}");
}

#[test]
fn an_elf_kernel_stays_clear_of_what_every_boot_puts_into_memory() {
    let place = Place::new();
    let refused = |start: u64| {
        let mut image = elf(false);
        put(&mut image, 64 + 24, &start.to_le_bytes());
        put(&mut image, 24, &start.to_le_bytes());
        let config = VmConfig { kernel: place.file("vmlinux", &image), ..place.config() };
        match Machine::launch(&config).expect_err("it should have been refused") {
            MachineError::Boot(error) => error,
            other => panic!("{start:#x}: {other}"),
        }
    };
    // The descriptor table, start information, page tables, command line, and firmware's tables.
    for start in [0x500, 0x6000, 0x9000, 0x2_0000, 0x9_fc00, 0xf_ffff] {
        let error = refused(start);
        assert!(matches!(error, BootError::Overlap { .. }), "{start:#x}: {error}");
    }
    // Half outside, outside, and in the hole below 4 GiB.
    for start in [place.config().memory_bytes - 1, place.config().memory_bytes, 3 << 30] {
        let error = refused(start);
        assert!(matches!(error, BootError::OutOfMemory { .. }), "{start:#x}: {error}");
    }
}

#[test]
fn broken_kernels_are_refused_by_what_is_wrong_with_them() {
    let broken = |change: &dyn Fn(&mut Vec<u8>)| {
        let mut image = bzimage();
        change(&mut image);
        check_kernel(&image, BootProtocol::Auto).unwrap_err()
    };
    let patched = |at, bytes: &[u8]| broken(&|image| put(image, at, bytes));
    assert!(matches!(patched(VERSION, &[0xb, 2]), KernelError::OldProtocol { major: 2, minor: 11 }));
    assert!(matches!(patched(LOADFLAGS, &[0]), KernelError::ZImage));
    assert!(matches!(patched(XLOADFLAGS, &[2]), KernelError::Only32Bit));
    assert!(matches!(patched(SETUP_SECTS, &[200]), KernelError::Truncated { .. }));
    assert!(matches!(patched(SYSSIZE, &[0xff; 4]), KernelError::Truncated { .. }));
    assert!(matches!(
        patched(PAYLOAD_LENGTH, &[0xff; 4]),
        KernelError::Truncated { what: "its payload", .. }
    ));
    assert!(matches!(patched(SYSSIZE, &[0; 4]), KernelError::BadSetupHeader { .. }));
    assert!(matches!(patched(INIT_SIZE, &[0; 4]), KernelError::BadSetupHeader { .. }));
    assert!(matches!(patched(0x230, &[3, 0, 0, 0]), KernelError::BadSetupHeader { .. }));
    assert!(matches!(patched(0x258, &[0xff; 8]), KernelError::BadSetupHeader { .. }));
    // A header that ends before the 64-bit fields has none of them.
    assert!(matches!(patched(HEADER_END, &[8]), KernelError::Only32Bit | KernelError::ZImage));
    assert!(matches!(broken(&|image| image.truncate(1024 + 0x200)), KernelError::Truncated { .. }));
    assert!(matches!(broken(&|image| image.truncate(0x1ff)), KernelError::UnknownFormat { .. }));
    assert!(matches!(check_kernel(&bzimage(), BootProtocol::Pvh), Err(KernelError::BzImageByPvh)));

    let mut other = elf(true);
    put(&mut other, 18, &[0xb7, 0]);
    assert!(matches!(check_kernel(&other, BootProtocol::Auto), Err(KernelError::WrongMachine { .. })));
    let mut lost = elf(false);
    put(&mut lost, 24, &[0xff; 8]);
    assert!(matches!(check_kernel(&lost, BootProtocol::Auto), Err(KernelError::EntryOutside { .. })));
    let mut high = elf(false);
    // The only segment's physical address, and the entry with it.
    put(&mut high, 64 + 24, &(5u64 << 30).to_le_bytes());
    put(&mut high, 24, &(5u64 << 30).to_le_bytes());
    assert!(matches!(check_kernel(&high, BootProtocol::Auto), Err(KernelError::EntryHigh { .. })));
    assert!(matches!(check_kernel(&elf(false), BootProtocol::Pvh), Err(KernelError::NoPvhNote)));
    let error = check_kernel(b"\x1f\x8b and so on", BootProtocol::Auto).unwrap_err().to_string();
    assert!(error.contains("gzip") && error.contains("vmlinux"), "{error}");
    for good in [elf(true), elf(false), bzimage()] {
        check_kernel(&good, BootProtocol::Auto).unwrap();
        check_kernel(&good, BootProtocol::Linux64).unwrap();
    }
}

proptest! {
    #[test]
    fn a_kernel_cut_short_is_refused(cut: Index) {
        for whole in [elf(true), bzimage()] {
            // The last bytes may be the padding that some build tools leave out.
            let bytes = cut.index(whole.len() - 16);
            for protocol in PROTOCOLS {
                let refused = check_kernel(&whole[..bytes], protocol).unwrap_err();
                prop_assert!(!refused.to_string().is_empty());
            }
        }
    }

    #[test]
    fn changed_bytes_are_taken_or_refused(changes in proptest::collection::vec((any::<Index>(), any::<u8>()), 1..12)) {
        for mut image in [elf(true), bzimage()] {
            for (at, byte) in &changes {
                // The headers are where it matters.
                let at = at.index(image.len().min(0x280));
                image[at] = *byte;
            }
            for protocol in PROTOCOLS {
                let _ = check_kernel(&image, protocol);
            }
        }
    }
}

/// `vmm run` with the guest at its standard input and output; its exit code once it was told `word`.
fn exit_code(word: &[u8]) -> Option<i32> {
    let place = Place::new();
    let kernel = place.file("bzImage", &bzimage());
    let mut vmm = Command::new(env!("CARGO_BIN_EXE_vmm"))
        .args(["run", "--memory", "16M", "--serial", "stdio", "--kernel"])
        .arg(kernel)
        .arg("--control")
        .arg(place.path("control"))
        .arg("--identity")
        .arg(place.path("host.key"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    vmm.stdin.take().unwrap().write_all(word).unwrap();
    let output = vmm.wait_with_output().unwrap();
    assert_eq!(output.stdout, b"RSD3\n");
    output.status.code()
}

#[test]
fn power_off_and_reset_end_the_process_well_and_a_fault_does_not() {
    assert_eq!(exit_code(b"p"), Some(0));
    assert_eq!(exit_code(b"q"), Some(0));
    assert_eq!(exit_code(b"x"), Some(3));
}
