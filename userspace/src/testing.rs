//! How tests wait: for what they can name, and never for ever.

use std::{fmt::Display, future::Future, net::SocketAddr, time::Duration};
use tokio::net::TcpStream;

/// What every wait of a test is bounded by: a machine that stands still for some seconds fails none.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// What `future` gives, which must be soon.
pub(crate) async fn within<T>(what: impl Display, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("never: {what}"),
    }
}

/// Ends when `holds` does, which is asked again and again.
pub(crate) async fn eventually(what: impl Display, mut holds: impl FnMut() -> bool) {
    within(what, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}

/// Ends when nobody listens at `address` any more: a child that another test forks has what is closed here open until it
/// execs.
pub(crate) async fn refused(address: SocketAddr) {
    within(format!("nobody listens at {address}"), async {
        while TcpStream::connect(address).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await;
}
