//! What the demo's VMs are made of: pagestorm, its working set, and above them the memory that the demo is about.
//!
//! ```text
//! 0        1 MiB       2 MiB               content                          end, a multiple of 2 MiB
//! | nothing | pagestorm | its working set … | built-in content or the image …  |
//! ```

use std::io;
use std::path::{Path, PathBuf};

use page::PAGE_SIZE;

use crate::demo::bound::{Bound, SiteNames};
use crate::demo::content::Content;
use crate::demo::error::DemoError;
use crate::demo::options::Options;
use crate::limits;

/// Where pagestorm's working set begins: above its code, tables and stack.
const WORKING_SET_BASE: u64 = 2 << 20;

/// RAM comes in regions of this many bytes; content begins at the start of one.
const REGION_BYTES: u64 = (page::REGION_PAGES * PAGE_SIZE) as u64;

/// Where a guest's parts stand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    dirty_pages_per_second: u64,
    /// Whether a write replaces a few bytes of its page, in the place of all.
    small_writes: bool,
    working_set_bytes: u64,
    /// The guest-physical address of the content.
    pub(crate) content_addr: u64,
}

impl Layout {
    /// The layout of a guest that writes `dirty_pages_per_second`.
    pub(crate) fn new(dirty_pages_per_second: u64, small_writes: bool) -> Self {
        // Four seconds' worth, so that a round of pre-copy sees pages written once and pages written again.
        let pages = (dirty_pages_per_second * 4).clamp(2, limits::WORKING_SET_PAGES);
        let working_set_bytes = pages * PAGE_SIZE as u64;
        let content_addr = (WORKING_SET_BASE + working_set_bytes).next_multiple_of(REGION_BYTES);
        Self { dirty_pages_per_second, small_writes, working_set_bytes, content_addr }
    }

    /// pagestorm's command line.
    pub(crate) fn cmdline(&self) -> String {
        let Self { dirty_pages_per_second: rate, small_writes, working_set_bytes: ws, content_addr: _ } =
            self;
        let content = if *small_writes { "rewrite prefill=1" } else { "text" };
        format!("rate={rate} ws={ws} base={WORKING_SET_BASE:#x} content={content}")
    }

    /// RAM for `content_bytes` of content.
    pub(crate) fn memory_bytes(&self, content_bytes: u64) -> u64 {
        (self.content_addr + content_bytes).next_multiple_of(REGION_BYTES)
    }
}

/// A VM of the demo: its layout and the file with its content.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// Where its parts stand.
    pub(crate) layout: Layout,
    /// Its content.
    pub(crate) content: PathBuf,
    /// The content's length, bytes.
    content_bytes: u64,
}

impl Guest {
    fn new(layout: Layout, content: &Path) -> Result<Self, DemoError> {
        let metadata = std::fs::metadata(content).map_err(DemoError::file("read", content))?;
        if !metadata.is_file() || !(1..=limits::MEMORY_MAX).contains(&metadata.len()) {
            let (path, max) = (content.display(), limits::MEMORY_MAX >> 20);
            return Err(DemoError::Options(format!(
                "{path} is no memory image: give a file of up to {max} MiB"
            )));
        }
        Ok(Self { layout, content: content.to_owned(), content_bytes: metadata.len() })
    }

    /// Its RAM, bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.layout.memory_bytes(self.content_bytes)
    }
}

/// All memories and files of a demo.
#[derive(Clone, Debug)]
pub(crate) struct Guests {
    /// The VM that moves.
    pub(crate) vm: Guest,
    /// The VM that runs at site B before.
    pub(crate) sibling: Guest,
    /// Files on the destination's host.
    pub(crate) destination_files: Vec<PathBuf>,
    /// Files on another host of site B.
    pub(crate) site_files: Vec<PathBuf>,
    /// pagestorm's ELF file.
    pub(crate) kernel: PathBuf,
}

