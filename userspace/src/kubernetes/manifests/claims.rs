//! Who defines which object: a directory may define one twice, and the first legible word counts.

use crate::kubernetes::{
    objects::ObjectRef,
    problem::{Finding, Flaw, Origin, Problem},
};
use serde_json::Value;
use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    path::PathBuf,
    sync::Arc,
};

/// Where a file says something: the file, the document in it (from 1), the object in that.
pub(super) type Place = (Arc<PathBuf>, usize, usize);

#[derive(Debug)]
pub(super) struct Claim {
    pub(super) line: usize,
    /// `None` for a policy that cannot be read.
    pub(super) value: Option<Arc<Value>>,
}

#[derive(Debug, Default)]
pub(super) struct Claims {
    by_object: HashMap<ObjectRef, BTreeMap<Place, Claim>>,
    /// Files that vanished and whose objects stay a little longer: everyone else's word comes before theirs.
    going: BTreeSet<Arc<PathBuf>>,
}

impl Claims {
    pub(super) fn add(&mut self, object: ObjectRef, place: Place, claim: Claim) {
        self.by_object.entry(object).or_default().insert(place, claim);
    }

    pub(super) fn remove(&mut self, object: &ObjectRef, place: &Place) {
        if let Some(claims) = self.by_object.get_mut(object) {
            claims.remove(place);
            if claims.is_empty() {
                self.by_object.remove(object);
            }
        }
    }

    pub(super) fn set_going(&mut self, file: &Arc<PathBuf>, is_going: bool) {
        if is_going {
            self.going.insert(Arc::clone(file));
        } else {
            self.going.remove(file);
        }
    }

    /// Where the object that counts is defined, and what it says.
    pub(super) fn winner(&self, object: &ObjectRef) -> Option<(Origin, Option<Arc<Value>>)> {
        let (place, claim) = self
            .by_object
            .get(object)?
            .iter()
            .min_by_key(|claim| self.rank(claim))?;
        Some((origin(place, claim), claim.value.clone()))
    }

    /// Everyone else who defines the object.
    pub(super) fn losers(&self, object: &ObjectRef) -> Vec<Problem> {
        let Some((winner, _)) = self.winner(object) else {
            return Vec::new();
        };
        let claims = self.by_object.get(object).into_iter().flatten();
        let others = claims.filter(|(place, _)| !self.going.contains(&place.0));
        let others = others
            .map(|(place, claim)| origin(place, claim))
            .filter(|origin| *origin != winner);
        others
            .map(|origin| Problem {
                origin: Some(origin),
                object: Some(object.clone()),
                finding: Finding::new(
                    "",
                    Flaw::DefinedTwice {
                        other: winner.file.display().to_string(),
                    },
                ),
            })
            .collect()
    }

    fn rank(&self, (place, claim): &(&Place, &Claim)) -> (bool, bool) {
        (claim.value.is_none(), self.going.contains(&place.0))
    }
}

fn origin(place: &Place, claim: &Claim) -> Origin {
    Origin {
        file: Arc::clone(&place.0),
        document: place.1,
        line: Some(claim.line),
    }
}
