//! The words of a CONNECT: authority, `forwarded`, and what a peer may not ask for. Pure.

use http::{HeaderMap, HeaderValue, Method, Request, Uri, header::FORWARDED};
use std::{
    fmt::Write as _,
    net::{IpAddr, SocketAddr},
};

/// Why a request gets no tunnel. Each has the HTTP status that the peer is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum RequestRefusal {
    #[error("the method is not CONNECT")]
    NotConnect,
    #[error("the request has no authority")]
    NoAuthority,
    #[error("the authority has no valid port")]
    NoPort,
    #[error("the authority is a host name, which this workload cannot resolve")]
    HostName,
    #[error("the authority is a loopback or unspecified address")]
    Loopback,
    #[error("the authority is not the address that was dialled")]
    AnotherAddress,
    #[error("the authority names a port of the mesh itself")]
    ReservedPort,
    #[error("denied by policy")]
    Denied,
    #[error("the application refused the connection")]
    ApplicationRefused,
    #[error("the application did not answer")]
    ApplicationTimeout,
    #[error("the workload has no room for another connection")]
    Overloaded,
    #[error("the workload is going away")]
    GoingAway,
    #[error("the daemon could not reach the application")]
    Internal,
}

impl RequestRefusal {
    /// hbone.md: 400 a request that makes no sense here, 401 policy, 503 what cannot be reached.
    pub fn status(self) -> u16 {
        match self {
            Self::NotConnect | Self::NoAuthority | Self::NoPort | Self::Loopback | Self::AnotherAddress => 400,
            Self::Denied => 401,
            Self::HostName
            | Self::ReservedPort
            | Self::ApplicationRefused
            | Self::ApplicationTimeout
            | Self::Overloaded
            | Self::GoingAway
            | Self::Internal => 503,
        }
    }

    /// A stable name for counters.
    pub fn name(self) -> &'static str {
        match self {
            Self::NotConnect => "not_connect",
            Self::NoAuthority => "no_authority",
            Self::NoPort => "no_port",
            Self::HostName => "host_name",
            Self::Loopback => "loopback",
            Self::AnotherAddress => "another_address",
            Self::ReservedPort => "reserved_port",
            Self::Denied => "denied",
            Self::ApplicationRefused => "application_refused",
            Self::ApplicationTimeout => "application_timeout",
            Self::Overloaded => "overloaded",
            Self::GoingAway => "going_away",
            Self::Internal => "internal",
        }
    }
}

/// Where a request wants to go, if it is one that the pod at `dialled` serves. `reserved` are the mesh's own ports.
pub(super) fn target<B>(
    request: &Request<B>,
    dialled: IpAddr,
    reserved: impl Fn(u16) -> bool,
) -> Result<SocketAddr, RequestRefusal> {
    if request.method() != Method::CONNECT {
        return Err(RequestRefusal::NotConnect);
    }
    let authority = request.uri().authority().ok_or(RequestRefusal::NoAuthority)?;
    let text = authority.as_str();
    let Ok(address) = text.parse::<SocketAddr>() else {
        // Without a port, `10.0.0.1` is no socket address either; the port's absence is the better reason.
        return Err(match authority.port_u16() {
            None => RequestRefusal::NoPort,
            Some(_) => RequestRefusal::HostName,
        });
    };
    let ip = address.ip().to_canonical();
    if ip.is_loopback() || ip.is_unspecified() {
        return Err(RequestRefusal::Loopback);
    }
    if ip != dialled.to_canonical() {
        return Err(RequestRefusal::AnotherAddress);
    }
    if address.port() == 0 {
        return Err(RequestRefusal::NoPort);
    }
    if reserved(address.port()) {
        return Err(RequestRefusal::ReservedPort);
    }
    Ok(SocketAddr::new(ip, address.port()))
}

/// The client's port from `forwarded: for="10.77.1.11:51484"`; 0 where there is none. A hint: whatever is wrong with it
/// counts as absence. Its address is never used.
pub(super) fn forwarded_port(headers: &HeaderMap) -> u16 {
    let port = || {
        let text = headers.get(FORWARDED)?.to_str().ok()?;
        let first = text.split(',').next()?;
        let client = first
            .split(';')
            .filter_map(|pair| pair.trim().split_once('='))
            .find(|(key, _)| key.eq_ignore_ascii_case("for"))?
            .1;
        client.trim_matches('"').parse::<SocketAddr>().ok().map(|a| a.port())
    };
    port().unwrap_or(0)
}

