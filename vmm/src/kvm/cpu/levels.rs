//! The x86-64 levels (x86-64 psABI, table 3.1 "Micro-Architecture Levels").

use std::fmt;

use super::features::FeatureSet;

/// A level of the x86-64 psABI.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Level {
    /// x86-64-v2: up to SSE4.2; every server processor since about 2009.
    V2,
    /// x86-64-v3: up to AVX2; since about 2013 (Intel) and 2015 (AMD).
    V3,
    /// x86-64-v4: AVX-512.
    V4,
}

/// What the levels ask for, each beyond the one before. `xsave` stands for the psABI's OSXSAVE, which is the guest's to turn on; `abm` is
/// its LZCNT, `pni` its SSE3.
const V1: &str = "cmov cx8 fpu fxsr mmx syscall sse sse2 lm";
const V2: &str = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3";
const V3: &str = "avx avx2 bmi1 bmi2 f16c fma abm movbe xsave";
const V4: &str = "avx512f avx512bw avx512cd avx512dq avx512vl";

/// What every level shows where the host has it: what kernels for any x86-64 processor expect of one, and KVM's own. The invariant TSC is
/// not among it: the next host's may run at another rate.
const SYSTEM: &str = "vme de pse tsc msr pae mce apic sep mtrr pge mca pat pse36 clflush nx x2apic tsc_deadline_timer \
                      kvm_clocksource kvm_clocksource2 kvm_clocksource_stable";

impl Level {
    /// What a host must have to give it.
    #[must_use]
    pub fn required(self) -> FeatureSet {
        let levels: &[&str] = match self {
            Self::V2 => &[V1, V2],
            Self::V3 => &[V1, V2, V3],
            Self::V4 => &[V1, V2, V3, V4],
        };
        levels.iter().fold(FeatureSet::default(), |set, words| set.or(&FeatureSet::known(words)))
    }

    /// The most that a guest of this level sees.
    #[must_use]
    pub fn shown(self) -> FeatureSet {
        self.required().or(&FeatureSet::known(SYSTEM))
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V2 => "v2",
            Self::V3 => "v3",
            Self::V4 => "v4",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_level_holds_the_one_before() {
        assert!(Level::V3.shown().has(&Level::V2.shown()) && Level::V4.shown().has(&Level::V3.shown()));
        let beyond = Level::V4.required().without(&Level::V3.required()).to_string();
        assert_eq!(beyond, "avx512f, avx512dq, avx512cd, avx512bw, avx512vl");
        assert!(!Level::V2.shown().has(&FeatureSet::known("xsave")));
    }
}
