//! When a CA may issue: not before the roots that vouch for it have reached every node. Pure: time is an argument. Not
//! here: where the CA and the trust bundle lie (`root`).

use aws_lc_rs::digest::{SHA256, digest};
use rustls_pki_types::CertificateDer;
use std::{collections::BTreeMap, time::Duration};

/// Since when each root has been in the published bundle: SHA-256 of the certificate in hexadecimal, Unix seconds.
pub(super) type Since = BTreeMap<String, u64>;

pub(super) fn fingerprint(root: &CertificateDer<'_>) -> String {
    let digest = digest(&SHA256, root);
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What is known of roots before this publication.
#[derive(Debug)]
pub(super) struct Before<'a> {
    /// What the published bundle says itself, if there is one: (fingerprint, since when, where it says so).
    pub(super) published: Option<Vec<(String, Option<u64>)>>,
    /// What this process has published.
    pub(super) own: &'a Since,
}

/// Since when the roots of the bundle that is published now have been in it. A mesh that has no bundle yet has no node
/// that could lack a root, so its first roots count as spread; so do those of a bundle that somebody else made.
pub(super) fn since(roots: impl Iterator<Item = String>, before: &Before<'_>, now: u64) -> Since {
    let published = before.published.as_deref();
    let first = published.is_none() && before.own.is_empty();
    let known = |root: &str| {
        let listed = published.and_then(|roots| roots.iter().find(|(listed, _)| listed == root));
        match (listed, before.own.get(root)) {
            (Some((_, Some(since))), _) => Some(*since),
            (_, Some(since)) => Some(*since),
            (Some((_, None)), None) => Some(0),
            (None, None) => first.then_some(0),
        }
    };
    roots
        .map(|root| (known(&root).unwrap_or(now), root))
        .map(|(since, root)| (root, since))
        .collect()
}

/// How long a CA must still wait that any of these roots vouches for; zero if it may issue.
pub(super) fn wait<'r>(
    vouching: impl Iterator<Item = &'r String>,
    since: &Since,
    spread: Duration,
    now: u64,
) -> Duration {
    let earliest = vouching.filter_map(|root| since.get(root)).min();
    // A CA without a published root would be believed by nobody.
    let Some(earliest) = earliest else { return spread };
    spread.saturating_sub(Duration::from_secs(now.saturating_sub(*earliest)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SPREAD: Duration = Duration::from_secs(300);

    fn names(roots: &[&str]) -> impl Iterator<Item = String> {
        roots
            .iter()
            .map(|root| (*root).to_owned())
            .collect::<Vec<_>>()
            .into_iter()
    }

    fn nothing(own: &Since) -> Before<'_> {
        Before { published: None, own }
    }

    fn wait_for(root: &str, since: &Since, now: u64) -> u64 {
        wait([root.to_owned()].iter(), since, SPREAD, now).as_secs()
    }

    #[test]
    fn the_first_root_of_a_mesh_issues_at_once() {
        let since = since(names(&["a"]), &nothing(&Since::new()), 1000);
        assert_eq!(wait_for("a", &since, 1000), 0);
    }

    #[test]
    fn a_root_that_comes_later_issues_after_it_has_spread() {
        let own = since(names(&["a"]), &nothing(&Since::new()), 1000);
        let published = Some(vec![("a".to_owned(), Some(0))]);
        let before = Before { published, own: &own };
        let both = since(names(&["a", "b"]), &before, 2000);
        assert_eq!((wait_for("a", &both, 2000), wait_for("b", &both, 2000)), (0, 300));
        assert_eq!((wait_for("b", &both, 2299), wait_for("b", &both, 2300)), (1, 0));
        // Whoever publishes the same again, or another controller, does not begin anew.
        let published = Some(both.iter().map(|(root, since)| (root.clone(), Some(*since))).collect());
        let other = Since::new();
        let again = since(names(&["a", "b"]), &Before { published, own: &other }, 2100);
        assert_eq!(again, both);
    }

    #[test]
    fn a_bundle_that_somebody_took_away_is_made_again_from_what_is_remembered() {
        let own = Since::from([("a".to_owned(), 0), ("b".to_owned(), 2000)]);
        let before = Before {
            published: None,
            own: &own,
        };
        assert_eq!(since(names(&["a", "b"]), &before, 2100), own);
        // With an empty one in its place a new root is still new.
        let before = Before {
            published: Some(Vec::new()),
            own: &Since::new(),
        };
        assert_eq!(
            since(names(&["b"]), &before, 2100),
            Since::from([("b".to_owned(), 2100)])
        );
    }

    #[test]
    fn a_bundle_made_by_hand_counts_as_spread() {
        let before = Before {
            published: Some(vec![("a".to_owned(), None)]),
            own: &Since::new(),
        };
        let since = since(names(&["a", "b"]), &before, 2000);
        assert_eq!((wait_for("a", &since, 2000), wait_for("b", &since, 2000)), (0, 300));
    }

    #[test]
    fn one_of_several_vouching_roots_is_enough_and_none_is_not() {
        let since = Since::from([("a".to_owned(), 0), ("b".to_owned(), 2000)]);
        let both = ["b".to_owned(), "a".to_owned()];
        assert_eq!(wait(both.iter(), &since, SPREAD, 2000), Duration::ZERO);
        assert_eq!(wait(std::iter::empty(), &since, SPREAD, 9000), SPREAD);
    }
}
