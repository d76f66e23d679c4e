//! The table of CPU features: Linux' names and the CPUID bits that stand for them, and sets of them.
//!
//! Bits as in Intel's SDM volume 2 (CPUID), AMD's APM volume 3, appendix E, and for KVM's own leaf the kernel's
//! Documentation/virt/kvm/x86/cpuid.rst; names as /proc/cpuinfo has them, or the kernel's cpufeatures.h where /proc/cpuinfo is silent. A bit of
//! one of these registers that has no name yet is called after its place (`cpuid_7_1_edx_31`), so that no feature escapes a
//! comparison of two hosts because it is newer than this table.

use std::collections::HashMap;
use std::fmt;
use std::sync::LazyLock;

use kvm_bindings::{KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// KVM's leaf of paravirtual features.
pub(crate) const KVM_FEATURES: u32 = 0x4000_0001;

/// One of the four registers that CPUID answers in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Output {
    Eax,
    Ebx,
    Ecx,
    Edx,
}

impl Output {
    fn of(self, entry: &kvm_cpuid_entry2) -> u32 {
        match self {
            Self::Eax => entry.eax,
            Self::Ebx => entry.ebx,
            Self::Ecx => entry.ecx,
            Self::Edx => entry.edx,
        }
    }

    fn of_mut(self, entry: &mut kvm_cpuid_entry2) -> &mut u32 {
        match self {
            Self::Eax => &mut entry.eax,
            Self::Ebx => &mut entry.ebx,
            Self::Ecx => &mut entry.ecx,
            Self::Edx => &mut entry.edx,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Eax => "eax",
            Self::Ebx => "ebx",
            Self::Ecx => "ecx",
            Self::Edx => "edx",
        }
    }
}

/// A register whose bits are features.
struct Register {
    leaf: u32,
    index: u32,
    output: Output,
    /// One word a bit, bit 0 first. `.`: no name yet. `-`: no feature (it mirrors a control register or another leaf, is the
    /// monitor's own, or belongs to a number). What comes after the last word has no name.
    words: &'static str,
}

const fn register(leaf: u32, index: u32, output: Output, words: &'static str) -> Register {
    Register { leaf, index, output, words }
}

const REGISTER_COUNT: usize = 19;

