//! A whole spill file, to be served.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use page::{Gfn, PAGE_SIZE, Page, PageHash};

use super::{Contents, FormatError, Head, Place, SpillError, parse};

/// See the module's head.
#[derive(Debug)]
pub struct SpillFile {
    path: PathBuf,
    file: File,
    contents: Contents,
}

impl SpillFile {
    /// Reads and checks all of it.
    ///
    /// # Errors
    /// [`SpillError::Damaged`] if it is not whole.
    pub fn open(path: &Path) -> Result<Self, SpillError> {
        let file = File::open(path).map_err(SpillError::io("open", path))?;
        let contents = parse(BufReader::with_capacity(1 << 20, &file)).map_err(|source| match source {
            FormatError::Io(source) => SpillError::io("read", path)(source),
            source => SpillError::Damaged { path: path.to_owned(), source },
        })?;
        Ok(Self { path: path.to_owned(), file, contents })
    }

    /// Whose pages.
    #[must_use]
    pub fn head(&self) -> &Head {
        &self.contents.head
    }

    /// The root that both ends agreed on.
    #[must_use]
    pub fn root(&self) -> PageHash {
        self.contents.root
    }

    /// The name of every page in it.
    #[must_use]
    pub fn names(&self) -> BTreeMap<Gfn, PageHash> {
        let name = |place: &Place| match place {
            Place::Zero => self.contents.head.zero,
            Place::At { name, .. } => *name,
        };
        self.contents.pages.iter().map(|(gfn, place)| (*gfn, name(place))).collect()
    }

    /// A page and its name.
    ///
    /// # Errors
    /// If it cannot be read, or is not in the file.
    pub fn page(&self, gfn: Gfn) -> Result<(PageHash, Box<Page>), SpillError> {
        let mut page: Box<Page> = Box::new([0; PAGE_SIZE]);
        let name = match self.contents.pages.get(&gfn) {
            Some(Place::Zero) => self.contents.head.zero,
            Some(Place::At { offset, name }) => {
                self.file
                    .read_exact_at(page.as_mut_slice(), *offset)
                    .map_err(SpillError::io("read", &self.path))?;
                *name
            }
            None => {
                let missing = io::Error::other(format!("it has no page of frame {gfn}"));
                return Err(SpillError::io("read", &self.path)(missing));
            }
        };
        Ok((name, page))
    }

    /// Removes the file: nobody needs it any more.
    ///
    /// # Errors
    /// If it cannot be removed.
    pub fn remove(&self) -> Result<(), SpillError> {
        fs::remove_file(&self.path).map_err(SpillError::io("remove", &self.path))
    }
}
