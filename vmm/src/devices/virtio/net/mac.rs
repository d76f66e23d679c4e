//! Ethernet addresses.

use std::fmt;
use std::str::FromStr;

/// An Ethernet address of one station.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac([u8; 6]);

/// Six bytes that are no station's address, or something else.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no Ethernet address of one station: write it like 52:54:00:12:34:56, its first byte even and not all zero"
)]
pub struct NoMac(String);

impl Mac {
    /// A random one, locally administered (IEEE 802, 8.4).
    /// # Errors
    /// If the host gives no random bytes.
    pub fn random() -> Result<Self, getrandom::Error> {
        let mut bytes = [0; 6];
        getrandom::fill(&mut bytes)?;
        bytes[0] = bytes[0] & !1 | 2;
        Ok(Self(bytes))
    }

    /// Its bytes, as on the wire.
    #[must_use]
    pub fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl FromStr for Mac {
    type Err = NoMac;

    fn from_str(given: &str) -> Result<Self, NoMac> {
        let refused = || NoMac(given.to_owned());
        let mut bytes = [0; 6];
        let mut fields = given.split(':');
        for byte in &mut bytes {
            let field = fields.next().filter(|f| f.len() == 2 && f.bytes().all(|b| b.is_ascii_hexdigit()));
            *byte = u8::from_str_radix(field.ok_or_else(refused)?, 16).map_err(|_| refused())?;
        }
        if fields.next().is_some() || bytes[0] & 1 == 1 || bytes == [0; 6] {
            return Err(refused());
        }
        Ok(Self(bytes))
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = NoMac;

    fn try_from(given: String) -> Result<Self, NoMac> {
        given.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_come_back_and_groups_are_refused() {
        let mac: Mac = "52:54:00:AB:cd:ef".parse().unwrap();
        assert_eq!(mac.to_string(), "52:54:00:ab:cd:ef");
        assert_eq!(serde_json::from_str::<Mac>(&serde_json::to_string(&mac).unwrap()).unwrap(), mac);
        for wrong in [
            "",
            "52:54:00:ab:cd",
            "52:54:00:ab:cd:ef:01",
            "53:54:00:ab:cd:ef",
            "00:00:00:00:00:00",
            "+2:54:00:ab:cd:ef",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        let random = Mac::random().unwrap();
        assert_eq!(random.bytes()[0] & 3, 2);
        assert_eq!(random.to_string().parse(), Ok(random));
    }
}
