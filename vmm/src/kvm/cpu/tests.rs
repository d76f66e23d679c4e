//! Guests' CPUs on made-up hosts.

use proptest::prelude::*;

use super::check::check;
use super::features::is_leaf;
use super::*;

/// The sizes and offsets of XSAVE components as Intel's processors have them: (index, bytes, offset).
const COMPONENTS: [(u32, u32, u32); 8] = [
    (2, 256, 576),
    (3, 64, 960),
    (4, 64, 1024),
    (5, 64, 1088),
    (6, 512, 1152),
    (7, 1024, 1664),
    (9, 8, 2688),
    (11, 16, 0),
];

fn entry(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    let flags = u32::from(matches!(function, 4 | 7 | 0xb | 0xd | 0x14 | 0x8000_001d));
    kvm_cpuid_entry2 { function, index, flags, eax, ebx, ecx, edx, ..Default::default() }
}

/// A host with everything but what is in `lacks`, and `bits` wide physical addresses.
fn host(lacks: &FeatureSet, bits: u8) -> Host {
    let all = [u32::MAX; 4];
    let name = [0x24, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];
    let mut entries = vec![entry(0, 0, name), entry(2, 0, all), entry(4, 0, all), entry(6, 0, all)];
    entries.extend([entry(1, 0, all), entry(0x14, 0, all), entry(0xb, 0, all), entry(0xb, 1, all)]);
    entries.extend([entry(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]), entry(7, 1, all), entry(7, 2, all)]);
    entries.push(entry(0xd, 0, [0x2ff, 576, 2696, 0]));
    entries.push(entry(0xd, 1, [0xf, 576, 0x1800, 0]));
    entries.extend(COMPONENTS.map(|(index, bytes, offset)| entry(0xd, index, [bytes, offset, 0, 0])));
    entries.extend([entry(0x8000_0000, 0, [0x8000_0021, 0, 0, 0]), entry(0x8000_0001, 0, all)]);
    entries.extend([0x8000_0007, 0x8000_000a, 0x8000_001d, 0x8000_0021].map(|leaf| entry(leaf, 0, all)));
    entries.push(entry(0x8000_0008, 0, [u32::from_le_bytes([bits, 57, 0, 0]), u32::MAX, 0, u32::MAX]));
    entries.push(entry(features::KVM_FEATURES, 0, all));
    let has = FeatureSet::of(&entries).without(lacks);
    entries.iter_mut().for_each(|entry| has.mask(entry));
    Host::new(&entries, &entries)
}

fn whole() -> Host {
    host(&FeatureSet::default(), 46)
}

fn find(entries: &[kvm_cpuid_entry2], leaf: u32, index: u32) -> Option<kvm_cpuid_entry2> {
    entries.iter().find(|entry| is_leaf(entry, leaf, index)).copied()
}

fn at_level(level: Level) -> Vec<kvm_cpuid_entry2> {
    let host = whole();
    host.entries(&host.at_level(level).unwrap(), Shape::Portable, 0, 1).as_slice().to_vec()
}

#[test]
fn v2_has_no_trace_of_avx() {
    let entries = at_level(Level::V2);
    let seen = FeatureSet::of(&entries);
    assert!(seen.has(&Level::V2.required()));
    assert!(Level::V2.shown().has(&seen), "{seen}");
    for leaf in [6, 7, 0xd, 0x14, 0x8000_000a, 0x8000_001d, 0x8000_0021] {
        assert_eq!(find(&entries, leaf, 0), None, "{leaf:#x}");
    }
    assert_eq!(find(&entries, 0, 0).unwrap().eax, 0xb);
    assert_eq!(find(&entries, 0x8000_0000, 0).unwrap().eax, 0x8000_0008);
    assert_eq!(find(&entries, 0x8000_0008, 0).unwrap().eax, 46 | 48 << 8, "no la57");
    let one = find(&entries, 1, 0).unwrap();
    assert_eq!((one.ecx >> 26 & 0b111, one.ecx >> 31), (0, 1), "no XSAVE, OSXSAVE or AVX; a hypervisor");
    assert_eq!(find(&entries, features::KVM_FEATURES, 0).unwrap().eax, 1 | 1 << 3 | 1 << 24);
}