const REGISTERS: [Register; REGISTER_COUNT] = [
    // 28 (logical CPUs) is the monitor's.
    register(
        1,
        0,
        Output::Edx,
        "fpu vme de pse tsc msr pae mce cx8 apic . sep mtrr pge mca cmov pat pse36 pn clflush . dts acpi mmx fxsr sse sse2 ss - tm \
         ia64 pbe",
    ),
    // 27 mirrors CR4.OSXSAVE; 31 says that there is a hypervisor.
    register(
        1,
        0,
        Output::Ecx,
        "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm . pcid dca sse4_1 sse4_2 x2apic movbe \
         popcnt tsc_deadline_timer aes xsave - avx f16c rdrand -",
    ),
    register(
        6,
        0,
        Output::Eax,
        "dtherm ida arat . pln . pts hwp hwp_notify hwp_act_window hwp_epp hwp_pkg_req",
    ),
    register(
        7,
        0,
        Output::Ebx,
        "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f avx512dq \
         rdseed adx smap avx512ifma . clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl",
    ),
    // 4 mirrors CR4.PKE; 17 to 21 are a number (MAWAU).
    register(
        7,
        0,
        Output::Ecx,
        "prefetchwt1 avx512vbmi umip pku - waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme \
         avx512_vpopcntdq . la57 - - - - - rdpid . bus_lock_detect cldemote . movdiri movdir64b enqcmd sgx_lc pks",
    ),
    register(
        7,
        0,
        Output::Edx,
        ". . avx512_4vnniw avx512_4fmaps fsrm uintr . . avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort . tsx_force_abort \
         serialize hybrid_cpu tsxldtrk . pconfig arch_lbr ibt . amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl intel_stibp flush_l1d \
         arch_capabilities core_capabilities spec_ctrl_ssbd",
    ),
    register(
        7,
        1,
        Output::Eax,
        "sha512 sm3 sm4 . avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext . fzrm fsrs fsrc . . . . fred lkgs wrmsrns . amx_fp16 \
         hreset avx_ifma . . lam",
    ),
    register(7, 1, Output::Ebx, ""),
    register(7, 1, Output::Ecx, ". . . . . msr_imm"),
    register(
        7,
        1,
        Output::Edx,
        ". . . . avx_vnni_int8 avx_ne_convert . . amx_complex . avx_vnni_int16 . . . prefetchiti . . . . avx10 . apx_f",
    ),
    register(7, 2, Output::Edx, "intel_psfd ipred_ctrl rrsba_ctrl ddpd_u bhi_ctrl mcdt_no"),
    register(0xd, 1, Output::Eax, "xsaveopt xsavec xgetbv1 xsaves xfd"),
    register(
        0x8000_0001,
        0,
        Output::Ecx,
        "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt . lwp fma4 tce . \
         nodeid_msr . tbm topoext perfctr_core perfctr_nb . bpext ptsc perfctr_llc mwaitx",
    ),
    // The dashes repeat leaf 1 on AMD.
    register(
        0x8000_0001,
        0,
        Output::Edx,
        "- - - - - - - - - - . syscall - - - - - - . mp nx . mmxext - - fxsr_opt pdpe1gb rdtscp . lm 3dnowext 3dnow",
    ),
    // The others are the host's power management.
    register(
        0x8000_0007,
        0,
        Output::Edx,
        "- - - - - - - - nonstop_tsc - - - - - - - - - - - - - - - - - - - - - - -",
    ),
    register(
        0x8000_0008,
        0,
        Output::Ebx,
        "clzero irperf xsaveerptr . rdpru . . . mba wbnoinvd . . amd_ibpb . amd_ibrs amd_stibp . amd_stibp_always_on . \
         amd_ibrs_same_mode . . . amd_ppin amd_ssbd virt_ssbd amd_ssb_no cppc amd_psfd btc_no ibpb_ret brs",
    ),
    register(
        0x8000_0021,
        0,
        Output::Eax,
        "no_nested_data_bp fsgs_base_ns lfence_rdtsc . . verw_clear null_sel_clr_base . autoibrs no_smm_ctl_msr . . . . . . . . . . . . . . \
         . . . sbpb ibpb_brtype srso_no srso_user_kernel_no srso_bp_spec_reduce",
    ),
    register(0x8000_0021, 0, Output::Ecx, ". tsa_sq_no tsa_l1_no"),
    register(
        KVM_FEATURES,
        0,
        Output::Eax,
        "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt . \
         kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int \
         kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control . . . . . . kvm_clocksource_stable",
    ),
];

/// What the words come to.
struct Table {
    names: [[String; 32]; REGISTER_COUNT],
    masks: [u32; REGISTER_COUNT],
    places: HashMap<String, (usize, u32)>,
}

static TABLE: LazyLock<Table> = LazyLock::new(|| {
    let mut table = Table {
        names: std::array::from_fn(|_| std::array::from_fn(|_| String::new())),
        masks: [u32::MAX; REGISTER_COUNT],
        places: HashMap::new(),
    };
    for (at, register) in REGISTERS.iter().enumerate() {
        let mut words = register.words.split_whitespace();
        for (bit, name) in (0u32..).zip(&mut table.names[at]) {
            *name = match words.next() {
                Some("-") => {
                    table.masks[at] &= !(1 << bit);
                    continue;
                }
                Some(".") | None => {
                    let (leaf, index, output) = (register.leaf, register.index, register.output.name());
                    format!("cpuid_{leaf:x}_{index:x}_{output}_{bit}")
                }
                Some(word) => word.to_owned(),
            };
            table.places.insert(name.clone(), (at, bit));
        }
    }
    table
});

/// Whether `entry` is the one for `leaf` and `index`. The index means something only where the flag says so; elsewhere KVM leaves
/// anything in it.
pub(crate) fn is_leaf(entry: &kvm_cpuid_entry2, leaf: u32, index: u32) -> bool {
    let indexed = entry.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0;
    entry.function == leaf && (if indexed { entry.index } else { 0 }) == index
}