impl Guests {
    /// Finds the images that `options` name, or writes the built-in content into `dir`.
    ///
    /// # Errors
    /// If an image cannot be used or a file cannot be written.
    pub(crate) fn prepare(options: &Options, dir: &Path) -> Result<Self, DemoError> {
        let kernel = dir.join("pagestorm.elf");
        std::fs::write(&kernel, guest_images::PAGESTORM).map_err(DemoError::file("write", &kernel))?;
        match options.vm_image()? {
            Some(image) => Self::of_images(options, image, kernel, dir),
            None => Self::built_in(options, kernel, dir),
        }
    }

    fn of_images(options: &Options, image: &Path, kernel: PathBuf, dir: &Path) -> Result<Self, DemoError> {
        let mut held: Vec<_> = options
            .site_images()
            .map(std::path::absolute)
            .collect::<Result<_, _>>()
            .map_err(DemoError::file("find", "the images of site B"))?;
        if held.len() > limits::SITE_IMAGES {
            let most = limits::SITE_IMAGES;
            return Err(DemoError::Options(format!(
                "site B can hold at most {most} images: give fewer site=FILE"
            )));
        }
        let sibling = if held.is_empty() { small_sibling(dir)? } else { held.remove(0) };
        Ok(Self {
            vm: Guest::new(Layout::new(options.dirty, options.small_writes), image)?,
            sibling: Guest::new(Layout::new(0, false), &sibling)?,
            destination_files: Vec::new(),
            site_files: held,
            kernel,
        })
    }

    fn built_in(options: &Options, kernel: PathBuf, dir: &Path) -> Result<Self, DemoError> {
        let layout = Layout::new(options.dirty, options.small_writes);
        let pages = options.memory.saturating_sub(layout.content_addr) / PAGE_SIZE as u64;
        let content = Content::new(options.seed, pages);
        let [memory, sibling, near, far] =
            ["vm.ram", "sibling.ram", "near.img", "far.img"].map(|name| dir.join(name));
        content.write_memory(&memory).map_err(DemoError::file("write", &memory))?;
        content.write_sibling(&sibling).map_err(DemoError::file("write", &sibling))?;
        content.write_near_file(&near).map_err(DemoError::file("write", &near))?;
        content.write_far_file(&far).map_err(DemoError::file("write", &far))?;
        Ok(Self {
            vm: Guest::new(layout, &memory)?,
            sibling: Guest::new(Layout::new(0, false), &sibling)?,
            destination_files: vec![near],
            site_files: vec![far],
            kernel,
        })
    }

    /// The bound of the VM's content against all that site B holds.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub(crate) fn bound(&self) -> Result<Bound, DemoError> {
        let open = |path: &Path| std::fs::File::open(path).map_err(DemoError::file("read", path));
        let mut names = SiteNames::default();
        for path in
            std::iter::once(&self.sibling.content).chain(&self.destination_files).chain(&self.site_files)
        {
            names.add(open(path)?).map_err(DemoError::file("read", path))?;
        }
        let image = &self.vm.content;
        names.bound_of(open(image)?).map_err(DemoError::file("compute the bound of", image))
    }
}

/// Where no image is given for the sibling, it has a region of zeros.
fn small_sibling(dir: &Path) -> Result<PathBuf, DemoError> {
    let path = dir.join("sibling.ram");
    let write = || -> io::Result<()> { std::fs::File::create_new(&path)?.set_len(REGION_BYTES) };
    write().map_err(DemoError::file("write", &path))?;
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_writes_nothing_needs_little_besides_the_image() {
        let layout = Layout::new(0, false);
        assert_eq!(layout.content_addr, 4 << 20);
        assert_eq!(layout.memory_bytes(128 << 20), 132 << 20);
        assert_eq!(layout.memory_bytes((128 << 20) + 1), 134 << 20);
        assert!(layout.cmdline().starts_with("rate=0 ws=8192 "));
    }

    #[test]
    fn the_working_set_grows_with_the_rate_up_to_its_bound() {
        assert_eq!(Layout::new(500, false).content_addr, 10 << 20);
        assert_eq!(Layout::new(limits::DIRTY_RATE, true).content_addr, 18 << 20);
    }
}
