//! The state bundle: what the protocol carries as the VM's state.
//!
//! ```text
//! bundle := version (1 byte, 1) , heartbeat (8 bytes, little-endian: when the guest's last came, nanoseconds since 1970; 0: none)
//!           , the machine's own saved state
//! ```

use super::MigrateError;

const VERSION: u8 = 1;
const HEADER: usize = 9;

/// Puts a bundle together.
#[must_use]
pub(super) fn pack(last_heartbeat_unix_ns: u64, state: &[u8]) -> Vec<u8> {
    let mut bundle = Vec::with_capacity(HEADER + state.len());
    bundle.push(VERSION);
    bundle.extend_from_slice(&last_heartbeat_unix_ns.to_le_bytes());
    bundle.extend_from_slice(state);
    bundle
}

/// The source's last heartbeat, and the machine's state.
///
/// # Errors
/// If it is cut short or of another version.
pub(super) fn unpack(bundle: &[u8]) -> Result<(u64, &[u8]), MigrateError> {
    let bad = |why: String| MigrateError::Frame { channel: "names", why: why.into() };
    let (header, state) = bundle
        .split_first_chunk::<HEADER>()
        .ok_or_else(|| bad(format!("a state bundle of {} bytes is cut short", bundle.len())))?;
    let [version, heartbeat @ ..] = header;
    if *version != VERSION {
        return Err(bad(format!("a state bundle of version {version}; this build reads {VERSION}")));
    }
    Ok((u64::from_le_bytes(*heartbeat), state))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_comes_back_and_damage_is_said() {
        let bundle = pack(77, b"state");
        assert_eq!(unpack(&bundle).unwrap(), (77, b"state".as_slice()));
        assert!(unpack(&bundle[..8]).unwrap_err().to_string().contains("cut short"));
        let mut other = bundle;
        other[0] = 9;
        assert!(unpack(&other).unwrap_err().to_string().contains("version 9"));
    }
}
