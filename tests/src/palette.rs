//! The contents that pages of the model VM take, made and named once for all runs: a run then handles pages by small numbers and
//! hashes only roots.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use page::{Domain, DomainKey, PAGE_SIZE, Page, PageHash, ShortId, VerifiedPage};

/// A page's content: an index into the palette. 0 is the zero page.
pub(crate) type Content = u16;

/// How many contents there are.
pub(crate) const CONTENTS: u16 = 1024;

/// One domain's names of all contents.
#[derive(Debug)]
pub(crate) struct Names {
    pub(crate) domain: Domain,
    pages: Vec<VerifiedPage>,
    by_id: BTreeMap<ShortId, Content>,
}

impl Names {
    fn new(domain: Domain) -> Self {
        let pages: Vec<_> =
            (0..CONTENTS).map(|at| VerifiedPage::new(&domain, Box::new(bytes_of(at)))).collect();
        let by_id: BTreeMap<_, _> = pages.iter().map(|page| page.name().short()).zip(0..).collect();
        assert_eq!(by_id.len(), usize::from(CONTENTS), "every content has its own short id");
        Self { domain, pages, by_id }
    }

    pub(crate) fn page(&self, content: Content) -> &VerifiedPage {
        &self.pages[usize::from(content)]
    }

    pub(crate) fn name(&self, content: Content) -> PageHash {
        self.page(content).name()
    }

    /// The content that an honest holder gives for `id`.
    pub(crate) fn find(&self, id: ShortId) -> Option<Content> {
        self.by_id.get(&id).copied()
    }

    /// Which content these bytes are: what a driver does by hashing.
    ///
    /// # Panics
    /// If they are none: the encoder or decoder of literals has damaged a page.
    pub(crate) fn recognise(&self, bytes: &Page) -> Content {
        self.try_recognise(bytes).expect("a literal comes out as the page that went in")
    }

    /// Which content these bytes are, if they are one.
    pub(crate) fn try_recognise(&self, bytes: &Page) -> Option<Content> {
        let content = Content::from_le_bytes([bytes[0], bytes[1]]);
        (content < CONTENTS && self.page(content).bytes() == bytes).then_some(content)
    }
}

/// The bytes of a content: its number, some noise, and text that compresses.
fn bytes_of(content: Content) -> Page {
    let mut page = [0; PAGE_SIZE];
    if content == 0 {
        return page;
    }
    let mut rng = crate::rng::Rng::new(u64::from(content));
    page[64..].iter_mut().zip("a page of a model guest; ".bytes().cycle()).for_each(|(at, b)| *at = b);
    page[..64].iter_mut().for_each(|at| *at = rng.next().to_le_bytes()[0]);
    page[..2].copy_from_slice(&content.to_le_bytes());
    page
}

/// The names in the domain of the model sites (`keyed`), or in the one that ends without a common site use.
pub(crate) fn names(keyed: bool) -> &'static Names {
    static NAMES: OnceLock<[Names; 2]> = OnceLock::new();
    let [unkeyed_names, keyed_names] = NAMES
        .get_or_init(|| [Names::new(Domain::unkeyed()), Names::new(Domain::from_key(&DomainKey([42; 32])))]);
    if keyed { keyed_names } else { unkeyed_names }
}
