//! Properties of [`Mesh`] and [`Refresh`].

use std::time::Duration;

use proptest::prelude::*;

use super::*;

const LIMITS: MeshLimits = MeshLimits { mesh: 8, connections: 12 };

fn member(n: u32) -> MemberId {
    MemberId::of_peer(&n.to_be_bytes())
}

fn members(count: u32) -> BTreeSet<MemberId> {
    (0..count).map(member).collect()
}

#[derive(Clone, Debug)]
enum Step {
    Connected(u32, bool),
    Disconnected(u32),
    Began(u32),
    Ended(u32),
    Wait(u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let peer = 1u32..40;
    let step = prop_oneof![
        3 => (peer.clone(), any::<bool>()).prop_map(|(peer, dialled)| Step::Connected(peer, dialled)),
        1 => peer.clone().prop_map(Step::Disconnected),
        1 => peer.clone().prop_map(Step::Began),
        1 => peer.prop_map(Step::Ended),
        1 => (0u64..30).prop_map(Step::Wait),
    ];
    prop::collection::vec(step, 0..120)
}

proptest! {
    #[test]
    fn all_of_a_small_site_are_kept_and_the_nearest_of_a_large_one(count in 1u32..40) {
        let mesh = Mesh::new(member(0), LIMITS);
        let (all, kept) = (members(count), mesh.kept(&members(count)));
        prop_assert!(!kept.contains(&member(0)) && kept.iter().all(|peer| all.contains(peer)));
        if count as usize <= LIMITS.mesh {
            prop_assert_eq!(kept.len() + 1, all.len());
        } else {
            prop_assert_eq!(kept.len(), LIMITS.neighbours());
            let far = kept.iter().map(|peer| peer.distance(&member(0).0)).max();
            let left = all.iter().filter(|peer| **peer != member(0) && !kept.contains(peer));
            prop_assert!(far < left.map(|peer| peer.distance(&member(0).0)).min());
        }
    }

    /// The reference knows of each connection when it was used last and what is under way on it.
    #[test]
    fn what_is_kept_in_use_or_fresh_stays_and_the_rest_comes_down_to_the_limit(steps in steps()) {
        let mut now = Instant::now();
        let mut mesh = Mesh::new(member(0), LIMITS);
        let mut model: BTreeMap<u32, (bool, Instant)> = BTreeMap::new();
        let mut requests: BTreeMap<u32, u32> = BTreeMap::new();
        let kept = mesh.kept(&members(40));
        for step in steps {
            match step {
                Step::Connected(peer, dialled) => {
                    mesh.connected(member(peer), dialled, now);
                    model.entry(peer).or_insert((dialled, now));
                }
                Step::Disconnected(peer) => {
                    mesh.disconnected(member(peer));
                    model.remove(&peer);
                }
                Step::Began(peer) => {
                    mesh.began(member(peer), now);
                    model.entry(peer).and_modify(|link| link.1 = now);
                    *requests.entry(peer).or_default() += 1;
                }
                Step::Ended(peer) => {
                    mesh.ended(member(peer), now);
                    model.entry(peer).and_modify(|link| link.1 = now);
                    requests.entry(peer).and_modify(|count| *count = count.saturating_sub(1));
                }
                Step::Wait(seconds) => now += Duration::from_secs(seconds),
            }
            let closing: BTreeSet<MemberId> = mesh.to_close(&kept, now).into_iter().collect();
            prop_assert_eq!(mesh.connections(), model.len());
            let mut may_go = 0;
            for (peer, (dialled, used)) in &model {
                let busy = requests.get(peer).is_some_and(|count| *count > 0);
                let (peer, idle) = (member(*peer), now - *used);
                let spared = busy || kept.contains(&peer) || idle < CONNECTION_GRACE;
                may_go += usize::from(!spared);
                prop_assert!(!(spared && closing.contains(&peer)));
                if !spared && *dialled && idle >= IDLE_CLOSE {
                    prop_assert!(closing.contains(&peer), "unused, and ours to close");
                }
                // Whoever stays although it may go was used no earlier than whoever goes for want of room.
                if !spared && !closing.contains(&peer) {
                    let later = model.iter().filter(|(other, link)| {
                        closing.contains(&member(**other)) && link.1 > *used && now - link.1 < IDLE_CLOSE
                    });
                    prop_assert_eq!(later.count(), 0);
                }
            }
            let too_many = model.len().saturating_sub(LIMITS.connections);
            prop_assert!(closing.len() >= too_many.min(may_go));
        }
    }

    #[test]
    fn every_shard_is_asked_for_once_at_first_and_then_once_in_its_time(me in any::<u32>(), lost in any::<u8>()) {
        let start = Instant::now();
        let mut refresh = Refresh::new(member(me), start);
        let ask_all = |refresh: &mut Refresh, now| {
            let mut asked = Vec::new();
            while let Some(shard) = refresh.next(now) {
                asked.push(shard);
                refresh.done(shard, now);
            }
            asked
        };
        prop_assert_eq!(ask_all(&mut refresh, start).len(), SHARDS);
        prop_assert!(refresh.next(start).is_none());
        refresh.hurry(ShardId(lost), start);
        prop_assert_eq!(ask_all(&mut refresh, start), [ShardId(lost)]);
        // From then on a few at a time, and all of them in the time of one round and the lost one's second turn.
        let (mut most, mut seen) = (0, BTreeSet::new());
        for step in 1..=2 * 256 {
            let asked = ask_all(&mut refresh, start + REFRESH_EVERY * step / 256);
            most = most.max(asked.len());
            seen.extend(asked);
        }
        prop_assert_eq!(seen.len(), SHARDS);
        prop_assert!(most <= 3, "{} at once", most);
    }

    #[test]
    fn no_more_than_so_many_shards_are_asked_for_at_once(count in 1usize..20) {
        let now = Instant::now();
        let mut refresh = Refresh::new(member(0), now);
        let asked: Vec<_> = std::iter::from_fn(|| refresh.next(now)).collect();
        prop_assert_eq!(asked.len(), REFRESHES_IN_FLIGHT);
        let ended = count.min(asked.len());
        asked[..ended].iter().for_each(|shard| refresh.done(*shard, now));
        prop_assert_eq!(std::iter::from_fn(|| refresh.next(now)).count(), ended);
        // A late second end of the same question frees nothing.
        refresh.done(asked[0], now);
        prop_assert!(refresh.next(now).is_none());
    }
}
