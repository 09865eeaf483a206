//! One question to a daemon's admin port. Every wait has a deadline, and every failure says what to try next.

use crate::telemetry::dump::{Dump, Section};
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::{body::Bytes, client::conn::http1};
use hyper_util::rt::TokioIo;
use std::{fmt, io, str::FromStr, time::Duration};
use tokio::{net::TcpStream, time::timeout};

const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
const ANSWER_DEADLINE: Duration = Duration::from_secs(30);
/// A cluster of 65,536 pods is told in a third of it.
const MAX_ANSWER_BYTES: usize = 128 << 20;
const DEFAULT_PORT: u16 = 15000;

/// `http://HOST[:PORT]` of an admin port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminUrl {
    host: String,
    port: u16,
}

#[derive(Debug, thiserror::Error)]
#[error("it must be http://HOST:PORT, such as http://127.0.0.1:15000")]
pub struct AdminUrlError;

impl FromStr for AdminUrl {
    type Err = AdminUrlError;

    fn from_str(text: &str) -> Result<Self, AdminUrlError> {
        let whole = if text.contains("://") {
            text.to_owned()
        } else {
            format!("http://{text}")
        };
        let url: Uri = whole.parse().map_err(|_| AdminUrlError)?;
        let bare = matches!(url.path(), "" | "/") && url.query().is_none();
        let host = url.host().filter(|host| !host.is_empty()).ok_or(AdminUrlError)?;
        if url.scheme() != Some(&http::uri::Scheme::HTTP) || !bare || whole.contains('@') {
            return Err(AdminUrlError);
        }
        Ok(Self {
            host: host.to_owned(),
            port: url.port_u16().unwrap_or(DEFAULT_PORT),
        })
    }
}

impl fmt::Display for AdminUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}:{}", self.host, self.port)
    }
}

/// Why a daemon could not be asked.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "no daemon answers at {admin}\n  `warren node` answers there, in the network namespace of its node: run this \
         command there (in Kubernetes: kubectl exec into the node's warren pod), or name another place with --admin"
    )]
    NobodyThere { admin: AdminUrl, source: io::Error },
    #[error("cannot connect to {admin}")]
    Connect { admin: AdminUrl, source: io::Error },
    #[error("{admin} does not answer in time; something else may listen there")]
    Silent { admin: AdminUrl },
    #[error("what listens at {admin} does not speak HTTP as a daemon of Warren does")]
    Http {
        admin: AdminUrl,
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    #[error("{admin} answered {status}: {text}")]
    Status {
        admin: AdminUrl,
        status: StatusCode,
        text: String,
    },
    #[error("the answer of {admin} is not understood; daemon and command may be of different versions")]
    Form { admin: AdminUrl, source: serde_json::Error },
}

/// One section of the daemon's state.
///
/// # Errors
/// Named in [`ClientError`].
pub(super) async fn dump(admin: &AdminUrl, section: Section) -> Result<Dump, ClientError> {
    let host = admin.host.trim_start_matches('[').trim_end_matches(']');
    let stream = match timeout(CONNECT_DEADLINE, TcpStream::connect((host, admin.port))).await {
        Err(_) => return Err(ClientError::Silent { admin: admin.clone() }),
        Ok(Err(source)) if source.kind() == io::ErrorKind::ConnectionRefused => {
            return Err(ClientError::NobodyThere {
                admin: admin.clone(),
                source,
            });
        }
        Ok(Err(source)) => {
            return Err(ClientError::Connect {
                admin: admin.clone(),
                source,
            });
        }
        Ok(Ok(stream)) => stream,
    };
    match timeout(ANSWER_DEADLINE, ask(admin, stream, section)).await {
        Ok(answer) => answer,
        Err(_) => Err(ClientError::Silent { admin: admin.clone() }),
    }
}

async fn ask(admin: &AdminUrl, stream: TcpStream, section: Section) -> Result<Dump, ClientError> {
    let wrong = |source| ClientError::Http {
        admin: admin.clone(),
        source,
    };
    let request = Request::builder()
        .method(Method::GET)
        .uri(format!("/config_dump?section={}", section.name()))
        .header(header::HOST, format!("{}:{}", admin.host, admin.port))
        .body(Empty::<Bytes>::new())
        .map_err(|e| wrong(e.into()))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| wrong(e.into()))?;
    let answer = async {
        let response = sender.send_request(request).await.map_err(|e| wrong(e.into()))?;
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_ANSWER_BYTES)
            .collect()
            .await
            .map_err(&wrong)?
            .to_bytes();
        if status != StatusCode::OK {
            let text = String::from_utf8_lossy(&body[..body.len().min(500)]).trim().to_owned();
            return Err(ClientError::Status {
                admin: admin.clone(),
                status,
                text,
            });
        }
        serde_json::from_slice(&body).map_err(|source| ClientError::Form {
            admin: admin.clone(),
            source,
        })
    };
    // The connection moves the bytes of the answer; the answer says whether it went well.
    let (answer, _) = tokio::join!(answer, connection);
    answer
}
