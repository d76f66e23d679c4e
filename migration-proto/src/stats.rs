//! What the core counts. The shell exports it.

use crate::timer::Span;

/// Pages that each rung of the ladder gave, as the destination counts them.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DestinationStats {
    /// All-zero pages.
    pub zero: u64,
    /// Copies of another frame of this VM.
    pub duplicate: u64,
    /// Named again with the content that was already there.
    pub in_place: u64,
    /// From this host's memory and files.
    pub host: u64,
    /// From other hosts of the site.
    pub site: u64,
    /// Literals from the source.
    pub source: u64,
    /// Literals that came too late or twice.
    pub unneeded: u64,
    /// Pages from the site that did not match the id asked for.
    pub wrong: u64,
    /// Questions that the site did not answer in time.
    pub site_timeouts: u64,
    /// Regions whose short ids led to a wrong page, found out by their root.
    pub root_mismatches: u64,
}

impl DestinationStats {
    /// The fields in the order of the wire.
    pub(crate) fn to_array(self) -> [u64; 10] {
        let Self {
            zero,
            duplicate,
            in_place,
            host,
            site,
            source,
            unneeded,
            wrong,
            site_timeouts,
            root_mismatches,
        } = self;
        [zero, duplicate, in_place, host, site, source, unneeded, wrong, site_timeouts, root_mismatches]
    }

    /// The inverse of `to_array`.
    pub(crate) fn from_array(fields: [u64; 10]) -> Self {
        let [zero, duplicate, in_place, host, site, source, unneeded, wrong, site_timeouts, root_mismatches] =
            fields;
        Self {
            zero,
            duplicate,
            in_place,
            host,
            site,
            source,
            unneeded,
            wrong,
            site_timeouts,
            root_mismatches,
        }
    }
}

/// What came after the VM ran at the destination, as the destination counts it. Frames unless a field says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct PostcopyStats {
    /// Absent when the VM began to run; a frame that its page could not be installed at counts again, here and below.
    pub absent: u64,
    /// All-zero pages.
    pub zero: u64,
    /// From this host's memory and files.
    pub host: u64,
    /// From other hosts of the site.
    pub site: u64,
    /// From the source.
    pub source: u64,
    /// Pages, from wherever, that were needed no more.
    pub unneeded: u64,
    /// Pages, from wherever, that did not have the name asked for.
    pub wrong: u64,
    /// Frames that a virtual CPU waited for.
    pub faults: u64,
    /// Of those, zero pages.
    pub faults_zero: u64,
    /// Of those, given by this host.
    pub faults_host: u64,
    /// Of those, given by other hosts of the site.
    pub faults_site: u64,
    /// Of those, given by the source.
    pub faults_source: u64,
    /// The longest that one waited, from the driver's word to the page's installation, microseconds.
    pub longest_wait_us: u64,
    /// How often the VM was paused because nobody gave a page.
    pub pauses: u64,
    /// Connections to the source after the one that the VM came by.
    pub reconnects: u64,
    /// How long those waited that this host gave the page to.
    pub waited_host: Waited,
    /// How long those waited that other hosts of the site gave the page to.
    pub waited_site: Waited,
    /// How long those waited that the source gave the page to.
    pub waited_source: Waited,
}

/// How long virtual CPUs waited, to one part in sixteen; zeroes if none did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Waited {
    /// Half of them waited no longer, microseconds.
    pub median_us: u64,
    /// Of a hundred 99 waited no longer, microseconds.
    pub p99_us: u64,
}

impl PostcopyStats {
    /// The fields in the order of the wire.
    pub(crate) fn to_array(self) -> [u64; 21] {
        let Self {
            absent,
            zero,
            host,
            site,
            source,
            unneeded,
            wrong,
            faults,
            faults_zero,
            faults_host,
            faults_site,
            faults_source,
            longest_wait_us,
            pauses,
            reconnects,
            waited_host,
            waited_site,
            waited_source,
        } = self;
        [
            absent,
            zero,
            host,
            site,
            source,
            unneeded,
            wrong,
            faults,
            faults_zero,
            faults_host,
            faults_site,
            faults_source,
            longest_wait_us,
            pauses,
            reconnects,
            waited_host.median_us,
            waited_host.p99_us,
            waited_site.median_us,
            waited_site.p99_us,
            waited_source.median_us,
            waited_source.p99_us,
        ]
    }

    /// The inverse of `to_array`.
    pub(crate) fn from_array(fields: [u64; 21]) -> Self {
        let [
            absent,
            zero,
            host,
            site,
            source,
            unneeded,
            wrong,
            faults,
            faults_zero,
            faults_host,
            faults_site,
            faults_source,
            longest_wait_us,
            pauses,
            reconnects,
            host_median,
            host_p99,
            site_median,
            site_p99,
            source_median,
            source_p99,
        ] = fields;
        let waited = |median_us, p99_us| Waited { median_us, p99_us };
        Self {
            absent,
            zero,
            host,
            site,
            source,
            unneeded,
            wrong,
            faults,
            faults_zero,
            faults_host,
            faults_site,
            faults_source,
            longest_wait_us,
            pauses,
            reconnects,
            waited_host: waited(host_median, host_p99),
            waited_site: waited(site_median, site_p99),
            waited_source: waited(source_median, source_p99),
        }
    }
}

/// What the source counts.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SourceStats {
    /// Rounds begun, the last one included.
    pub rounds: u32,
    /// Pages of the current round.
    pub round_pages: u64,
    /// Of those, named.
    pub named_pages: u64,
    /// Pages whose name had not changed since it was last sent.
    pub unchanged: u64,
    /// Literals handed to the link, pages.
    pub literal_pages: u64,
    /// Literals handed to the link, bytes of encoded batches.
    pub literal_bytes: u64,
    /// Of the literals, pages sent as deltas against the version that the destination had.
    pub delta_pages: u64,
    /// Of the bytes, theirs.
    pub delta_bytes: u64,
    /// Wants for pages that had changed meanwhile.
    pub stale: u64,
    /// The most that the guest was slowed down, percent of the time that its virtual CPUs rested.
    pub throttle_percent: u8,
    /// How long it was slowed down, by whatever percentage, microseconds.
    pub throttled_us: u64,
    /// Connections lost before Commit after which the migration went on, or may.
    pub breaks: u32,
    /// How long there was none, or not all that was under way had come back, in those that are over.
    pub cut_off: Span,
    /// What a plain migration with zero-page detection would have sent: 9 bytes a zero page, 4104 any other, each time it is dirty.
    pub plain_bytes: u64,
}
