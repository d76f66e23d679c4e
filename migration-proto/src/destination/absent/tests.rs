//! Windows and patience, which whole migrations of small VMs do not reach.

use page::{Domain, PAGE_SIZE, REGION_PAGES};

use super::*;
use crate::timer::Span;

const LINK: Link = Link { rtt: Span::from_millis(50), bytes_per_s: 12_500_000 };
const NOW: Time = Time(1);

fn page(fill: u8) -> VerifiedPage {
    VerifiedPage::new(&Domain::unkeyed(), Box::new([fill; PAGE_SIZE]))
}

/// The first frame of each of `regions` is absent, and the VM runs.
fn absent(regions: u64, site: bool) -> Absent {
    let mut absent = Absent::new(regions * REGION_PAGES as u64, Domain::unkeyed().zero_name(), site, 0);
    (0..regions).for_each(|region| absent.mark(RegionId(region).first()));
    absent.begin(NOW, LINK);
    absent.runs();
    absent
}

fn name(absent: &mut Absent, region: u64, fill: u8) {
    let region = RegionId(region);
    let entry = (region.first(), FullName::Name(page(fill).name()));
    absent.named(NOW, LINK, region, &[entry]).unwrap();
}

fn drain(absent: &mut Absent) -> Vec<Action> {
    absent.drain().collect()
}

fn want(regions: &[u64]) -> Action {
    Action::Send(Message::Want(regions.iter().map(|region| RegionId(*region).first()).collect()))
}

#[test]
fn names_are_asked_for_anew_a_window_at_a_time() {
    let regions = limits::NAMES_WINDOW_REGIONS as u64 + 3;
    let mut absent = absent(regions, false);
    absent.disconnected(NOW, LINK);
    absent.connected();
    assert_eq!(drain(&mut absent), [], "the source has not said that it is there");
    absent.tell_lack(NOW, LINK);
    let asked = drain(&mut absent);
    let window: Vec<_> = (0..regions - 3).map(|n| Action::Send(Message::WantNames(RegionId(n)))).collect();
    assert_eq!(asked, window);
    name(&mut absent, 0, 1);
    let next = Action::Send(Message::WantNames(RegionId(regions - 3)));
    assert_eq!(drain(&mut absent), [next, want(&[0])], "one answered, one more asked");
}

#[test]
fn a_site_that_is_silent_is_given_up_and_asked_again_when_the_source_is_lost() {
    let mut absent = absent(limits::SITE_STRIKES.into(), true);
    for n in 0..u8::try_from(limits::SITE_STRIKES).unwrap() {
        name(&mut absent, n.into(), n + 1);
        assert!(matches!(drain(&mut absent)[..], [Action::Resolve { .. }]));
        let due = absent.next_timeout().unwrap();
        assert_eq!(absent.timeout(due, LINK), 1);
        assert!(matches!(drain(&mut absent)[..], [Action::Forget(_), Action::Send(Message::Want(_))]));
    }
    assert!(absent.fault(NOW, LINK, Gfn(0)));
    let fault = Action::Send(Message::Fault(Gfn(0)));
    assert_eq!(drain(&mut absent), [fault], "straight to the source, before its want");
    absent.disconnected(NOW, LINK);
    let asked = drain(&mut absent);
    let Action::Resolve { ids, .. } = &asked[0] else { panic!("{asked:?}") };
    assert_eq!(ids[..], [page(1).name().short()], "what a virtual CPU waits for goes first");
    assert!(matches!(asked[1..], [Action::Resolve { .. }]));
}

#[test]
fn two_frames_of_one_name_are_asked_for_once_and_filled_by_one_page() {
    let mut absent = absent(3, true);
    for region in 0..2 {
        name(&mut absent, region, 7);
    }
    name(&mut absent, 2, 8);
    assert!(absent.fault(NOW, LINK, Gfn(0)) && absent.fault(NOW, LINK, RegionId(1).first()));
    let questions = drain(&mut absent).len();
    assert_eq!(questions, 3, "two in bulk, one for both faults");
    let seven = page(7);
    let frames = absent.site_page(NOW, SiteRung::Site, seven.name().short(), &seven);
    assert_eq!(frames, [Gfn(0), RegionId(1).first()]);
    assert_eq!((absent.left(), absent.stats().faults_site), (1, 2));
    assert!(!absent.take_complete());
    assert_eq!(absent.literal(NOW, RegionId(2).first(), &page(8)), [RegionId(2).first()]);
    assert!(absent.take_complete() && !absent.take_complete(), "said once");
    absent.connected();
    absent.tell_lack(NOW, LINK);
    assert!(absent.take_complete(), "and again over a new connection");
}

#[test]
fn the_vm_is_paused_once_and_goes_on_when_all_that_it_was_paused_for_is_there() {
    let mut absent = absent(2, false);
    absent.disconnected(NOW, LINK);
    name(&mut absent, 0, 1);
    name(&mut absent, 1, 2);
    assert!(absent.fault(NOW, LINK, Gfn(0)) && absent.fault(NOW, LINK, Gfn(512)));
    assert_eq!(drain(&mut absent), [], "there is nobody to ask");
    let limit = NOW + limits::FAULT_LIMIT;
    assert_eq!(absent.next_timeout(), Some(limit));
    absent.timeout(limit, LINK);
    let paused = Action::PauseVm { gfn: Gfn(0), name: Some(page(1).name()) };
    assert_eq!(drain(&mut absent), [paused]);
    assert_eq!(absent.next_timeout(), None, "only a connection can help");
    absent.connected();
    absent.tell_lack(limit, LINK);
    let asked = drain(&mut absent);
    let faults = [Gfn(0), Gfn(512)].map(|gfn| Action::Send(Message::Fault(gfn)));
    assert!(asked.len() == 2 && faults.iter().all(|fault| asked.contains(fault)), "{asked:?}");
    assert_eq!(absent.fault_page(limit, Gfn(0), page(1).name(), &page(1)), [Gfn(0)]);
    assert_eq!(drain(&mut absent), []);
    assert_eq!(absent.fault_page(limit, Gfn(512), page(2).name(), &page(2)), [Gfn(512)]);
    assert_eq!(drain(&mut absent), [Action::ResumeVm]);
    assert_eq!(absent.stats().longest_wait_us, limits::FAULT_LIMIT.0);
}

#[test]
fn a_page_that_cannot_be_installed_is_looked_for_again() {
    let mut absent = absent(1, false);
    name(&mut absent, 0, 1);
    drain(&mut absent);
    assert_eq!(absent.literal(NOW, Gfn(0), &page(1)), [Gfn(0)]);
    absent.not_installed(NOW, Gfn(0));
    assert!(!absent.take_complete(), "it is not there");
    let again = absent.next_timeout().unwrap();
    assert_eq!(again, NOW + limits::FAULT_ASK_AGAIN);
    absent.timeout(again, LINK);
    assert_eq!(drain(&mut absent), [Action::Send(Message::Fault(Gfn(0)))]);
    assert_eq!(absent.fault_page(again, Gfn(0), page(1).name(), &page(1)), [Gfn(0)]);
    assert!(absent.take_complete());
}
