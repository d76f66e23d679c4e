//! A guest of some eighty bytes: an ELF file with a PVH note, assembled here.
//!
//! It prints its command line and the first byte of its initramfs, then counts for ever: in a register and in two pages, with
//! a heartbeat a turn. A byte on its serial port is a command: `c` checks the counts against each other and prints `Y`
//! or `N`; `q` resets the machine; `x` faults without a handler; anything else is echoed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use page::Gfn;
use vmm::config::{BootProtocol, CpuChoice, DeviceOptions, Serial, VmConfig};
use vmm::machine::Machine;

/// The two pages that it counts in.
pub(crate) const COUNTERS: [Gfn; 2] = [Gfn(0x200), Gfn(0x201)];

/// A guest that does nothing waits this long for what must come at once.
const PATIENCE: Duration = Duration::from_secs(20);

/// Puts instructions together.
#[derive(Default)]
pub(crate) struct Assembler {
    code: Vec<u8>,
    labels: BTreeMap<&'static str, usize>,
    jumps: Vec<(usize, &'static str)>,
}

impl Assembler {
    pub(crate) fn put(&mut self, bytes: &[u8]) -> &mut Self {
        self.code.extend(bytes);
        self
    }
    pub(crate) fn label(&mut self, name: &'static str) -> &mut Self {
        self.labels.insert(name, self.code.len());
        self
    }
    /// A jump with an 8-bit displacement: 0xeb always, 0x74 if equal or zero.
    pub(crate) fn jump(&mut self, opcode: u8, to: &'static str) -> &mut Self {
        self.put(&[opcode, 0]);
        self.jumps.push((self.code.len(), to));
        self
    }
    pub(crate) fn link(mut self) -> Vec<u8> {
        for (from, to) in self.jumps {
            let offset = i8::try_from(self.labels[to] as isize - from as isize).unwrap();
            self.code[from - 1] = offset.to_le_bytes()[0];
        }
        self.code
    }
}

fn code() -> Vec<u8> {
    let mut a = Assembler::default();
    a.put(&[0x66, 0xba, 0xf8, 0x03]); // mov dx, 0x3f8
    a.put(&[0x8b, 0x73, 0x18]); // mov esi, [ebx + 24]: the command line
    a.label("text").put(&[0xac, 0x84, 0xc0]).jump(0x74, "module").put(&[0xee]).jump(0xeb, "text"); // lodsb; test; out
    a.label("module").put(&[0x83, 0x7b, 0x0c, 0x00]).jump(0x74, "start"); // cmp dword [ebx + 12], 0: modules
    a.put(&[0x8b, 0x43, 0x10, 0x8b, 0x00, 0x8a, 0x00, 0xee]); // mov eax, [ebx + 16]; eax, [eax]; al, [eax]; out
    a.label("start").put(&[0xb0, b'\n', 0xee, 0x31, 0xf6]); // newline; xor esi, esi
    a.label("turn").put(&[0x46]); // inc esi
    a.put(&[0x89, 0x35, 0x00, 0x00, 0x20, 0x00]); // mov [0x200000], esi
    a.put(&[0xff, 0x05, 0x00, 0x10, 0x20, 0x00]); // inc dword [0x201000]
    a.put(&[0xe6, 0xe9]); // out 0xe9, al
    a.put(&[0x66, 0xba, 0xfd, 0x03, 0xec, 0xa8, 0x01]).jump(0x74, "turn"); // in al, 0x3fd; test al, 1
    a.put(&[0x66, 0xba, 0xf8, 0x03, 0xec]); // in al, 0x3f8
    a.put(&[0x3c, b'q']).jump(0x74, "reset");
    a.put(&[0x3c, b'x']).jump(0x74, "fault");
    a.put(&[0x3c, b'c']).jump(0x74, "check");
    a.label("say").put(&[0xee]).jump(0xeb, "turn");
    a.label("check").put(&[0xb0, b'N']); // mov al, 'N'
    a.put(&[0x8b, 0x0d, 0x00, 0x10, 0x20, 0x00]); // mov ecx, [0x201000]
    a.put(&[0x39, 0xf1]).jump(0x74, "same").jump(0xeb, "say"); // cmp ecx, esi
    a.label("same").put(&[0x3b, 0x35, 0x00, 0x00, 0x20, 0x00]).jump(0x74, "right").jump(0xeb, "say"); // cmp esi, [..]
    a.label("right").put(&[0xb0, b'Y']).jump(0xeb, "say");
    a.label("reset").put(&[0xb0, 0xfe, 0xe6, 0x64, 0xf4]); // out 0x64, 0xfe
    a.label("fault").put(&[0x0f, 0x0b]); // ud2, and there is no handler
    a.link()
}

/// An ELF file with the guest, and the note if wanted.
pub(crate) fn elf(note: bool) -> Vec<u8> {
    elf_of(&code(), note)
}

/// An ELF file with the code at 1 MiB, and the note if wanted.
pub(crate) fn elf_of(code: &[u8], note: bool) -> Vec<u8> {
    let load_at = 0x10_0000u64;
    let phdr = |kind: u32, offset: u64, at: u64, bytes: u64| {
        let mut p = kind.to_le_bytes().to_vec();
        p.extend(5u32.to_le_bytes());
        p.extend([offset, at, at, bytes, bytes, 4].iter().flat_map(|f| f.to_le_bytes()));
        p
    };
    let mut note_bytes =
        [4u32, 4, if note { 18 } else { 19 }].iter().flat_map(|f| f.to_le_bytes()).collect::<Vec<_>>();
    note_bytes.extend(b"Xen\0");
    note_bytes.extend(u32::try_from(load_at).unwrap().to_le_bytes());
    let (note_at, code_at) = (64 + 2 * 56, 256);
    let mut elf = b"\x7fELF\x02\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2u16, 62].iter().flat_map(|f| f.to_le_bytes()));
    elf.extend(1u32.to_le_bytes());
    elf.extend([load_at, 64, 0].iter().flat_map(|f| f.to_le_bytes()));
    elf.extend(0u32.to_le_bytes());
    elf.extend([64u16, 56, 2, 64, 0, 0].iter().flat_map(|f| f.to_le_bytes()));
    elf.extend(phdr(1, code_at, load_at, code.len() as u64));
    elf.extend(phdr(4, note_at, 0, note_bytes.len() as u64));
    elf.extend(note_bytes);
    elf.resize(usize::try_from(code_at).unwrap(), 0);
    elf.extend(code);
    elf
}

/// A place with the guest's kernel and its console.
pub(crate) struct Place {
    dir: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("kernel"), elf(true)).unwrap();
        Self { dir }
    }
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
    pub(crate) fn file(&self, name: &str, bytes: &[u8]) -> PathBuf {
        std::fs::write(self.path(name), bytes).unwrap();
        self.path(name)
    }
    pub(crate) fn config(&self) -> VmConfig {
        VmConfig {
            name: "tiny".to_owned(),
            kernel: self.path("kernel"),
            boot: BootProtocol::Auto,
            acpi: true,
            initramfs: None,
            cmdline: "hello".to_owned(),
            memory_bytes: 16 << 20,
            cpus: 1,
            loads: Vec::new(),
            serial: Serial::File(self.path("console")),
            cpu: CpuChoice::Host,
            devices: DeviceOptions::default(),
        }
    }
}

/// Waits for `what`; fails the test if it does not come.
pub(crate) fn wait(what: &str, mut done: impl FnMut() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < end, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Waits until a file holds `text`.
pub(crate) fn wait_for_text(path: &Path, text: &str) {
    wait(text, || std::fs::read(path).is_ok_and(|b| String::from_utf8_lossy(&b).contains(text)));
}

/// Waits until the guest has made `beats` more turns.
pub(crate) fn wait_for_beats(machine: &Machine, beats: u64) {
    let goal = machine.heartbeat().count + beats;
    wait("heartbeats", || machine.heartbeat().count >= goal);
}
