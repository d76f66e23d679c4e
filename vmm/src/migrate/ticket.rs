//! A ticket: where a VM can arrive, and by which key one knows that it is the right place.

use std::fmt;
use std::net::{SocketAddr, ToSocketAddrs};
use std::str::FromStr;

use super::MigrateError;
use super::identity::HostKey;

/// `ADDR:PORT#HEX64`, or `ADDR:PORT` alone. `ADDR` may be a name, an IPv4 address, or an IPv6 address in brackets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ticket {
    /// `ADDR:PORT` as given.
    pub address: String,
    /// The key that the destination must prove; without it, any key of the source's authorised ones.
    pub key: Option<HostKey>,
}

impl Ticket {
    /// Looks the address up. Asks the system's resolver, so it can block: call it on a blocking thread.
    ///
    /// # Errors
    /// [`MigrateError::Address`] if the name does not resolve.
    pub fn resolve(&self) -> Result<SocketAddr, MigrateError> {
        let failed = |why: String| MigrateError::Address { address: self.address.clone(), why: why.into() };
        let mut found = self.address.to_socket_addrs().map_err(|e| failed(e.to_string()))?;
        found.next().ok_or_else(|| failed("the name has no address".to_owned()))
    }
}

impl fmt::Display for Ticket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)?;
        self.key.iter().try_for_each(|key| write!(f, "#{key}"))
    }
}

impl FromStr for Ticket {
    type Err = MigrateError;

    fn from_str(given: &str) -> Result<Self, MigrateError> {
        let bad = |why| MigrateError::Ticket { given: given.to_owned(), why };
        let (address, key) = match given.split_once('#') {
            None => (given, None),
            Some((address, hex)) => {
                let key =
                    HostKey::from_hex(hex).ok_or_else(|| bad("after `#` there must be 64 hex digits"))?;
                (address, Some(key))
            }
        };
        let (host, port) = address.rsplit_once(':').ok_or_else(|| bad("the port is missing"))?;
        if host.is_empty() || (host.contains(':') && !host.starts_with('[')) {
            return Err(bad("the address must be a name, an IPv4 address, or an IPv6 address in brackets"));
        }
        if port.parse::<u16>().map_or(true, |port| port == 0) {
            return Err(bad("the port must be a number from 1 to 65535"));
        }
        Ok(Self { address: address.to_owned(), key })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_again() {
        let key = "ab".repeat(32);
        for given in ["127.0.0.1:7000".to_owned(), format!("[::1]:7000#{key}"), format!("b1.example:1#{key}")]
        {
            assert_eq!(given.parse::<Ticket>().unwrap().to_string(), given);
        }
    }

    #[test]
    fn what_is_wrong_is_said() {
        let key = "ab".repeat(32);
        for (given, part) in [
            ("127.0.0.1".to_owned(), "port is missing"),
            ("127.0.0.1:0".to_owned(), "1 to 65535"),
            ("127.0.0.1:http".to_owned(), "1 to 65535"),
            (":7000".to_owned(), "address must be"),
            ("::1:7000".to_owned(), "in brackets"),
            ("127.0.0.1:7000#".to_owned(), "64 hex digits"),
            (format!("127.0.0.1:7000#{}", &key[1..]), "64 hex digits"),
            (format!("127.0.0.1:7000#{key}#{key}"), "64 hex digits"),
        ] {
            let error = given.parse::<Ticket>().unwrap_err().to_string();
            assert!(error.contains(part), "{given}: {error}");
        }
    }

    #[test]
    fn a_name_that_does_not_resolve_is_an_address_error() {
        let ticket: Ticket = "no-such-host.invalid:7000".parse().unwrap();
        assert!(matches!(ticket.resolve(), Err(MigrateError::Address { .. })));
    }
}