#[test]
fn v3_shows_the_state_of_avx_and_v4_that_of_avx512() {
    for (level, xcr0, bytes, components) in
        [(Level::V3, 0b111, 832, &[2][..]), (Level::V4, 0xe7, 2688, &[2, 5, 6, 7][..])]
    {
        let entries = at_level(level);
        let state = find(&entries, 0xd, 0).unwrap();
        assert_eq!((state.eax, state.ebx, state.ecx, state.edx), (xcr0, 576, bytes, 0), "{level}");
        let more = find(&entries, 0xd, 1).unwrap();
        assert_eq!((more.eax, more.ebx, more.ecx, more.edx), (0, 0, 0, 0), "{level}");
        let shown: Vec<_> =
            entries.iter().filter(|e| e.function == 0xd && e.index > 1).map(|e| e.index).collect();
        assert_eq!(shown, components, "{level}");
        let seven = find(&entries, 7, 0).unwrap();
        assert_eq!((seven.eax, seven.ecx, seven.edx), (0, 0, 0), "{level}: no further subleaf");
        assert_eq!(find(&entries, 7, 1), None, "{level}");
        assert!(FeatureSet::of(&entries).has(&level.required()));
        assert_eq!(find(&entries, 0, 0).unwrap().eax, 0xd, "{level}");
    }
}

#[test]
fn a_host_shows_all_that_can_move() {
    let host = whole();
    let entries = host.entries(&host.own(), Shape::Whole, 0, 1);
    let seen = FeatureSet::of(entries.as_slice());
    let hidden = host.gives.features.without(&seen).to_string();
    assert!(hidden.starts_with("vmx, svm, kvm_nop_io_delay"), "{hidden}");
    assert!(
        find(entries.as_slice(), 0x14, 0).is_some() && find(entries.as_slice(), 0x8000_000a, 0).is_none()
    );
    let state = find(entries.as_slice(), 0xd, 0).unwrap();
    assert_eq!((state.eax, state.ecx), (0x2ff, 2696));
    assert_eq!(find(entries.as_slice(), 0xd, 1).unwrap().ecx, 0x1800, "shadow stacks");
    // AMX needs state that this host does not give.
    assert!(!seen.has(&FeatureSet::known("amx_tile")) && !seen.has(&FeatureSet::known("amx_int8")));
}

#[test]
fn a_level_that_the_host_cannot_give_names_what_is_missing() {
    let lacks = FeatureSet::known("avx512f bmi2 popcnt");
    let error = host(&lacks, 46).at_level(Level::V4).unwrap_err();
    assert!(error.to_string().contains("x86-64-v4: it lacks popcnt, bmi2, avx512f, avx512dq"), "{error}");
    assert!(host(&FeatureSet::known("bmi2"), 46).at_level(Level::V2).is_ok());
    // The bit alone is not enough: KVM must give its state.
    let entries: Vec<_> = whole().entries(&whole().own(), Shape::Whole, 0, 1).as_slice().to_vec();
    let no_state: Vec<_> = entries.iter().copied().filter(|e| e.function != 0xd).collect();
    let error = Host::new(&no_state, &no_state).at_level(Level::V3).unwrap_err();
    assert!(error.to_string().contains("xsave, avx, f16c, avx2"), "{error}");
}

#[test]
fn each_cpu_has_its_own_id() {
    let host = whole();
    for index in 0..3 {
        let entries = host.entries(&host.own(), Shape::Whole, index, 3);
        let one = find(entries.as_slice(), 1, 0).unwrap();
        assert_eq!((one.ebx >> 24, one.ebx >> 16 & 0xff), (u32::from(index), 3));
        let topology = find(entries.as_slice(), 0xb, 1).unwrap();
        assert_eq!((topology.eax, topology.ebx, topology.edx), (2, 3, u32::from(index)));
    }
}