/// A name that no feature has.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this build knows no CPU feature `{0}`: features are named as in /proc/cpuinfo; if a newer build wrote it, upgrade this one"
)]
pub struct UnknownFeature(pub String);

/// A set of CPU features.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(try_from = "Vec<String>", into = "Vec<String>")]
pub struct FeatureSet([u32; REGISTER_COUNT]);

impl FeatureSet {
    /// The features that CPUID entries show.
    #[must_use]
    pub fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        let mut set = Self::default();
        for (at, register) in REGISTERS.iter().enumerate() {
            let found = entries.iter().find(|entry| is_leaf(entry, register.leaf, register.index));
            set.0[at] = found.map_or(0, |entry| register.output.of(entry)) & TABLE.masks[at];
        }
        set
    }

    /// The features with these names, separated by white space; for this crate's own lists.
    pub(crate) fn known(words: &str) -> Self {
        Self::named(words.split_whitespace())
            .expect("the lists in this crate are made of names in this table")
    }

    /// The features with these names.
    ///
    /// # Errors
    /// The first name that no feature has.
    pub fn named<'a>(names: impl IntoIterator<Item = &'a str>) -> Result<Self, UnknownFeature> {
        let mut set = Self::default();
        for name in names {
            let (at, bit) = TABLE.places.get(name).ok_or_else(|| UnknownFeature(name.to_owned()))?;
            set.0[*at] |= 1 << bit;
        }
        Ok(set)
    }

    /// Clears, in an entry, the bits of features that are not in this set.
    pub(crate) fn mask(&self, entry: &mut kvm_cpuid_entry2) {
        for (at, register) in REGISTERS.iter().enumerate() {
            if is_leaf(entry, register.leaf, register.index) {
                *register.output.of_mut(entry) &= self.0[at] | !TABLE.masks[at];
            }
        }
    }

    /// The names, in the table's order.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let bits = *self;
        TABLE.names.iter().zip(bits.0).flat_map(|(names, word)| {
            let present = (0u32..).zip(names).filter(move |(bit, _)| word >> bit & 1 == 1);
            present.map(|(_, name)| name.as_str())
        })
    }

    /// Whether there is none in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Whether all of `other` is in it.
    #[must_use]
    pub fn has(&self, other: &Self) -> bool {
        other.without(self).is_empty()
    }

    /// Those in either.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at] | other.0[at]))
    }

    /// Those in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at] & other.0[at]))
    }

    /// Those that are not in `other`.
    #[must_use]
    pub fn without(&self, other: &Self) -> Self {
        Self(std::array::from_fn(|at| self.0[at] & !other.0[at]))
    }
}

impl fmt::Display for FeatureSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut names = self.names();
        if let Some(first) = names.next() {
            f.write_str(first)?;
        }
        names.try_for_each(|name| write!(f, ", {name}"))
    }
}

impl From<FeatureSet> for Vec<String> {
    fn from(set: FeatureSet) -> Self {
        set.names().map(str::to_owned).collect()
    }
}

impl TryFrom<Vec<String>> for FeatureSet {
    type Error = UnknownFeature;

