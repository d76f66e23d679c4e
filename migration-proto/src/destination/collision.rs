//! Two pages with one short id. No such pair of pages is known, so the wrong one is no page here, only a name: that is why this is a test within
//! the module, and why the simulation has no such site.

use page::{Domain, Gfn, PAGE_SIZE, PageHash, REGION_PAGES, RegionId, VerifiedPage, root_of};

use super::{Action, Destination};
use crate::manifest::{Entry, Extent, Layout};
use crate::postcopy::Mode;
use crate::switchover::{Epoch, MigrationId, VmId};
use crate::timer::{Link, Span, Time};
use crate::wire::{Message, Offer, Region};

const NOW: Time = Time(1);

fn drain(machine: &mut Destination) -> Vec<Action> {
    std::iter::from_fn(|| machine.poll()).collect()
}

#[test]
fn a_wrong_page_with_the_right_short_id_is_found_out_and_replaced() {
    let domain = Domain::unkeyed();
    let right = VerifiedPage::new(&domain, Box::new([1; PAGE_SIZE]));
    let mut bytes = right.name().0;
    bytes[31] ^= 1;
    let wrong = PageHash(bytes);
    assert_eq!(wrong.short(), right.name().short());

    let region = RegionId(0);
    let mut names = vec![domain.zero_name(); REGION_PAGES];
    names[0] = right.name();
    let root = root_of(&names);
    let layout = Layout::new(vec![Extent { first: region, regions: 1 }]).unwrap();
    let (migration, vm) = (MigrationId([1; 16]), VmId([2; 16]));
    let offer = Offer {
        migration,
        vm,
        epoch: Epoch(0),
        domain: domain.id(),
        layout,
        machine: vec![],
        mode: Mode::Precopy,
        deltas: false,
        resume_for: Span(0),
    };
    let link = Link { rtt: Span::from_millis(50), bytes_per_s: 12_500_000 };
    let mut machine = Destination::new(NOW, offer, Some(&domain), link, true);
    machine.prepared(NOW);

    let mut entries: Vec<_> = (0..REGION_PAGES as u64).map(|gfn| (Gfn(gfn), Entry::Zero)).collect();
    entries[0].1 = Entry::Name(wrong.short());
    machine.message(NOW, Message::Region(Region { region, pushed: false, entries, root }));
    drain(&mut machine);

    assert_eq!(machine.install(NOW, wrong), [Gfn(0)], "the site gave it, and its short id is right");
    assert_eq!(drain(&mut machine), [Action::Send(Message::WantNames(region))]);
    machine.message(NOW, Message::RoundEnd { round: 0 });
    assert_eq!(drain(&mut machine), [], "the round is not done while a region is in question");

    machine.message(NOW, Message::FullNames { region, names });
    assert_eq!(drain(&mut machine), [Action::Send(Message::Want(vec![Gfn(0)]))]);
    assert_eq!(machine.install(NOW, wrong), [], "the wrong one does not come in again");
    assert_eq!(machine.literal(NOW, Gfn(0), &right), [Gfn(0)]);
    assert_eq!(machine.stats().root_mismatches, 1);
    assert!(matches!(drain(&mut machine)[..], [Action::Send(Message::RoundDone { round: 0, .. })]));

    machine.message(NOW, Message::State(vec![7]));
    machine.message(NOW, Message::Final { round: 1, root: root_of([&root]) });
    assert_eq!(drain(&mut machine), [Action::LoadState(vec![7])]);
}
