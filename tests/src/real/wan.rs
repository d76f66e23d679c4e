//! The WAN link between two vmm processes: the demo's shaper, which can be cut.

use std::time::Duration;

use tern::demo::link::LinkConfig;
use tern::demo::shaper::{Cut, Shaper, WanCounts};
use vmm::migrate::ticket::Ticket;

/// A link towards one destination. Dropping it ends it.
#[derive(Debug)]
pub struct Wan {
    shaper: Shaper,
    ticket: String,
}

impl Wan {
    /// A link to the destination that gave `ticket`, of `rate_bps` bits a second each way and a round trip of `rtt`.
    #[must_use]
    pub fn to(ticket: &str, rate_bps: u64, rtt: Duration) -> Self {
        let ticket: Ticket = ticket.parse().expect("a destination gives a ticket");
        let destination = ticket.resolve().expect("tickets of the lab name addresses");
        let shaper =
            Shaper::start(destination, LinkConfig::half_of(rate_bps, rtt)).expect("a relay on loopback");
        let ticket = Ticket { address: shaper.address().to_string(), ..ticket }.to_string();
        Self { shaper, ticket }
    }

    /// The ticket by which a source reaches the destination over this link.
    #[must_use]
    pub fn ticket(&self) -> &str {
        &self.ticket
    }

    /// What passed so far.
    #[must_use]
    pub fn counts(&self) -> WanCounts {
        self.shaper.counts()
    }

    /// From now on what is on the link in these directions is lost, and in the others not.
    pub fn cut(&self, cut: Cut) {
        self.shaper.cut(cut);
    }
}
