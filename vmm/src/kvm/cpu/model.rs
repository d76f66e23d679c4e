//! The CPU that a guest sees: its features, and the CPUID entries that show it.
//!
//! A feature may need vector state that XCR0 or IA32_XSS enables (Intel SDM volume 1, chapter 13). Leaf 0xd and the features always tell the
//! same story here: state whose feature is hidden is not shown, a feature whose state this host's KVM does not give is hidden, and the sizes are those
//! of what is shown.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};

use super::features::{KVM_FEATURES, is_leaf};
use super::{CpuError, FeatureSet, Level};

/// A CPU, as a guest sees it, a host can give it, or a baseline file asks for it.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CpuModel {
    /// CPUID's twelve characters: `GenuineIntel`, `AuthenticAMD`.
    pub vendor: String,
    /// How wide physical addresses are.
    pub physical_address_bits: u8,
    /// What it can do.
    pub features: FeatureSet,
}

/// KVM's paravirtual features that guests see: the clock in both register layouts, and the word that it is stable across virtual CPUs. The
/// others (paravirtual IPIs, yields, unhalt, asynchronous faults, stolen time) change nothing about what a guest computes, and each one is one more
/// thing that a destination must have: they are hidden.
const PARAVIRTUAL: &str = "kvm_clocksource kvm_clocksource2 kvm_clocksource_stable";

/// Nested virtualisation has state of its own, which is not saved: a guest that used it would not survive a move.
const UNMOVABLE: &str = "vmx svm";

/// What only hosts with the same processor have alike: its parameters stand in leaves or registers that a baseline does not compare.
const HOST_BOUND: &str = "intel_pt sgx sgx_lc arch_lbr avx10 ibs lwp pdcm dtes64 ds_cpl arch_perfmon_ext";

/// A feature that stands for state in the XSAVE area: its components' bits in XCR0, and the features that work on that state.
struct State {
    anchor: &'static str,
    components: u64,
    dependents: &'static str,
}

/// Each after what it depends on.
const STATES: [State; 7] = [
    State {
        anchor: "xsave",
        components: 0b11,
        dependents: "xsaveopt xsavec xgetbv1 xsaves xfd avx mpx pku amx_tile apx_f",
    },
    State { anchor: "mpx", components: 1 << 3 | 1 << 4, dependents: "" },
    State { anchor: "pku", components: 1 << 9, dependents: "" },
    State {
        anchor: "avx",
        components: 1 << 2,
        dependents: "avx2 fma f16c fma4 xop vaes vpclmulqdq avx_vnni avx_ifma avx_vnni_int8 avx_vnni_int16 avx_ne_convert sha512 sm3 sm4 avx512f",
    },
    State {
        anchor: "avx512f",
        components: 1 << 5 | 1 << 6 | 1 << 7,
        dependents: "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni avx512_bitalg \
                     avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect avx512_fp16 avx512_bf16 avx10",
    },
    State {
        anchor: "amx_tile",
        components: 1 << 17 | 1 << 18,
        dependents: "amx_bf16 amx_int8 amx_fp16 amx_complex",
    },
    State { anchor: "apx_f", components: 1 << 19, dependents: "" },
];

/// Components that IA32_XSS enables, with the features of which any one brings them.
const SUPERVISOR_STATES: [(u64, &str); 4] =
    [(1 << 8, "intel_pt"), (1 << 10, "enqcmd"), (1 << 11 | 1 << 12, "shstk ibt"), (1 << 15, "arch_lbr")];

/// Leaves that describe one feature, by function.
const OWNED_LEAVES: [(u32, &str); 12] = [
    (0xd, "xsave"),
    (0x12, "sgx"),
    (0x14, "intel_pt"),
    (0x1c, "arch_lbr"),
    (0x1d, "amx_tile"),
    (0x1e, "amx_tile"),
    (0x24, "avx10"),
    (0x8000_000a, "svm"),
    (0x8000_001b, "ibs"),
    (0x8000_001c, "lwp"),
    (0x8000_001d, "topoext"),
    (0x8000_001e, "topoext"),
];

/// The legacy area and the header of XSAVE's: what there is with no further component.
const XSAVE_LEAST_BYTES: u32 = 576;

const HYPERVISOR: u32 = 1 << 31;
/// Mirrors CR4: KVM's to set.
const OSXSAVE: u32 = 1 << 27;
const HYPER_THREADING: u32 = 1 << 28;
/// The bits of leaf 0x80000001's EDX in which AMD repeats leaf 1's.
const REPEATED: u32 = 0x0183_f3ff;

