//! The destination's questions to its site.

use migration_proto::destination::{self, RequestId};
use migration_proto::timer;
use page::ShortId;

use super::super::limits;
use super::super::pages::{self, CheckedPage};
use super::super::site::{SitePage, SiteRung, SiteTold};
use super::{Arrival, Done};

impl Arrival {
    pub(super) fn resolve(&mut self, request: RequestId, ids: Vec<ShortId>) {
        let Some(site) = self.shared.site.clone() else {
            return self.failures.push("the protocol asked a site that is not there".to_owned());
        };
        let (results, domain) = (self.results.0.clone(), self.core.domain().clone());
        let question = self.helpers.spawn(async move {
            let mut told = site.resolve(ids);
            let mut batch = Vec::with_capacity(limits::SITE_BATCH_PAGES);
            while told.recv_many(&mut batch, limits::SITE_BATCH_PAGES).await > 0 {
                let (pages, missing) = sorted(std::mem::take(&mut batch));
                if !missing.is_empty() && results.send(Done::SiteMissing(request, missing)).await.is_err() {
                    return;
                }
                if pages.is_empty() {
                    continue;
                }
                let (domain, room) = (domain.clone(), results.clone());
                let Ok(checked) = tokio::task::spawn_blocking(move || pages::check(&domain, pages)).await
                else {
                    break;
                };
                if room.send(Done::SitePages(checked)).await.is_err() {
                    return;
                }
            }
            if results.send(Done::Answered(request)).await.is_err() {
                tracing::debug!("the migration ended before the site's answer");
            }
        });
        self.questions.insert(request, question);
    }

    pub(super) fn site_page(&mut self, now: timer::Time, checked: &CheckedPage) {
        let rung = match checked.rung {
            SiteRung::Host => destination::SiteRung::Host,
            SiteRung::Site => destination::SiteRung::Site,
        };
        if checked.page.name().short() != checked.id
            && let Some(site) = &self.shared.site
        {
            tracing::warn!(id = ?checked.id, "the site gave a wrong page: dropped, and its holder reported");
            site.report_wrong(checked.id);
        }
        let frames = self.core.site_page(now, rung, checked.id, &checked.page);
        self.install(&frames, &checked.page);
        self.carry_out();
    }
}

/// The pages, and the ids of the missing ones.
fn sorted(told: Vec<SiteTold>) -> (Vec<SitePage>, Vec<ShortId>) {
    let (mut pages, mut missing) = (Vec::with_capacity(told.len()), Vec::new());
    for part in told {
        match part {
            SiteTold::Page(page) => pages.push(page),
            SiteTold::Missing(ids) => missing.extend(ids),
        }
    }
    (pages, missing)
}
