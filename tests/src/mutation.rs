//! Deliberate breakages of the drivers: a checker that no breakage can trip is no checker.

/// A breakage. Each is caught by some seed of its story (`tests/sim_mutations.rs`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutation {
    /// The source does not collect the dirty log once the VM stands still.
    SkipLastCollect,
    /// The dirty log starts only after the first pages have been read.
    LateDirtyLog,
    /// The VM still writes after the source said that it stands still.
    WritesAfterPause,
    /// The source lets the VM run again when the connection is lost after Commit.
    ResumeAfterCommit,
    /// The destination runs the VM as soon as it is ready.
    RunWithoutCommit,
    /// The destination host, asked over a new connection, does not look into its memory of what it ran.
    ForgetsWhatRan,
    /// The source does not tell that a wanted page has changed.
    DropStale,
    /// The source sends a wanted page as it is now, whatever its name says.
    LiteralsUnchecked,
    /// The destination installs what the site gave, without looking at its hash.
    InstallUnchecked,
    /// The destination does not pass on that it wants what the site calls missing.
    DropMissing,
    /// The destination does not copy duplicates.
    SkipCopies,
    /// The destination leaves what stood in a page that has become zero.
    SkipZeroes,
    /// The source keeps the names of pages that it has hashed once.
    StaleHashes,
    /// The source never looks at its deadlines.
    NoDeadlines,
    /// The source does not let the VM run again after an abort.
    NoResume,
    /// The destination runs the VM without having made absent what comes later: it reads what stood there before.
    RunsBeforeAbsent,
    /// The destination writes a page that comes again, whatever the VM has written there since.
    InstallsOverTheGuest,
    /// The source lets the VM run again when the connection is lost in post-copy.
    RunsOnInPostcopy,
    /// The destination gives the VM zero pages when nobody gives one that it waits for, instead of pausing it.
    ZeroForLost,
    /// The source frees its memory as soon as the VM runs at the destination.
    LetsGoTooEarly,
    /// The destination installs what a delta gives, without looking at its hash.
    DeltasUnchecked,
    /// The destination does not say that a delta gave no page.
    IgnoresDeltaMisses,
    /// The source sends deltas against a page that the destination does not have, whatever it is asked for again.
    DeltasAgain,
    /// Whoever serves a spill file says Commit, as the source that it stands for would.
    SpillServerCommits,
    /// The source spills what is absent while the VM runs, and not what it writes meanwhile.
    SpillsOnlyAhead,
    /// The source says that the spill file stands before it does.
    SealsTooEarly,
    /// After a broken connection the source's spill file keeps pages that are absent no more.
    KeepsOldSpill,
    /// The source does not let a guest that it has slowed down run at full speed again.
    StaysThrottled,
    /// The source names nothing of the first region that it is asked for after a broken connection.
    ForgetsTheBrokenRound,
    /// The source empties the dirty log when it dials after a broken connection.
    EmptiesTheDirtyLog,
    /// The source leaves the VM standing still while it dials.
    StandsStillWhenCut,
    /// The destination says that it holds all that it was ever told.
    ClaimsWhatItLacks,
    /// The source takes whatever the destination holds for what it was told last.
    TrustsWhatIsHeld,
}

impl Mutation {
    /// All of them.
    pub const ALL: [Self; 33] = [
        Self::SkipLastCollect,
        Self::LateDirtyLog,
        Self::WritesAfterPause,
        Self::ResumeAfterCommit,
        Self::RunWithoutCommit,
        Self::ForgetsWhatRan,
        Self::DropStale,
        Self::LiteralsUnchecked,
        Self::InstallUnchecked,
        Self::DropMissing,
        Self::SkipCopies,
        Self::SkipZeroes,
        Self::StaleHashes,
        Self::NoDeadlines,
        Self::NoResume,
        Self::RunsBeforeAbsent,
        Self::InstallsOverTheGuest,
        Self::RunsOnInPostcopy,
        Self::ZeroForLost,
        Self::LetsGoTooEarly,
        Self::DeltasUnchecked,
        Self::IgnoresDeltaMisses,
        Self::DeltasAgain,
        Self::SpillServerCommits,
        Self::SpillsOnlyAhead,
        Self::SealsTooEarly,
        Self::KeepsOldSpill,
        Self::StaysThrottled,
        Self::ForgetsTheBrokenRound,
        Self::EmptiesTheDirtyLog,
        Self::StandsStillWhenCut,
        Self::ClaimsWhatItLacks,
        Self::TrustsWhatIsHeld,
    ];
}
