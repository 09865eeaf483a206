//! Identity on the wire: certificates that prove who a workload is, how peers are checked, where certificates come from,
//! and the embedded CA that signs them. Not here: the names themselves (`mesh::identity`) and the CA's service
//! (`controller`).

pub mod authority;
pub mod belief;
pub mod bundle;
pub mod channel;
pub mod issuer;
mod keeper;
pub mod key;
mod names;
pub mod rotation;
pub mod store;
pub mod svid;
pub mod tls;
pub mod verify;

#[cfg(test)]
mod channel_tests;
#[cfg(test)]
mod counting_ca;
#[cfg(test)]
mod peer_table;
#[cfg(test)]
mod store_tests;
#[cfg(test)]
pub(crate) mod testing;

pub use authority::Authority;
pub use belief::{Distrust, Proof, TrustWatch};
pub use bundle::{Trust, TrustBundle};
pub use store::{CertError, CertStore, CertificateSummary};
pub use svid::Svid;
pub use verify::{PeerRejected, peer_id, verify_peer};

use std::{io, path::Path};
use tokio::io::AsyncReadExt;

/// A whole file of at most `most` bytes.
pub(crate) async fn read_bounded(path: &Path, most: usize) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    tokio::fs::File::open(path)
        .await?
        .take(most as u64 + 1)
        .read_to_end(&mut text)
        .await?;
    if text.len() > most {
        return Err(io::Error::new(
            io::ErrorKind::FileTooLarge,
            format!("more than {most} bytes"),
        ));
    }
    Ok(text)
}

/// The CA's gRPC call, generated from `proto/istio_ca.proto`.
pub mod proto {
    #![allow(
        clippy::all,
        unreachable_pub,
        clippy::allow_attributes_without_reason,
        reason = "generated code"
    )]
    tonic::include_proto!("istio.v1.auth");
}