/// How much of the host shows beside features.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    /// Every leaf that KVM gives.
    Whole,
    /// Only leaves that hosts of one vendor share.
    Portable,
}

/// What this host's KVM can give a guest.
#[derive(Clone, Debug)]
pub(crate) struct Host {
    /// What KVM supports.
    entries: Vec<kvm_cpuid_entry2>,
    /// All that a guest can be given, whether we would or not.
    pub(crate) gives: CpuModel,
}

impl Host {
    /// `supported` is what KVM says that it supports; `shown` what a virtual CPU shows that was given all of that. The two differ on a KVM
    /// that lets guests run natively in user mode: it cannot hide some of the processor's features, shows them whatever it is
    /// told, and does not list them as supported.
    pub(crate) fn new(supported: &[kvm_cpuid_entry2], shown: &[kvm_cpuid_entry2]) -> Self {
        let mut gives = CpuModel::of(supported);
        gives.features = gives.features.or(&FeatureSet::of(shown));
        let mut entries = supported.to_vec();
        let new = shown.iter().filter(|e| !supported.iter().any(|s| is_leaf(s, e.function, e.index)));
        entries.extend(new);
        for entry in &mut entries {
            // Where the two differ, features are masked later: here all are present.
            let other = shown.iter().find(|e| is_leaf(e, entry.function, entry.index));
            if let Some(other) =
                other.filter(|_| matches!((entry.function, entry.index), (1 | 7, _) | (0xd, 1)))
            {
                entry.ecx |= other.ecx;
                entry.edx |= other.edx;
                match entry.function {
                    7 => (entry.eax, entry.ebx) = (entry.eax | other.eax, entry.ebx | other.ebx),
                    0xd => entry.eax |= other.eax,
                    _ => {}
                }
            }
        }
        gives.features = settle(gives.features, components(&entries));
        Self { entries, gives }
    }

    /// The host itself, as a guest sees it that is given all that can move.
    pub(crate) fn own(&self) -> CpuModel {
        let kvm = FeatureSet::of(&[all_ones(KVM_FEATURES)]).without(&FeatureSet::known(PARAVIRTUAL));
        let features = self.gives.features.without(&FeatureSet::known(UNMOVABLE)).without(&kvm);
        CpuModel { features, ..self.gives.clone() }
    }

    /// The most that a baseline can have of this host.
    pub(crate) fn portable(&self) -> CpuModel {
        let own = self.own();
        CpuModel { features: own.features.without(&FeatureSet::known(HOST_BOUND)), ..own }
    }

    /// A guest of `level`.
    pub(crate) fn at_level(&self, level: Level) -> Result<CpuModel, CpuError> {
        let own = self.own();
        let missing = level.required().without(&own.features);
        if !missing.is_empty() {
            return Err(CpuError::Level { level, missing });
        }
        Ok(CpuModel { features: own.features.and(&level.shown()), ..own })
    }

    /// A guest as `baseline` has it.
    pub(crate) fn with_baseline(&self, baseline: CpuModel) -> Result<CpuModel, CpuError> {
        super::check::check(&baseline, &self.portable())?;
        let features = settle(baseline.features, components(&self.entries));
        if features != baseline.features {
            let hidden = baseline.features.without(&features);
            tracing::warn!(%hidden, "the baseline has these features without what they build on: they are not shown");
        }
        Ok(CpuModel { features, ..baseline })
    }

    /// The entries that show `model` to virtual CPU `index` of `cpus`.
    pub(crate) fn entries(&self, model: &CpuModel, shape: Shape, index: u8, cpus: u8) -> CpuId {
        let xsave = Xsave::new(&self.entries, &model.features, shape);
        let leaf_one = self.entries.iter().find(|entry| entry.function == 1);
        let repeated = leaf_one.map_or(0, |entry| {
            let mut entry = *entry;
            model.features.mask(&mut entry);
            entry.edx & REPEATED
        });
        let mut kept: Vec<_> =
            self.entries.iter().copied().filter(|e| is_kept(e, &model.features, shape)).collect();
        kept.retain_mut(|entry| {
            model.features.mask(entry);
            match entry.function {
                0xd => return xsave.shape(entry),
                0x8000_0001 => entry.edx &= !REPEATED | repeated,
                0x8000_0008 => set_widths(entry, model, shape),
                _ => {}
            }
            if shape == Shape::Portable {
                hide_the_rest(entry);
            }
            set_own(entry, index, cpus);
            true
        });
        drop_empty(&mut kept, shape);
        set_last_leaves(&mut kept, shape);
        kept.truncate(KVM_MAX_CPUID_ENTRIES);
        CpuId::from_entries(&kept).expect("within KVM's own bound")
    }
}