    fn try_from(names: Vec<String>) -> Result<Self, UnknownFeature> {
        Self::named(names.iter().map(String::as_str))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_table_is_sound() {
        for register in &REGISTERS {
            assert!(register.words.split_whitespace().count() <= 32, "{:#x}", register.leaf);
        }
        let bits: u32 = TABLE.masks.iter().map(|mask| mask.count_ones()).sum();
        assert_eq!(TABLE.places.len(), bits as usize, "every name stands for one bit");
    }

    /// A few bits as the manuals have them, one of each register: a word too many or too few would shift them.
    #[test]
    fn names_stand_for_the_bits_of_the_manuals() {
        for (name, leaf, index, output, bit) in [
            ("pbe", 1, 0, Output::Edx, 31),
            ("sse2", 1, 0, Output::Edx, 26),
            ("rdrand", 1, 0, Output::Ecx, 30),
            ("cx16", 1, 0, Output::Ecx, 13),
            ("popcnt", 1, 0, Output::Ecx, 23),
            ("tsc_deadline_timer", 1, 0, Output::Ecx, 24),
            ("arat", 6, 0, Output::Eax, 2),
            ("avx2", 7, 0, Output::Ebx, 5),
            ("bmi2", 7, 0, Output::Ebx, 8),
            ("smap", 7, 0, Output::Ebx, 20),
            ("avx512vl", 7, 0, Output::Ebx, 31),
            ("la57", 7, 0, Output::Ecx, 16),
            ("rdpid", 7, 0, Output::Ecx, 22),
            ("pks", 7, 0, Output::Ecx, 31),
            ("md_clear", 7, 0, Output::Edx, 10),
            ("ibt", 7, 0, Output::Edx, 20),
            ("spec_ctrl_ssbd", 7, 0, Output::Edx, 31),
            ("avx512_bf16", 7, 1, Output::Eax, 5),
            ("lam", 7, 1, Output::Eax, 26),
            ("apx_f", 7, 1, Output::Edx, 21),
            ("mcdt_no", 7, 2, Output::Edx, 5),
            ("xsaves", 0xd, 1, Output::Eax, 3),
            ("abm", 0x8000_0001, 0, Output::Ecx, 5),
            ("topoext", 0x8000_0001, 0, Output::Ecx, 22),
            ("mwaitx", 0x8000_0001, 0, Output::Ecx, 29),
            ("syscall", 0x8000_0001, 0, Output::Edx, 11),
            ("nx", 0x8000_0001, 0, Output::Edx, 20),
            ("lm", 0x8000_0001, 0, Output::Edx, 29),
            ("nonstop_tsc", 0x8000_0007, 0, Output::Edx, 8),
            ("amd_ibpb", 0x8000_0008, 0, Output::Ebx, 12),
            ("amd_ssbd", 0x8000_0008, 0, Output::Ebx, 24),
            ("btc_no", 0x8000_0008, 0, Output::Ebx, 29),
            ("autoibrs", 0x8000_0021, 0, Output::Eax, 8),
            ("srso_no", 0x8000_0021, 0, Output::Eax, 29),
            ("kvm_clocksource2", KVM_FEATURES, 0, Output::Eax, 3),
            ("kvm_pv_send_ipi", KVM_FEATURES, 0, Output::Eax, 11),
            ("kvm_clocksource_stable", KVM_FEATURES, 0, Output::Eax, 24),
            ("cpuid_7_1_edx_31", 7, 1, Output::Edx, 31),
        ] {
            let mut entry = kvm_cpuid_entry2 { function: leaf, index, flags: 1, ..Default::default() };
            *output.of_mut(&mut entry) = 1 << bit;
            assert_eq!(FeatureSet::of(&[entry]).to_string(), name);
        }
    }

    #[test]
    fn what_is_no_feature_is_not_seen_and_an_unknown_name_is_said() {
        let mut one = kvm_cpuid_entry2 { function: 1, ..Default::default() };
        // OSXSAVE, hypervisor; logical CPUs.
        (one.ecx, one.edx) = (1 << 27 | 1 << 31, 1 << 28);
        assert!(FeatureSet::of(&[one]).is_empty());
        FeatureSet::default().mask(&mut one);
        assert_eq!((one.ecx, one.edx), (1 << 27 | 1 << 31, 1 << 28));
        assert_eq!(FeatureSet::named(["avx", "evx"]), Err(UnknownFeature("evx".to_owned())));
        assert!(FeatureSet::named(["-"]).is_err() && FeatureSet::named([""]).is_err());
    }

    proptest! {
        #[test]
        fn names_come_back(bits: [u32; REGISTER_COUNT]) {
            let set = FeatureSet(std::array::from_fn(|at| bits[at] & TABLE.masks[at]));
            prop_assert_eq!(FeatureSet::try_from(Vec::from(set)), Ok(set));
            let json = serde_json::to_string(&set).unwrap();
            prop_assert_eq!(serde_json::from_str::<FeatureSet>(&json).unwrap(), set);
        }
    }
}
