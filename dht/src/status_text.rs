//! `dht status` for people.

use std::{
    fmt::{Arguments, Write},
    time::SystemTime,
};

use crate::status::{ContentStatus, Counters, GonePeer, JoinStatus, PeerStatus, SiteStatus};

/// A peer's state in some lines.
pub(crate) fn describe(status: &SiteStatus) -> String {
    let mut text = Text(String::new());
    text.line(format_args!("peer      {}", status.peer_id));
    for address in &status.listen {
        text.line(format_args!("listening {address}"));
    }
    text.line(format_args!("domain    {}", status.domain));
    text.line(format_args!("content   {}", readiness(status)));
    status.contents.iter().for_each(|content| text.content(content));
    let members = &status.members;
    text.line(format_args!(
        "peers     {} known, {} connected; the site has {}{}",
        members.known,
        members.connected,
        if members.site_size > members.known + 1 { "about " } else { "" },
        members.site_size
    ));
    status.peers.iter().for_each(|peer| text.peer(peer));
    if let Some(more) = members.known.checked_sub(status.peers.len() as u64).filter(|more| *more > 0) {
        text.line(format_args!("  and {more} more"));
    }
    status.joins_silent.iter().for_each(|join| {
        let JoinStatus { address, silent_s, error } = join;
        text.line(format_args!("join      {address} has not answered for {}: {error}", span(*silent_s)));
    });
    status.gone.iter().for_each(|gone| {
        let GonePeer { peer_id, address, gone_s, how } = gone;
        text.line(format_args!("gone      {peer_id} {address} for {}: {how}", span(*gone_s)));
    });
    let index = &status.index;
    text.line(format_args!("index     {} names of this host", index.host_names));
    text.line(format_args!(
        "          {} shards owned, {} entries in {} bytes",
        index.shards_owned, index.owner_entries, index.owner_bytes
    ));
    text.counts(&status.counters);
    text.0
}

fn readiness(status: &SiteStatus) -> String {
    let alone = status.members.known == 0 && !status.joins_silent.is_empty();
    if status.ready && alone {
        let joins = status.joins_silent.iter();
        let joins = joins.map(|join| format!("--join {} does not answer ({})", join.address, join.error));
        return format!("all indexed, but joined nobody: {}", joins.collect::<Vec<_>>().join(", "));
    }
    if status.ready {
        return "all indexed and announced".to_owned();
    }
    let waiting = &status.waiting;
    let mut parts = Vec::new();
    if waiting.scans > 0 {
        parts.push(format!("{} first scans under way", waiting.scans));
    }
    if waiting.owners > 0 {
        parts.push(format!("{} names still to announce to {} owners", waiting.names, waiting.owners));
    }
    if waiting.shards_rehoming > 0 {
        parts.push(format!("{} shards with a new owner", waiting.shards_rehoming));
    }
    format!("not ready: {}", parts.join(", "))
}

/// How long ago a time in seconds since 1970 is, in its largest unit.
fn ago(at: u64) -> String {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_secs());
    span(now.saturating_sub(at))
}

/// A time in its largest unit.
fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..86_400 => format!("{} h", seconds / 3600),
        _ => format!("{} days", seconds / 86_400),
    }
}

struct Text(String);

impl Text {
    fn line(&mut self, line: Arguments<'_>) {
        writeln!(self.0, "{line}").expect("a String takes all");
    }

    fn content(&mut self, content: &ContentStatus) {
        let note = if content.scanned { "" } else { ", first scan under way" };
        let used = content.last_use.map(|at| format!(", last of use {} ago", ago(at))).unwrap_or_default();
        self.line(format_args!(
            "  {} {}: {} pages, {} indexed{note}{used}",
            content.kind, content.name, content.pages, content.indexed_pages
        ));
    }

