//! Host names become addresses as in a container: by /etc/hosts and /etc/resolv.conf with its search list and ndots, in a
//! binary that brings no libc's resolver. Both files are read for each look-up, so nothing outlives a change.

use hickory_resolver::{
    TokioResolver,
    config::{ResolverConfig, ResolverOpts},
    net::{NetError, runtime::TokioRuntimeProvider},
    system_conf,
};
use std::{
    io,
    net::{IpAddr, SocketAddr},
};

/// The addresses of `host`, IPv4 and IPv6.
///
/// # Errors
/// There is no usable configuration, no name server answers, or there is no such name.
pub(super) async fn resolve(host: &str, port: u16) -> io::Result<Vec<SocketAddr>> {
    if let Ok(address) = host.parse::<IpAddr>() {
        return Ok(vec![SocketAddr::new(address, port)]);
    }
    let (config, options) = system_conf::read_system_conf().map_err(into_io)?;
    resolve_by(config, options, host, port).await
}

async fn resolve_by(
    config: ResolverConfig,
    mut options: ResolverOpts,
    host: &str,
    port: u16,
) -> io::Result<Vec<SocketAddr>> {
    // Asked once and forgotten.
    options.cache_size = 0;
    let mut builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
    *builder.options_mut() = options;
    let resolver = builder.build().map_err(into_io)?;
    let found = resolver.lookup_ip(host).await.map_err(into_io)?;
    let addresses: Vec<_> = found.iter().map(|address| SocketAddr::new(address, port)).collect();
    if addresses.is_empty() {
        return Err(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
    }
    Ok(addresses)
}

fn into_io(error: NetError) -> io::Error {
    io::Error::other(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{net::Ipv4Addr, sync::Arc};
    use tokio::{net::UdpSocket, sync::Mutex};

    /// A name server that knows one name, and the names it was asked for.
    struct Server {
        port: u16,
        asked: Arc<Mutex<Vec<String>>>,
        task: tokio::task::JoinHandle<()>,
    }

    impl Drop for Server {
        fn drop(&mut self) {
            self.task.abort();
        }
    }

    /// The question's name, and where it ends.
    fn question(message: &[u8]) -> (String, usize) {
        let (mut at, mut labels) = (12, Vec::new());
        while message[at] != 0 {
            let length = usize::from(message[at]);
            labels.push(String::from_utf8(message[at + 1..=at + length].to_vec()).unwrap());
            at += length + 1;
        }
        (labels.join(".").to_lowercase(), at + 5)
    }

    impl Server {
        async fn knowing(known: &'static str, address: Ipv4Addr) -> Self {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let port = socket.local_addr().unwrap().port();
            let asked = Arc::<Mutex<Vec<String>>>::default();
            let log = Arc::clone(&asked);
            let task = tokio::spawn(async move {
                let mut buffer = [0; 512];
                loop {
                    let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
                    let message = &buffer[..length];
                    let (name, end) = question(message);
                    let is_a = message[end - 4..end - 2] == [0, 1];
                    let hit = name == known;
                    // Response, recursion available; NXDOMAIN for all but the one name.
                    let mut answer = vec![message[0], message[1], 0x81, if hit { 0x80 } else { 0x83 }, 0, 1];
                    answer.extend([0, u8::from(hit && is_a), 0, 0, 0, 0]);
                    answer.extend(&message[12..end]);
                    if hit && is_a {
                        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 5, 0, 4]);
                        answer.extend(address.octets());
                    }
                    log.lock().await.push(name);
                    socket.send_to(&answer, from).await.unwrap();
                }
            });
            Self { port, asked, task }
        }

        /// What a pod's resolv.conf says, with this server in it.
        async fn resolve(&self, host: &str) -> io::Result<Vec<SocketAddr>> {
            let text = "search warren-system.svc.cluster.local svc.cluster.local cluster.local\n\
                        nameserver 127.0.0.1\noptions ndots:5\n";
            let (config, options) = system_conf::parse_resolv_conf(text).unwrap();
            let mut servers = config.name_servers().to_vec();
            for connection in servers.iter_mut().flat_map(|server| &mut server.connections) {
                connection.port = self.port;
            }
            let config = ResolverConfig::from_parts(None, config.search().to_vec(), servers);
            resolve_by(config, options, host, 15012).await
        }
    }

    #[tokio::test]
    async fn a_services_short_name_is_found_through_the_search_list() {
        let address = Ipv4Addr::new(10, 96, 0, 7);
        let server = Server::knowing("warren-controller.warren-system.svc.cluster.local", address).await;
        let expected = vec![SocketAddr::new(address.into(), 15012)];
        for host in [
            "warren-controller",
            "warren-controller.warren-system.svc",
            "warren-controller.warren-system.svc.cluster.local",
            "warren-controller.warren-system.svc.cluster.local.",
        ] {
            assert_eq!(server.resolve(host).await.unwrap(), expected, "{host}");
        }
        let asked = server.asked.lock().await;
        assert!(
            asked.contains(&"warren-controller.warren-system.svc.warren-system.svc.cluster.local".to_owned()),
            "below five dots the search list comes first: {asked:?}"
        );
    }

    #[tokio::test]
    async fn a_name_that_nobody_knows_is_an_error_and_an_address_needs_no_server() {
        let server = Server::knowing("other.example", Ipv4Addr::LOCALHOST).await;
        assert!(server.resolve("warren-controller").await.is_err());
        let literal = resolve("fd77::1", 443).await.unwrap();
        assert_eq!(literal, ["[fd77::1]:443".parse().unwrap()]);
    }
}
