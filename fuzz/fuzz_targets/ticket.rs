//! A migration's ticket: what parses prints as a ticket that parses to the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use vmm::migrate::ticket::Ticket;

fuzz_target!(|text: &str| {
    if let Ok(ticket) = text.parse::<Ticket>() {
        let again = ticket.to_string().parse::<Ticket>().expect("our own ticket");
        assert_eq!(again.to_string(), ticket.to_string());
    }
});
