//! What a migration needs of the site that a host stands in.

use page::{Domain, Page, ShortId};
use tokio::sync::mpsc;

/// Pages from the site's peer that wait for whoever asked: half a region.
const TOLD_QUEUE: usize = 256;

/// Pages of the site. `dht`'s local client satisfies it; without a peer there is none and the ladder has fewer rungs.
pub trait SitePages: Send + Sync + std::fmt::Debug {
    /// The dedup domain of the site.
    fn domain(&self) -> &Domain;
    /// Asks for the pages of `ids`. The channel yields what is found, in any order, as it is found, unverified, and what is missing as soon
    /// as that is certain. It closes when all is said, or the site is lost. Dropping the receiver cancels. Called within a tokio runtime.
    fn resolve(&self, ids: Vec<ShortId>) -> mpsc::Receiver<SiteTold>;
    /// Says that the page given for `id` did not have the name that was asked for, so that its holder is avoided. Does not wait. Called
    /// within a tokio runtime.
    fn report_wrong(&self, id: ShortId);
}

/// What the site says of pages that it was asked for.
#[derive(Debug)]
pub enum SiteTold {
    /// It has this one.
    Page(SitePage),
    /// Nobody there has these.
    Missing(Vec<ShortId>),
}

/// A page that the site says it has. Whoever installs it hashes it first.
#[derive(Debug)]
pub struct SitePage {
    /// The id that was asked for.
    pub id: ShortId,
    /// Whether it came from this host's own memory and files, or from another host of the site.
    pub rung: SiteRung,
    /// What came: not yet hashed by this process.
    pub bytes: Box<Page>,
}

/// Where in the site a page came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SiteRung {
    /// This host.
    Host,
    /// Another host of the site.
    Site,
}

impl From<dht::Found> for SitePage {
    fn from(found: dht::Found) -> Self {
        let rung = match found.rung {
            dht::FoundOn::Host => SiteRung::Host,
            dht::FoundOn::Site => SiteRung::Site,
        };
        Self { id: found.id, rung, bytes: found.bytes }
    }
}

impl SitePages for dht::SiteClient {
    fn domain(&self) -> &Domain {
        Self::domain(self)
    }

    fn resolve(&self, ids: Vec<ShortId>) -> mpsc::Receiver<SiteTold> {
        let mut answer = Self::resolve(self, ids);
        let (told, receiver) = mpsc::channel(TOLD_QUEUE);
        tokio::spawn(async move {
            while let Some(part) = answer.recv().await {
                let part = match part {
                    dht::Told::Found(found) => SiteTold::Page(found.into()),
                    dht::Told::Missing(ids) => SiteTold::Missing(ids),
                };
                if told.send(part).await.is_err() {
                    // The asker has what it wants; dropping `answer` cancels the rest.
                    return;
                }
            }
        });
        receiver
    }

    fn report_wrong(&self, id: ShortId) {
        let client = self.clone();
        tokio::spawn(async move { Self::report_wrong(&client, id).await });
    }
}
