//! For how long a peer that proved itself in a handshake is believed: until the certificate it showed expires, or until a
//! changed trust bundle no longer vouches for it. Not here: the check itself (`verify`) and what then ends (`hbone`).

use super::{
    bundle::{Trust, unix_time},
    verify::{PeerRejected, verify_peer},
};
use rustls_pki_types::{CertificateDer, UnixTime};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tokio::{sync::watch, time::sleep};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

/// The wall clock may jump while we sleep: look at it at least so often.
const LONGEST_SLEEP: Duration = Duration::from_secs(600);

/// Why a peer that was believed is believed no longer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Distrust {
    #[error("the certificate that the peer showed has expired")]
    Expired,
    #[error("the trust bundle changed, and now the peer is refused: {0}")]
    Rejected(PeerRejected),
}

/// What a peer showed in its handshake, which accepted it.
#[derive(Debug, Clone)]
pub struct Proof {
    chain: Vec<CertificateDer<'static>>,
    not_after: SystemTime,
}

impl Proof {
    /// `None` for a chain without a readable leaf, which no handshake accepts.
    pub fn of(chain: &[CertificateDer<'_>]) -> Option<Self> {
        let (_, leaf) = X509Certificate::from_der(chain.first()?).ok()?;
        let end = unix_time(leaf.validity().not_after.timestamp());
        Some(Self {
            not_after: SystemTime::UNIX_EPOCH + Duration::from_secs(end.as_secs()),
            chain: chain.iter().map(|der| der.clone().into_owned()).collect(),
        })
    }

    /// What is left of the certificate's life.
    pub fn left(&self, now: SystemTime) -> Duration {
        self.not_after.duration_since(now).unwrap_or_default()
    }
}

/// Whom the mesh trusts, now and from now on. Taken before a handshake, so that no change is missed.
#[derive(Debug, Clone)]
pub struct TrustWatch(watch::Receiver<Option<Arc<Trust>>>);

impl TrustWatch {
    pub(crate) fn new(mut trust: watch::Receiver<Option<Arc<Trust>>>) -> Self {
        trust.mark_unchanged();
        Self(trust)
    }

    /// Resolves when the peer of `proof` is no longer to be believed.
    pub async fn distrust(mut self, proof: Proof) -> Distrust {
        // A store that has ended changes nothing any more; time still passes.
        let mut changes = true;
        loop {
            let left = proof.left(SystemTime::now());
            if left.is_zero() {
                return Distrust::Expired;
            }
            tokio::select! {
                changed = self.0.changed(), if changes => match changed {
                    Ok(()) => {
                        let trust = self.0.borrow_and_update().clone();
                        let verdict = trust.map(|trust| verify_peer(&proof.chain, &trust, None, UnixTime::now()));
                        if let Some(Err(rejected)) = verdict {
                            return Distrust::Rejected(rejected);
                        }
                    }
                    Err(_) => changes = false,
                },
                () = sleep(left.min(LONGEST_SLEEP)) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Ca, leaf_params, trust};
    use super::*;
    use crate::testing::within;
    use futures::FutureExt;
    use rcgen::KeyPair;

    const ID: &str = "spiffe://cluster.local/ns/shop/sa/web";

    fn proof(ca: &Ca, life: Duration) -> Proof {
        let mut params = leaf_params(ID);
        params.not_after = (SystemTime::now() + life).into();
        Proof::of(&[ca.sign(&params, &KeyPair::generate().unwrap())]).unwrap()
    }

    #[tokio::test]
    async fn a_peer_is_believed_until_its_root_leaves_the_bundle() {
        let (old, new) = (Ca::root("old"), Ca::root("new"));
        let domains = ["cluster.local"];
        let (bundle, watch) = watch::channel(Some(trust(&[&old], &domains)));
        let watch = TrustWatch::new(watch);
        let (peer, renewed) = (
            proof(&old, Duration::from_secs(3600)),
            proof(&new, Duration::from_secs(3600)),
        );
        let mut distrust = Box::pin(watch.clone().distrust(peer));
        assert_eq!((&mut distrust).now_or_never(), None);
        bundle.send_replace(Some(trust(&[&old, &new], &domains)));
        assert_eq!((&mut distrust).now_or_never(), None, "both roots are trusted");
        let mut of_renewed = Box::pin(watch.distrust(renewed));
        bundle.send_replace(Some(trust(&[&new], &domains)));
        let why = within("distrust", distrust).await;
        assert_eq!(why, Distrust::Rejected(PeerRejected::UnknownIssuer));
        assert_eq!((&mut of_renewed).now_or_never(), None);
        drop(bundle);
        assert_eq!((&mut of_renewed).now_or_never(), None, "a store's end is no reason");
    }

    #[tokio::test]
    async fn a_peer_is_believed_until_its_certificate_expires() {
        let ca = Ca::root("root");
        let (_bundle, watch) = watch::channel(Some(trust(&[&ca], &["cluster.local"])));
        let proof = proof(&ca, Duration::from_secs(2));
        let left = proof.left(SystemTime::now());
        assert!(left > Duration::ZERO && left <= Duration::from_secs(2), "{left:?}");
        let why = within("distrust", TrustWatch::new(watch).distrust(proof)).await;
        assert_eq!(why, Distrust::Expired);
    }
}