#[test]
fn a_host_that_lacks_something_says_what() {
    let guest = whole().own();
    let lacks = FeatureSet::known("avx2 bmi2");
    let error = check(&guest, &host(&lacks, 46).gives).unwrap_err();
    assert!(error.to_string().contains("has: avx2, bmi2;"), "{error}");
    let error = check(&guest, &host(&FeatureSet::default(), 40).gives).unwrap_err();
    assert!(matches!(error, CpuError::AddressBits { guest: 46, host: 40 }), "{error}");
    check(&guest, &host(&FeatureSet::default(), 52).gives).unwrap();
    let amd = CpuModel { vendor: "AuthenticAMD".to_owned(), ..whole().gives };
    assert!(matches!(check(&guest, &amd), Err(CpuError::Vendor { .. })));
}

#[test]
fn a_kvm_that_cannot_hide_features_is_believed() {
    // It supports no AVX by its own account, and shows it all the same, with its state.
    let shown: Vec<_> = whole().entries(&whole().own(), Shape::Whole, 0, 1).as_slice().to_vec();
    let mut supported = shown.clone();
    let avx = FeatureSet::known("avx");
    let rest = FeatureSet::of(&shown).without(&avx);
    supported.iter_mut().for_each(|entry| rest.mask(entry));
    let host = Host::new(&supported, &shown);
    assert!(host.gives.features.has(&avx));
    let entries = host.entries(&host.at_level(Level::V3).unwrap(), Shape::Portable, 0, 1);
    assert!(FeatureSet::of(entries.as_slice()).has(&avx));
}

/// Features that a made-up host may lack.
fn some_features() -> impl Strategy<Value = FeatureSet> {
    let all: Vec<_> = whole().gives.features.names().collect();
    prop::collection::vec(prop::sample::select(all), 0..40)
        .prop_map(|names| FeatureSet::named(names).expect("names of the table"))
}

proptest! {
    #[test]
    fn the_denominator_runs_on_every_host(a in some_features(), b in some_features(), bits in prop::array::uniform2(36u8..53)) {
        let hosts = [host(&a, bits[0]), host(&b, bits[1])];
        let baseline = denominator(hosts[0].portable(), &[hosts[1].portable()]).unwrap();
        let baseline = CpuModel::parse(baseline.to_json().unwrap().as_bytes()).unwrap();
        let shown = hosts.each_ref().map(|host| {
            let model = host.with_baseline(baseline.clone()).unwrap();
            CpuModel::of(host.entries(&model, Shape::Portable, 0, 2).as_slice())
        });
        prop_assert_eq!(&shown[0], &shown[1], "a guest sees the same on both");
        prop_assert_eq!(&shown[0].features, &baseline.features, "and all of it");
        for host in &hosts {
            check(&shown[0], &host.gives).unwrap();
        }
    }

    #[test]
    fn state_and_features_tell_the_same_story(lacks in some_features()) {
        let host = host(&lacks, 46);
        let entries = host.entries(&host.own(), Shape::Portable, 0, 1);
        let entries = entries.as_slice();
        let seen = FeatureSet::of(entries);
        for (feature, mask) in [("xsave", 3), ("avx", 4), ("avx512f", 0xe0), ("pku", 0x200)] {
            let state = find(entries, 0xd, 0).map_or(0, |entry| entry.eax);
            prop_assert_eq!(state & mask == mask, seen.has(&FeatureSet::known(feature)), "{}", feature);
        }
        let end = |e: &kvm_cpuid_entry2| e.eax + e.ebx;
        let last = entries.iter().filter(|e| e.function == 0xd && e.index > 1 && e.ebx > 0).map(end).max();
        if let Some(state) = find(entries, 0xd, 0) {
            prop_assert_eq!(state.ecx, last.unwrap_or(576));
        }
    }
}
