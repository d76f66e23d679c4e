//! A baseline: a CPU as a JSON file, which `vmm cpu-baseline` writes and `--cpu FILE` takes.
//!
//! ```json
//! { "tern_cpu_baseline": 1, "vendor": "AuthenticAMD", "physical_address_bits": 48, "features": ["fpu", "vme", "de"] }
//! ```

use std::path::{Path, PathBuf};

use super::model::CpuModel;
use super::{FeatureSet, UnknownFeature};
use crate::limits::{BASELINE_MAX_BYTES, PHYSICAL_ADDRESS_BITS};

/// The version of the file that this build writes and reads.
pub const BASELINE_VERSION: u32 = 1;

/// Why a file is no baseline.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BaselineError {
    /// It cannot be read.
    #[error("cannot read the CPU baseline {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It cannot be used.
    #[error("the CPU baseline {path} cannot be used")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<Self>,
    },
    /// Longer than any baseline.
    #[error("it is longer than {BASELINE_MAX_BYTES} bytes")]
    TooLong,
    /// No JSON, or not of this form.
    #[error("it is not what `vmm cpu-baseline` writes")]
    Json(#[source] serde_json::Error),
    /// Of another build.
    #[error("it has version {0}, and this build reads version {BASELINE_VERSION}")]
    Version(u32),
    /// A name that no feature has.
    #[error(transparent)]
    Feature(#[from] UnknownFeature),
    /// A vendor as CPUID never gives it.
    #[error("its vendor `{0}` is not of twelve printable characters, as CPUID has it")]
    Vendor(String),
    /// A width that no processor has.
    #[error("its {0} physical address bits are not within {first} to {last}", first = PHYSICAL_ADDRESS_BITS.start(), last = PHYSICAL_ADDRESS_BITS.end())]
    AddressBits(u8),
    /// Two that have nothing in common.
    #[error(
        "one baseline is {first}'s and another {second}'s: guests choose their work-arounds by the vendor, and no VM moves between the two"
    )]
    Vendors {
        /// The first file's vendor.
        first: String,
        /// Another's.
        second: String,
    },
}

#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    tern_cpu_baseline: u32,
    vendor: String,
    physical_address_bits: u8,
    features: Vec<String>,
}

/// What says which version a file has, whatever else is in it.
#[derive(serde::Deserialize)]
struct Head {
    tern_cpu_baseline: u32,
}

impl CpuModel {
    /// Reads a baseline's bytes.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn parse(bytes: &[u8]) -> Result<Self, BaselineError> {
        if bytes.len() > BASELINE_MAX_BYTES {
            return Err(BaselineError::TooLong);
        }
        let head: Head = serde_json::from_slice(bytes).map_err(BaselineError::Json)?;
        if head.tern_cpu_baseline != BASELINE_VERSION {
            return Err(BaselineError::Version(head.tern_cpu_baseline));
        }
        let written: Written = serde_json::from_slice(bytes).map_err(BaselineError::Json)?;
        if written.vendor.len() != 12 || !written.vendor.bytes().all(|b| b.is_ascii_graphic() || b == b' ') {
            return Err(BaselineError::Vendor(written.vendor));
        }
        if !PHYSICAL_ADDRESS_BITS.contains(&written.physical_address_bits) {
            return Err(BaselineError::AddressBits(written.physical_address_bits));
        }
        let features = FeatureSet::named(written.features.iter().map(String::as_str))?;
        Ok(Self { vendor: written.vendor, physical_address_bits: written.physical_address_bits, features })
    }

    /// Reads a baseline file.
    ///
    /// # Errors
    /// If it cannot be read, or what is wrong with it.
    pub fn read(path: &Path) -> Result<Self, BaselineError> {
        use std::io::Read as _;
        let unreadable = |source| BaselineError::Read { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(unreadable)?;
        let mut bytes = Vec::new();
        file.take(BASELINE_MAX_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
        Self::parse(&bytes)
            .map_err(|source| BaselineError::File { path: path.to_owned(), source: Box::new(source) })
    }

    /// The file's text.
    ///
    /// # Errors
    /// None is known: strings and numbers can be written.
    pub fn to_json(&self) -> Result<String, serde_json::Error> {
        let written = Written {
            tern_cpu_baseline: BASELINE_VERSION,
            vendor: self.vendor.clone(),
            physical_address_bits: self.physical_address_bits,
            features: self.features.into(),
        };
        serde_json::to_string_pretty(&written)
    }
}

/// What all of these hosts have.
///
/// # Errors
/// If they are of different vendors.
pub fn denominator(first: CpuModel, others: &[CpuModel]) -> Result<CpuModel, BaselineError> {
    others.iter().try_fold(first, |all, other| {
        if all.vendor != other.vendor {
            return Err(BaselineError::Vendors { first: all.vendor, second: other.vendor.clone() });
        }
        Ok(CpuModel {
            features: all.features.and(&other.features),
            physical_address_bits: all.physical_address_bits.min(other.physical_address_bits),
            ..all
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> CpuModel {
        CpuModel {
            vendor: "GenuineIntel".to_owned(),
            physical_address_bits: 46,
            features: FeatureSet::known("fpu avx2 cpuid_7_1_ebx_3"),
        }
    }

    #[test]
    fn a_file_comes_back() {
        assert_eq!(CpuModel::parse(model().to_json().unwrap().as_bytes()).unwrap(), model());
    }

    #[test]
    fn what_is_wrong_is_said() {
        let good = model().to_json().unwrap();
        let change = |from: &str, to: &str| CpuModel::parse(good.replace(from, to).as_bytes()).unwrap_err();
        assert!(
            matches!(change("avx2", "avx3"), BaselineError::Feature(UnknownFeature(name)) if name == "avx3")
        );
        assert!(matches!(change("baseline\": 1", "baseline\": 2"), BaselineError::Version(2)));
        assert!(matches!(change("GenuineIntel", "Intel"), BaselineError::Vendor(_)));
        assert!(matches!(change("46", "31"), BaselineError::AddressBits(31)));
        assert!(matches!(change("46", "460"), BaselineError::Json(_)));
        assert!(matches!(change("features", "flags"), BaselineError::Json(_)));
        assert!(matches!(change("{", ""), BaselineError::Json(_)));
        // A later version may have other fields: it is the version that is told.
        let later = br#"{"tern_cpu_baseline": 9, "levels": []}"#;
        assert!(matches!(CpuModel::parse(later).unwrap_err(), BaselineError::Version(9)));
        assert!(matches!(CpuModel::parse(&[b' '; BASELINE_MAX_BYTES + 1]), Err(BaselineError::TooLong)));
        assert!(matches!(CpuModel::read(Path::new("/absent")), Err(BaselineError::Read { .. })));
    }

    #[test]
    fn the_denominator_is_what_all_have() {
        let other = CpuModel {
            physical_address_bits: 40,
            features: FeatureSet::known("fpu avx cpuid_7_1_ebx_3"),
            ..model()
        };
        let both = denominator(model(), &[other]).unwrap();
        assert_eq!(
            (both.features.to_string().as_str(), both.physical_address_bits),
            ("fpu, cpuid_7_1_ebx_3", 40)
        );
        let stranger = CpuModel { vendor: "AuthenticAMD".to_owned(), ..model() };
        assert!(matches!(denominator(model(), &[stranger]), Err(BaselineError::Vendors { .. })));
    }
}