/// The CONNECT for `authority`, or nothing if `authority` cannot be written.
pub(super) fn connect(
    authority: SocketAddr,
    client: Option<SocketAddr>,
    baggage: Option<&HeaderValue>,
) -> Option<Request<()>> {
    let mut request = Request::new(());
    *request.method_mut() = Method::CONNECT;
    let mut text = String::with_capacity(56);
    write!(text, "{authority}").ok()?;
    *request.uri_mut() = Uri::try_from(text).ok()?;
    if let Some(client) = client {
        let mut text = String::with_capacity(64);
        write!(text, "for=\"{client}\"").ok()?;
        let mut value = HeaderValue::try_from(text).ok()?;
        // Different each time: kept out of the header compression's memory, where it would push out what repeats.
        value.set_sensitive(true);
        request.headers_mut().insert(FORWARDED, value);
    }
    if let Some(baggage) = baggage {
        request.headers_mut().insert("baggage", baggage.clone());
    }
    Some(request)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    fn request(method: Method, authority: &str) -> Request<()> {
        let mut request = Request::new(());
        *request.method_mut() = method;
        if !authority.is_empty() {
            *request.uri_mut() = Uri::builder()
                .authority(authority)
                .build()
                .unwrap_or_else(|_| panic!("{authority}"));
        }
        request
    }

    #[rstest]
    #[case(Method::GET, "10.0.0.1:80", RequestRefusal::NotConnect, 400)]
    #[case(Method::CONNECT, "", RequestRefusal::NoAuthority, 400)]
    #[case(Method::CONNECT, "10.0.0.1", RequestRefusal::NoPort, 400)]
    #[case(Method::CONNECT, "10.0.0.1:0", RequestRefusal::NoPort, 400)]
    #[case(Method::CONNECT, "10.0.0.2:80", RequestRefusal::AnotherAddress, 400)]
    #[case(Method::CONNECT, "[fd00::1]:80", RequestRefusal::AnotherAddress, 400)]
    #[case(Method::CONNECT, "127.0.0.1:80", RequestRefusal::Loopback, 400)]
    #[case(Method::CONNECT, "[::1]:80", RequestRefusal::Loopback, 400)]
    #[case(Method::CONNECT, "[::ffff:127.0.0.1]:80", RequestRefusal::Loopback, 400)]
    #[case(Method::CONNECT, "0.0.0.0:80", RequestRefusal::Loopback, 400)]
    #[case(Method::CONNECT, "web.shop.svc.cluster.local:80", RequestRefusal::HostName, 503)]
    #[case(Method::CONNECT, "10.0.0.1:15008", RequestRefusal::ReservedPort, 503)]
    fn what_is_not_for_this_pod_is_refused_by_name(
        #[case] method: Method,
        #[case] authority: &str,
        #[case] refusal: RequestRefusal,
        #[case] status: u16,
    ) {
        let dialled = "10.0.0.1".parse().unwrap();
        assert_eq!(
            target(&request(method, authority), dialled, |port| port == 15008),
            Err(refusal)
        );
        assert_eq!(refusal.status(), status);
    }

    #[test]
    fn an_authority_of_the_dialled_pod_is_where_to_go() {
        for (authority, dialled) in [
            ("10.0.0.1:80", "10.0.0.1"),
            ("10.0.0.1:80", "::ffff:10.0.0.1"),
            ("[fd00::1]:80", "fd00::1"),
        ] {
            let target = target(&request(Method::CONNECT, authority), dialled.parse().unwrap(), |_| {
                false
            });
            assert_eq!(target, Ok(authority.parse().unwrap()));
        }
    }

    #[rstest]
    #[case("for=\"10.77.1.11:51484\"", 51484)]
    #[case("for=\"[fd77::1]:51484\";host=web", 51484)]
    #[case("proto=http; FOR=10.77.1.11:7", 7)]
    #[case("for=\"10.77.1.11\"", 0)]
    #[case("for=\"_hidden\"", 0)]
    #[case("for=", 0)]
    #[case(";;,,==", 0)]
    #[case("for=\"10.77.1.11:99999\"", 0)]
    fn the_port_in_forwarded_is_a_hint(#[case] text: &str, #[case] port: u16) {
        let mut headers = HeaderMap::new();
        headers.insert(FORWARDED, text.parse().unwrap());
        assert_eq!(forwarded_port(&headers), port);
    }

    #[test]
    fn our_own_connect_is_read_back() {
        let client = "10.0.0.9:4711".parse().unwrap();
        for authority in ["10.0.0.1:80", "[fd00::1]:80"] {
            let authority: SocketAddr = authority.parse().unwrap();
            let request = connect(authority, Some(client), None).unwrap();
            assert_eq!(target(&request, authority.ip(), |_| false), Ok(authority));
            assert_eq!(forwarded_port(request.headers()), 4711);
        }
    }
}