impl CpuModel {
    /// What CPUID entries show.
    pub(crate) fn of(entries: &[kvm_cpuid_entry2]) -> Self {
        let leaf = |leaf| entries.iter().find(|entry| is_leaf(entry, leaf, 0)).copied().unwrap_or_default();
        let name = leaf(0);
        let vendor = [name.ebx, name.edx, name.ecx].map(u32::to_le_bytes).concat();
        let [width, ..] = leaf(0x8000_0008).eax.to_le_bytes();
        Self {
            vendor: String::from_utf8_lossy(&vendor).into_owned(),
            physical_address_bits: width,
            features: FeatureSet::of(entries),
        }
    }
}

fn all_ones(function: u32) -> kvm_cpuid_entry2 {
    let (eax, ebx, ecx, edx) = (u32::MAX, u32::MAX, u32::MAX, u32::MAX);
    kvm_cpuid_entry2 { function, eax, ebx, ecx, edx, ..Default::default() }
}

/// The components that XCR0 may enable.
fn components(entries: &[kvm_cpuid_entry2]) -> u64 {
    let found = entries.iter().find(|entry| is_leaf(entry, 0xd, 0));
    found.map_or(0, |entry| u64::from(entry.eax) | u64::from(entry.edx) << 32)
}

/// `features` without those whose state is not among `components`, and without those that build on a feature that is not there.
pub(crate) fn settle(mut features: FeatureSet, components: u64) -> FeatureSet {
    for state in &STATES {
        let anchor = FeatureSet::known(state.anchor);
        if components & state.components != state.components {
            features = features.without(&anchor);
        }
        if !features.has(&anchor) {
            features = features.without(&FeatureSet::known(state.dependents));
        }
    }
    features
}

/// Leaf 0xd for a set of features.
struct Xsave {
    user: u64,
    supervisor: u64,
    bytes: u32,
}

impl Xsave {
    fn new(entries: &[kvm_cpuid_entry2], features: &FeatureSet, shape: Shape) -> Self {
        let any = |words: &str| !features.and(&FeatureSet::known(words)).is_empty();
        let states = || STATES.iter().map(|state| (state.components, state.anchor));
        let supervisor_given = entries.iter().find(|entry| is_leaf(entry, 0xd, 1));
        let supervisor_given = supervisor_given.map_or(0, |e| u64::from(e.ecx) | u64::from(e.edx) << 32);
        let shown = |given: u64, known: &mut dyn Iterator<Item = (u64, &'static str)>| {
            let (mut ours, mut shown) = (0, 0);
            for (components, owner) in known {
                ours |= components;
                shown |= if any(owner) { components } else { 0 };
            }
            let others = if shape == Shape::Whole { given & !ours } else { 0 };
            given & shown | others
        };
        let user = shown(components(entries), &mut states());
        let supervisor = shown(supervisor_given, &mut SUPERVISOR_STATES.into_iter());
        let bytes = entries.iter().filter(|e| e.function == 0xd && (2..64).contains(&e.index));
        let bytes = bytes.filter(|e| user >> e.index & 1 == 1).map(|e| e.ebx.saturating_add(e.eax));
        Self { user, supervisor, bytes: bytes.fold(XSAVE_LEAST_BYTES, u32::max) }
    }

    /// Writes a subleaf; false if it is not shown.
    fn shape(&self, entry: &mut kvm_cpuid_entry2) -> bool {
        let halves = |whole: u64| {
            let [low, high] = [whole, whole >> 32].map(|half| half & u64::from(u32::MAX));
            [low, high].map(|half| u32::try_from(half).expect("masked to 32 bits"))
        };
        match entry.index {
            0 => {
                [entry.eax, entry.edx] = halves(self.user);
                // EBX is the size for what XCR0 enables; KVM keeps it so when that changes.
                (entry.ebx, entry.ecx) = (XSAVE_LEAST_BYTES, self.bytes);
                true
            }
            1 => {
                [entry.ecx, entry.edx] = halves(self.supervisor);
                // As above, in the compacted format, where there is one.
                entry.ebx = if entry.eax & (1 << 1 | 1 << 3) == 0 { 0 } else { XSAVE_LEAST_BYTES };
                true
            }
            component @ 2..64 => (self.user | self.supervisor) >> component & 1 == 1,
            _ => false,
        }
    }
}

