//! How many members a site has that is too large to know each of them.
//!
//! Members' keys are spread evenly over Kademlia's key space, and so are the shards' keys. If the m-th closest member to a
//! shard's key stands at the fraction d of the space, there are about m / d members; over many shards, (Σm - 1) / Σd. With
//! 256 shards and 4 members each the standard error is a thirty-second.

use crate::shard::{MemberId, SHARDS, ShardId};

/// Shards that must have been measured before an estimate is given.
const MEASURED: usize = 16;

/// What is known of the distances.
#[derive(Debug)]
pub struct SizeEstimate {
    shards: Vec<Option<(u32, f64)>>,
}

impl Default for SizeEstimate {
    fn default() -> Self {
        Self { shards: vec![None; SHARDS] }
    }
}

impl SizeEstimate {
    /// Takes the closest members to a shard's key, as Kademlia named them.
    pub fn measured(&mut self, shard: ShardId, closest: &[MemberId]) {
        let farthest = closest.iter().map(|member| member.distance(shard.key())).max();
        let count = u32::try_from(closest.len()).unwrap_or(u32::MAX);
        self.shards[shard.index()] = farthest.map(|distance| (count, fraction(&distance)));
    }

    /// How many members there are, whoever asks left out; none before enough shards were measured.
    #[must_use]
    pub fn members(&self) -> Option<usize> {
        let measured: Vec<_> = self.shards.iter().flatten().collect();
        if measured.len() < MEASURED {
            return None;
        }
        let count: f64 = measured.iter().map(|(count, _)| f64::from(*count)).sum();
        let space: f64 = measured.iter().map(|(_, distance)| distance).sum();
        let members = ((count - 1.0) / space).round();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "bounded just before")]
        let members = members.clamp(0.0, f64::from(u32::MAX)) as usize;
        Some(members)
    }
}

/// A distance as a fraction of the key space, never 0.
fn fraction(distance: &[u8; 32]) -> f64 {
    let [a, b, c, d, ..] = *distance;
    (f64::from(u32::from_be_bytes([a, b, c, d])) + 1.0) / (f64::from(u32::MAX) + 1.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn estimate(site: u32, closest: usize, measured: usize) -> Option<usize> {
        let members: Vec<_> = (0..site).map(|n| MemberId::of_peer(&n.to_be_bytes())).collect();
        let mut estimate = SizeEstimate::default();
        for shard in ShardId::all().take(measured) {
            let mut members = members.clone();
            members.sort_by_key(|member| member.distance(shard.key()));
            estimate.measured(shard, &members[..closest.min(members.len())]);
        }
        estimate.members()
    }

    #[test]
    fn sites_of_many_sizes_are_estimated_within_an_eighth() {
        for site in [100u32, 300, 1000, 5000] {
            let found = estimate(site, 4, SHARDS).unwrap();
            let (low, high) = (site - site / 8, site + site / 8);
            assert!((low as usize..=high as usize).contains(&found), "{found} of {site}");
        }
    }

    #[test]
    fn too_few_measurements_are_none_and_nobody_is_nothing() {
        assert_eq!(estimate(1000, 4, MEASURED - 1), None);
        assert!(estimate(1000, 4, MEASURED).is_some());
        assert_eq!(estimate(0, 4, SHARDS), None);
    }
}
