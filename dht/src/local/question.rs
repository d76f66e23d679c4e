//! What a client has asked for and not been answered about: the check that the peer answers for each id once.

use page::ShortId;

use super::error::SiteError;
use crate::id_map::IdMap;

/// One Resolve request, as its answers come in.
#[derive(Debug)]
pub(super) struct Question {
    /// Whether each id was answered.
    answered: IdMap<bool>,
    open: usize,
}

impl Question {
    pub(super) fn new(ids: &[ShortId]) -> Self {
        let answered: IdMap<bool> = ids.iter().map(|id| (*id, false)).collect();
        Self { open: answered.len(), answered }
    }

    /// The peer has given the page of `id`, or said that it is missing.
    ///
    /// # Errors
    /// [`SiteError::Unasked`], [`SiteError::AnsweredTwice`].
    pub(super) fn answered(&mut self, id: ShortId) -> Result<(), SiteError> {
        let answered = self.answered.get_mut(&id).ok_or(SiteError::Unasked { id })?;
        if std::mem::replace(answered, true) {
            return Err(SiteError::AnsweredTwice { id });
        }
        self.open -= 1;
        Ok(())
    }

    /// The peer has said that it is done.
    ///
    /// # Errors
    /// [`SiteError::Unanswered`].
    pub(super) fn ended(&self) -> Result<(), SiteError> {
        if self.open == 0 { Ok(()) } else { Err(SiteError::Unanswered { ids: self.open }) }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn each_id_is_answered_once_and_nothing_else_is(
            asked in prop::collection::vec(0u64..12, 0..12),
            answers in prop::collection::vec(0u64..16, 0..24),
        ) {
            let mut question = Question::new(&asked.iter().copied().map(ShortId).collect::<Vec<_>>());
            let mut open: BTreeSet<u64> = asked.iter().copied().collect();
            for id in answers {
                let said = question.answered(ShortId(id));
                match (asked.contains(&id), open.remove(&id)) {
                    (true, true) => prop_assert!(said.is_ok()),
                    (true, false) => {
                        let twice = matches!(said, Err(SiteError::AnsweredTwice { id: twice }) if twice.0 == id);
                        prop_assert!(twice);
                    }
                    (false, _) => {
                        let unasked = matches!(said, Err(SiteError::Unasked { id: other }) if other.0 == id);
                        prop_assert!(unasked);
                    }
                }
                match question.ended() {
                    Ok(()) => prop_assert!(open.is_empty()),
                    Err(SiteError::Unanswered { ids }) => prop_assert_eq!(ids, open.len()),
                    Err(other) => prop_assert!(false, "{}", other),
                }
            }
        }
    }
}
