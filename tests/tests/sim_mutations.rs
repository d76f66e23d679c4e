//! The checkers can fail: each deliberate breakage of a driver is caught by some seed.

use tern_tests::mutation::Mutation;
use tern_tests::world::{Options, Story, run_many};

/// Enough for the rarest.
const SEEDS: u64 = 3000;

/// The story in which a breakage shows, and what the checker says of it.
fn trap(mutation: Mutation) -> (Story, &'static [&'static str]) {
    match mutation {
        Mutation::SkipLastCollect
        | Mutation::LateDirtyLog
        | Mutation::StaleHashes
        | Mutation::SkipCopies
        | Mutation::SkipZeroes => (Story::Clean, &["is not what the source had at its pause"]),
        Mutation::InstallUnchecked => {
            (Story::BadSite, &["is not what the source had at its pause", "a wrong page"])
        }
        Mutation::DropStale | Mutation::DropMissing | Mutation::LiteralsUnchecked => {
            (Story::Clean, &["the source gave up"])
        }
        Mutation::DeltasUnchecked => (Story::Clean, &["is not what the source had at its pause"]),
        Mutation::IgnoresDeltaMisses | Mutation::DeltasAgain => (Story::Clean, &["the source gave up"]),
        Mutation::ResumeAfterCommit => (Story::Lossy, &["both sides run the VM"]),
        Mutation::WritesAfterPause => {
            (Story::Clean, &["both sides run the VM", "is not what the source had at its pause"])
        }
        Mutation::RunWithoutCommit => (Story::Lossy, &["both sides run the VM"]),
        Mutation::ForgetsWhatRan => (
            Story::Lossy,
            &["what it did since is undone", "both sides run the VM", "the run does not come to an end"],
        ),
        Mutation::RunsBeforeAbsent => {
            (Story::Postcopy, &["is not what the source had at its pause", "a wrong page"])
        }
        Mutation::InstallsOverTheGuest | Mutation::ZeroForLost => (Story::Postcopy, &["a wrong page"]),
        Mutation::RunsOnInPostcopy => (Story::Postcopy, &["both sides run the VM"]),
        Mutation::LetsGoTooEarly => (Story::Postcopy, &["pages of its VM never came"]),
        Mutation::SpillServerCommits => {
            (Story::Postcopy, &["both sides run the VM", "what it did since is undone"])
        }
        Mutation::SpillsOnlyAhead => (
            Story::Postcopy,
            &["a wrong page", "were to stand in a spill file", "the run does not come to an end"],
        ),
        Mutation::StaysThrottled => (Story::Crashes, &["slowed down by"]),
        Mutation::KeepsOldSpill => (Story::Postcopy, &["the spill file has other pages than those absent"]),
        Mutation::SealsTooEarly => (Story::Postcopy, &["were to stand in a spill file"]),
        Mutation::ForgetsTheBrokenRound | Mutation::EmptiesTheDirtyLog => {
            (Story::Lossy, &["is not what the source had at its pause", "does not have the source's root"])
        }
        Mutation::StandsStillWhenCut => (Story::Lossy, &["stands still while the source dials"]),
        Mutation::ClaimsWhatItLacks | Mutation::TrustsWhatIsHeld => {
            (Story::Lossy, &["does not have the source's root"])
        }
        Mutation::NoDeadlines => (Story::Crashes, &["the source's deadline has passed"]),
        Mutation::NoResume => {
            (Story::Lossy, &["the VM runs nowhere", "the VM has not come to the destination"])
        }
    }
}

#[test]
fn every_breakage_is_caught() {
    let mut wrong = Vec::new();
    for mutation in Mutation::ALL {
        let (story, complaints) = trap(mutation);
        let options = Options { mutation: Some(mutation), trace: false };
        match run_many(Some(story), 0, SEEDS, options) {
            Ok(total) => wrong.push(format!("{mutation:?} went unnoticed: {total:?}")),
            Err(violation) if complaints.iter().any(|what| violation.what.contains(what)) => {}
            Err(violation) => wrong.push(format!("{mutation:?} was caught by another rule: {violation}")),
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