fn is_kept(entry: &kvm_cpuid_entry2, features: &FeatureSet, shape: Shape) -> bool {
    let owner = OWNED_LEAVES.iter().find(|(leaf, _)| *leaf == entry.function);
    if owner.is_some_and(|(_, feature)| !features.has(&FeatureSet::known(feature))) {
        return false;
    }
    match shape {
        Shape::Whole => true,
        Shape::Portable => matches!(
            entry.function,
            0 | 1 | 2 | 4 | 6 | 7 | 0xb | 0xd | 0x1d | 0x1e | 0x4000_0000..=0x4fff_ffff | 0x8000_0000..=0x8000_0008 | 0x8000_001d | 0x8000_001e | 0x8000_0021
        ),
    }
}

/// Clears what is neither a feature nor shared by hosts.
fn hide_the_rest(entry: &mut kvm_cpuid_entry2) {
    match entry.function {
        6 => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
        // OSPKE, and the number of MPX's address bits.
        7 if entry.index == 0 => entry.ecx &= !(1 << 4 | 0x1f << 17),
        7 if entry.index == 2 => (entry.eax, entry.ebx, entry.ecx) = (0, 0, 0),
        7 if entry.index > 2 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x8000_0007 => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, entry.edx & 1 << 8),
        0x8000_0021 => (entry.ebx, entry.edx) = (0, 0),
        _ => {}
    }
}

/// Address widths. Without 57-bit linear addresses there are 48 of them.
fn set_widths(entry: &mut kvm_cpuid_entry2, model: &CpuModel, shape: Shape) {
    let [_, linear, guest_physical, _] = entry.eax.to_le_bytes();
    let five_levels = model.features.has(&FeatureSet::known("la57"));
    let linear = if five_levels { linear } else { linear.min(48) };
    let guest_physical = if shape == Shape::Whole { guest_physical } else { 0 };
    entry.eax = u32::from_le_bytes([model.physical_address_bits, linear, guest_physical, 0]);
    if shape == Shape::Portable {
        entry.edx = 0;
    }
}

/// What differs from CPU to CPU, and what KVM leaves to the monitor.
fn set_own(entry: &mut kvm_cpuid_entry2, index: u8, cpus: u8) {
    let (id, count) = (u32::from(index), u32::from(cpus));
    match entry.function {
        1 => {
            entry.ebx = entry.ebx & 0x0000_ffff | count << 16 | id << 24;
            entry.ecx = entry.ecx & !OSXSAVE | HYPERVISOR;
            entry.edx = entry.edx & !HYPER_THREADING | if cpus > 1 { HYPER_THREADING } else { 0 };
        }
        // Caches are each CPU's own, and each CPU is a core of one package.
        4 => entry.eax = entry.eax & 0x0000_3fff | (count - 1).min(63) << 26,
        0xb | 0x1f => {
            let bits = u32::from(cpus).next_power_of_two().trailing_zeros();
            (entry.eax, entry.ebx, entry.ecx) = match entry.index {
                0 => (0, 1, 1 << 8),
                1 => (bits, count, 2 << 8 | 1),
                other => (0, 0, other),
            };
            entry.edx = id;
        }
        0x8000_0008 => entry.ecx = entry.ecx & !0xff | (count - 1),
        0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
        _ => {}
    }
}

/// Drops subleaves that show nothing. A KVM that cannot hide features fills in the ones that are there.
fn drop_empty(kept: &mut Vec<kvm_cpuid_entry2>, shape: Shape) {
    let empty = |e: &kvm_cpuid_entry2| {
        (e.ebx, e.ecx, e.edx) == (0, 0, 0) && (e.eax == 0 || e.function == 7 && e.index == 0)
    };
    let last = kept.iter().filter(|e| e.function == 7 && !empty(e)).map(|e| e.index).max();
    kept.retain_mut(|entry| match entry.function {
        7 if shape == Shape::Portable || last.is_none() => match last {
            Some(last) if entry.index == 0 => {
                entry.eax = last;
                true
            }
            Some(last) => entry.index <= last,
            None => false,
        },
        6 | 0x8000_0021 => shape == Shape::Whole || !empty(entry),
        _ => true,
    });
}

/// The highest leaves: those that are there.
fn set_last_leaves(kept: &mut [kvm_cpuid_entry2], shape: Shape) {
    if shape == Shape::Whole {
        return;
    }
    let last = |from: u32, to: u32| kept.iter().map(|e| e.function).filter(|f| (from..to).contains(f)).max();
    let (basic, extended) = (last(0, 0x4000_0000), last(0x8000_0000, 0xc000_0000));
    for entry in kept {
        match (entry.function, basic, extended) {
            (0, Some(last), _) | (0x8000_0000, _, Some(last)) => entry.eax = entry.eax.min(last),
            _ => {}
        }
    }
}