    fn peer(&mut self, peer: &PeerStatus) {
        let mut notes = String::from(if peer.connected { "" } else { ", not connected" });
        let mut note = |what: &str, left_ms: u64| {
            if left_ms > 0 {
                write!(notes, ", {what} for {} s", left_ms.div_ceil(1000)).expect("a String takes all");
            }
        };
        note("did not answer as an owner: skipped", peer.skipped_as_owner_ms);
        note("did not serve pages: skipped", peer.skipped_as_holder_ms);
        note("served wrong pages: avoided", peer.avoided_ms);
        note("announced pages that it does not have: left out", peer.left_out_ms);
        if peer.doubted {
            notes.push_str(", has few of the pages that it announced: asked last");
        }
        self.line(format_args!("  {} {}{notes}", peer.peer_id, peer.address));
    }

    fn counts(&mut self, count: &Counters) {
        self.line(format_args!(
            "asked     {} names in {} questions: {} found here{}, {} on the site{}, {} missing",
            count.resolve_ids,
            count.resolves,
            count.host_hits,
            percent(count.host_hits, count.resolve_ids),
            count.site_hits,
            percent(count.site_hits, count.resolve_ids),
            count.missing
        ));
        self.line(format_args!(
            "lookups   {} sent with {} names, {} found{}",
            count.lookups_sent,
            count.lookup_ids_sent,
            count.lookup_ids_found,
            percent(count.lookup_ids_found, count.lookup_ids_sent)
        ));
        self.line(format_args!(
            "          {} answered with {} names, {} found{}",
            count.lookups_answered,
            count.lookup_ids_answered,
            count.lookup_ids_answered_found,
            percent(count.lookup_ids_answered_found, count.lookup_ids_answered)
        ));
        self.line(format_args!(
            "announced {} names to owners, {} taken as an owner",
            count.announced_ids, count.announced_ids_taken
        ));
        self.line(format_args!(
            "          {} bytes sent, {} leases renewed, {} shards told anew",
            count.announced_bytes, count.leases_renewed, count.leases_unlike
        ));
        self.line(format_args!(
            "repaired  {} entries learnt from other owners, {} passed on to them",
            count.entries_learnt, count.entries_passed_on
        ));
        self.line(format_args!(
            "pages     {} bytes fetched in {} requests, {} bytes served",
            count.bytes_fetched, count.fetches_sent, count.bytes_served
        ));
        self.line(format_args!(
            "trouble   {} stale, {} wrong pages, {} failed requests",
            count.stale_misses, count.wrong_pages, count.failed_requests
        ));
        self.line(format_args!(
            "refused   {} requests (busy), {} requests (beyond their peer's share), {} requests (malformed), {} connections (not of this site), {} connections (broken in the handshake), {} connections (too many)",
            count.refused_requests, count.refused_over_share, count.malformed_requests, count.refused_connections, count.broken_connections, count.connections_over_limit
        ));
    }
}

/// A share in brackets; nothing of nothing.
fn percent(part: u64, whole: u64) -> String {
    match whole {
        0 => String::new(),
        whole => format!(" ({}%)", u128::from(part) * 100 / u128::from(whole)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::status::Waiting;

    #[test]
    fn it_says_why_a_peer_is_not_ready_and_until_when_others_are_left_out() {
        let peer = PeerStatus {
            peer_id: "P".to_owned(),
            skipped_as_owner_ms: 4100,
            avoided_ms: 600_000,
            ..PeerStatus::default()
        };
        let mut status = SiteStatus { peers: vec![peer], ..SiteStatus::default() };
        status.waiting = Waiting { scans: 1, owners: 2, names: 9, shards_rehoming: 3 };
        status.counters = Counters { resolve_ids: 200, site_hits: 50, ..Counters::default() };
        let text = describe(&status);
        for part in [
            "not ready: 1 first scans under way, 9 names still to announce to 2 owners, 3 shards with a new owner",
            "did not answer as an owner: skipped for 5 s, served wrong pages: avoided for 600 s",
            "50 on the site (25%)",
        ] {
            assert!(text.contains(part), "{text}");
        }
    }
}
