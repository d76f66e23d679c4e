//! Whether a host can run a guest.

use super::CpuError;
use super::model::CpuModel;

/// Checks that a host which gives `host` can run a guest that sees `guest`.
///
/// Features may be more here and physical addresses wider. The vendor must be the same: guests choose work-arounds and code paths by it when they
/// start, and KVM's model-specific registers differ.
/// # Errors
/// What is missing, by name.
pub(crate) fn check(guest: &CpuModel, host: &CpuModel) -> Result<(), CpuError> {
    if guest.vendor != host.vendor {
        return Err(CpuError::Vendor { guest: guest.vendor.clone(), host: host.vendor.clone() });
    }
    let missing = guest.features.without(&host.features);
    if !missing.is_empty() {
        return Err(CpuError::Features { missing });
    }
    if guest.physical_address_bits > host.physical_address_bits {
        let (guest, host) = (guest.physical_address_bits, host.physical_address_bits);
        return Err(CpuError::AddressBits { guest, host });
    }
    Ok(())
}
