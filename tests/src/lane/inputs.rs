//! What the lane is made of: Debian's packages, and the initramfs of the first level.

use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::process::Command;

use guest_images::linux::{Linux, LinuxError};

use super::archive::Archive;
use super::packages::{self, Kernel, PackageError, Unpacked};
use super::unpack::{self, UnpackError};
use super::verdict::Part;

/// The first level's init and modules.
const INIT: &str = include_str!("../../../guest-images/lane/init");
const MODULES: [&str; 1] = ["kvm_amd"];
/// The second level's. ext4 wants its checksum by another name than modules know each other by.
const GUEST_INIT: &str = include_str!("../../../guest-images/lane/guest-init");
const GUEST_MODULES: [&str; 5] = ["virtio_mmio", "virtio_blk", "virtio_rng", "crc32c_generic", "ext4"];

/// Why the lane cannot be prepared.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InputError {
    /// A package cannot be had.
    #[error("a Debian package that the lane is made of cannot be had")]
    Package(#[from] PackageError),
    /// A kernel cannot be unpacked.
    #[error("a Debian kernel cannot be unpacked")]
    Unpack(#[from] UnpackError),
    /// The test Linux, whose initramfs the stock kernels run too.
    #[error("the workloads of the stock kernels' guests are missing")]
    Linux(#[from] LinuxError),
    /// A file of the host is missing.
    #[error("{} cannot be read", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A tool of the host failed.
    #[error("`{tool}` failed: {said}")]
    Tool {
        /// Which.
        tool: &'static str,
        /// What it said.
        said: String,
    },
    /// The initramfs cannot be written.
    #[error("the first level's initramfs cannot be written to {}", path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// What QEMU starts.
#[derive(Debug)]
pub struct FirstLevel {
    /// Debian's cloud kernel, packed.
    pub kernel: PathBuf,
    /// Everything else.
    pub initramfs: PathBuf,
}

/// Makes the files of `part`'s first level in `work`, with the binaries `vmm` and `lane` of `binaries` in it.
/// # Errors
/// If a package, a tool or a file is missing, with its name.
pub fn prepare(part: Part, binaries: &Path, work: &Path) -> Result<FirstLevel, InputError> {
    let debian = packages::unpacked()?;
    let initramfs = work.join(format!("{}.cpio", part.name()));
    let failed = |source| InputError::Write { path: initramfs.clone(), source };
    let mut archive = Archive::new(BufWriter::new(File::create(&initramfs).map_err(failed)?));
    for (name, data) in contents(part, &debian, binaries, work)? {
        archive.file(&name, &data).map_err(failed)?;
    }
    for folder in ["dev", "proc", "sys", "tmp"] {
        archive.directory(folder).map_err(failed)?;
    }
    // The kernel opens it for init before init can mount anything.
    archive.device("dev/console", 5, 1).map_err(failed)?;
    archive.finish().map_err(failed)?;
    Ok(FirstLevel { kernel: debian.cloud.bzimage, initramfs })
}

/// Every file of the first level, with its name there.
fn contents(
    part: Part,
    debian: &Unpacked,
    binaries: &Path,
    work: &Path,
) -> Result<Vec<(String, Vec<u8>)>, InputError> {
    let mut files = vec![
        ("init".to_owned(), INIT.as_bytes().to_owned()),
        ("bin/busybox".to_owned(), read(&debian.busybox)?),
    ];
    files.extend(modules(&debian.cloud, &MODULES)?);
    for binary in ["vmm", "lane"] {
        let stripped = work.join(binary);
        let built = binaries.join(binary);
        tool("strip", &["--strip-all".as_ref(), "-o".as_ref(), stripped.as_os_str(), built.as_os_str()])?;
        files.push((format!("bin/{binary}"), read(&stripped)?));
        for library in libraries(&stripped)? {
            let name = library.trim_start_matches('/').to_owned();
            if files.iter().all(|(known, _)| *known != name) {
                files.push((name, read(Path::new(&library))?));
            }
        }
    }
    let workloads = read(&Linux::find()?.initramfs())?;
    let (name, kernel, image) = match part {
        Part::Boots => ("generic", &debian.generic, unpack::vmlinux(&debian.generic.bzimage)?),
        Part::Moves => ("cloud", &debian.cloud, read(&debian.cloud.bzimage)?),
    };
    files.push((format!("kernels/{name}"), image));
    let mut initramfs = workloads;
    initramfs.extend(guest_archive(kernel)?);
    files.push((format!("kernels/{name}.cpio"), initramfs));
    Ok(files)
}

/// What the test Linux' initramfs lacks under a stock kernel. Linux unpacks archives that follow each other one after the other.
fn guest_archive(kernel: &Kernel) -> Result<Vec<u8>, InputError> {
    let failed = |source| InputError::Write { path: PathBuf::from("an archive in memory"), source };
    let mut archive = Archive::new(Vec::new());
    archive.file("guest-init", GUEST_INIT.as_bytes()).map_err(failed)?;
    for (name, data) in modules(kernel, &GUEST_MODULES)? {
        archive.file(&name, &data).map_err(failed)?;
    }
    archive.finish().map_err(failed)
}

/// The modules `names` of `kernel` with what they need, and the list of them in loading order.
fn modules(kernel: &Kernel, names: &[&str]) -> Result<Vec<(String, Vec<u8>)>, InputError> {
    let mut files = Vec::new();
    let mut order = String::new();
    for path in kernel.modules(names)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        order.push_str(&format!("{name}\n"));
        files.push((format!("modules/{name}"), read(&path)?));
    }
    files.push(("modules/order".to_owned(), order.into_bytes()));
    Ok(files)
}

/// The shared libraries that `program` loads, its loader among them.
fn libraries(program: &Path) -> Result<Vec<String>, InputError> {
    let said = tool("ldd", &[program.as_os_str()])?;
    // "libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x…)", "/lib64/ld-linux-x86-64.so.2 (0x…)", and the vDSO, which is no file.
    let paths = said.split_whitespace().filter(|word| word.starts_with('/'));
    Ok(paths.map(ToOwned::to_owned).collect())
}

fn tool(tool: &'static str, args: &[&std::ffi::OsStr]) -> Result<String, InputError> {
    let failed = |said: String| InputError::Tool { tool, said };
    let output = Command::new(tool).args(args).output().map_err(|error| failed(error.to_string()))?;
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn read(path: &Path) -> Result<Vec<u8>, InputError> {
    fs::read(path).map_err(|source| InputError::Read { path: path.to_owned(), source })
}
