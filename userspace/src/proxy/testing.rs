//! Two captured pods as network namespaces joined by a veth pair, each served by a proxy of its own. Steering is done by
//! ip rules instead of kernel programs: what is dialled from the client's pod to the server's turns round on `lo`.

use super::*;
use crate::{
    certs::CertStore,
    hbone::testing::{Authority, spiffe},
    mesh::{
        MeshSnapshot, Workload, WorkloadUid, fixtures,
        policy::{Authorization, PeerAuth},
    },
    net::{Namespace, PodListeners, PodPorts, testing::ip},
    shutdown::Shutdown,
    telemetry::{Metrics, Place},
    testing::{eventually, within},
};
use nix::sched::{CloneFlags, unshare};
use std::{
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    sync::Arc,
};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    sync::watch,
};

pub(super) const CLIENT: &str = "10.9.0.1";
pub(super) const SERVER: &str = "10.9.0.2";
/// What the server's applications may listen on: dialled from the client's pod these ports are steered.
pub(super) const PORTS: [u16; 2] = [7001, 7002];
/// Not steered: what is dialled here arrives as plaintext.
pub(super) const PLAINTEXT_PORT: u16 = 7003;

pub(super) struct TwoNodes {
    pub(super) client: Namespace,
    pub(super) server: Namespace,
    pub(super) snapshot: watch::Sender<Arc<MeshSnapshot>>,
    pub(super) client_side: Arc<ProxyContext>,
    pub(super) server_side: Arc<ProxyContext>,
    pub(super) server_tasks: Shutdown,
    pub(super) handles: Vec<PodHandle>,
}

/// `None`, after saying so, where the test may not make namespaces.
pub(super) async fn two_nodes(test: &str) -> Option<TwoNodes> {
    two_nodes_with(test, ProxySettings::default()).await
}

pub(super) async fn two_nodes_with(test: &str, settings: ProxySettings) -> Option<TwoNodes> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("SKIPPED {test}: network namespaces need root");
        return None;
    }
    let (client, server) = (new_namespace(), new_namespace());
    let there = format!("/proc/{}/fd/{}", std::process::id(), server.as_fd().as_raw_fd());
    ip(
        &client,
        &format!("link add eth0 type veth peer name eth0 netns {there}"),
    );
    for (pod, address) in [(&client, CLIENT), (&server, SERVER)] {
        ip(pod, "link set lo up");
        ip(pod, "link set eth0 up");
        ip(pod, &format!("addr add {address}/24 dev eth0"));
        ip(pod, &format!("route add local default dev lo src {address} table 100"));
        ip(pod, "rule add pref 2 fwmark 0x112 lookup 100");
        pod.run(|| {
            std::fs::write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1").unwrap();
            std::fs::write("/proc/sys/net/ipv4/fwmark_reflect", "1").unwrap();
        })
        .unwrap();
    }
    for port in PORTS {
        ip(
            &client,
            &format!("rule add pref 1 to {SERVER} ipproto tcp dport {port} fwmark 0/0xfff lookup 100"),
        );
    }
    let mut mesh = MeshSnapshot {
        root_namespace: "istio-system".into(),
        version: 1,
        ..MeshSnapshot::default()
    };
    for (name, address) in [("client", CLIENT), ("server", SERVER)] {
        let workload = Arc::new(workload(name, address));
        mesh.by_address.insert(workload.addresses[0], workload.uid.clone());
        mesh.set_workload(workload);
    }
    let (snapshot, receiver) = watch::channel(Arc::new(mesh));
    let authority = Authority::new();
    let context = |name: &str| {
        let svid = Arc::into_inner(authority.svid(&spiffe(name))).unwrap();
        Arc::new(ProxyContext {
            snapshot: receiver.clone(),
            certs: CertStore::fixed([svid]),
            metrics: Metrics::new(Place::default()),
            connections: Connections::default(),
            settings: settings.clone(),
        })
    };
    let (client_side, server_side) = (context("client"), context("server"));
    let (client_tasks, server_tasks) = (Shutdown::new(), Shutdown::new());
    let parts = |name: &str, namespace: &Namespace, listeners: PodListeners| CapturedPodParts {
        workload: WorkloadUid(name.into()),
        namespace: namespace.clone(),
        listeners,
    };
    let ports = PodPorts {
        outbound: 15001,
        plaintext: 15006,
        hbone: 15008,
    };
    let none = || PodListeners {
        outbound: vec![],
        plaintext: vec![],
        hbone: vec![],
        ports,
        moved: vec![],
    };
    let outbound = PORTS
        .map(|port| transparent(&client, SocketAddr::new(SERVER.parse().unwrap(), port)))
        .into();
    let hbone = vec![transparent(&server, SocketAddr::new(SERVER.parse().unwrap(), 15008))];
    let plaintext = vec![transparent(&server, "127.0.0.1:15006".parse().unwrap())];
    let handles = vec![
        spawn_pod(
            &client_side,
            parts("client", &client, PodListeners { outbound, ..none() }),
            &client_tasks,
        )
        .unwrap(),
        spawn_pod(
            &server_side,
            parts(
                "server",
                &server,
                PodListeners {
                    hbone,
                    plaintext,
                    ..none()
                },
            ),
            &server_tasks,
        )
        .unwrap(),
    ];
    Some(TwoNodes {
        client,
        server,
        snapshot,
        client_side,
        server_side,

        server_tasks,
        handles,
    })
}

fn new_namespace() -> Namespace {
    std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        Namespace::current().unwrap()
    })
    .join()
    .unwrap()
}

pub(super) fn workload(name: &str, address: &str) -> Workload {
    Workload {
        uid: WorkloadUid(name.into()),
        ..fixtures::workload("shop", name, address)
    }
}

fn transparent(namespace: &Namespace, address: SocketAddr) -> std::net::TcpListener {
    let listen = || {
        let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM.nonblocking(), None)?;
        socket.set_mark(crate::net::marks::DAEMON)?;
        socket.set_ip_transparent_v4(true)?;
        socket.set_tcp_nodelay(true)?;
        socket.set_reuse_address(true)?;
        socket.bind(&address.into())?;
        socket.listen(128)?;
        Ok::<_, std::io::Error>(socket.into())
    };
    namespace.run(listen).unwrap().unwrap()
}

impl TwoNodes {
    /// An application of the server's pod.
    pub(super) fn listen(&self, port: u16) -> TcpListener {
        let listener = self
            .server
            .run(|| std::net::TcpListener::bind((SERVER, port)))
            .unwrap()
            .unwrap();
        listener.set_nonblocking(true).unwrap();
        TcpListener::from_std(listener).unwrap()
    }

    /// An application of the client's pod dials the server's.
    pub(super) async fn dial(&self, port: u16) -> std::io::Result<TcpStream> {
        let socket = self.client.run(TcpSocket::new_v4).unwrap().unwrap();
        let connect = socket.connect(SocketAddr::new(SERVER.parse().unwrap(), port));
        within("an answer to connect", connect).await
    }

    pub(super) async fn connection(&self, listener: &TcpListener) -> (TcpStream, TcpStream) {
        let port = listener.local_addr().unwrap().port();
        let client = self.dial(port).await.unwrap();
        let (server, from) = within("a connection", listener.accept()).await.unwrap();
        assert_eq!(
            from.ip(),
            CLIENT.parse::<IpAddr>().unwrap(),
            "the application sees the client's address"
        );
        (client, server)
    }

    /// Somebody outside the mesh has dialled the server's pod, and steering has handed it to the daemon: accepted with the
    /// pod's own address and port, by a listener that is not the application's.
    pub(super) async fn dial_plaintext(&self) -> TcpStream {
        let listener = transparent(&self.server, SocketAddr::new(SERVER.parse().unwrap(), PLAINTEXT_PORT));
        let listener = TcpListener::from_std(listener).unwrap();
        let (client, accepted) = tokio::join!(self.dial(PLAINTEXT_PORT), listener.accept());
        let (socket, from) = accepted.unwrap();
        let pod = Arc::clone(&self.handles[1].pod);
        // Makes room for the application's own listener; to close it were not enough while a child that another test forks
        // has it open.
        socket2::SockRef::from(&listener)
            .shutdown(std::net::Shutdown::Read)
            .unwrap();
        drop(listener);
        self.server_tasks
            .spawn("plaintext", async move { plaintext::serve(pod, socket, from).await });
        client.unwrap()
    }

    /// From the server's own pod to one of the daemon's listeners.
    pub(super) async fn dial_own_listener(&self) -> TcpStream {
        let socket = self.server.run(TcpSocket::new_v4).unwrap().unwrap();
        socket.connect("127.0.0.1:15006".parse().unwrap()).await.unwrap()
    }

    pub(super) fn publish(&self, change: impl FnOnce(&mut MeshSnapshot)) {
        let mut mesh = (**self.snapshot.borrow()).clone();
        change(&mut mesh);
        mesh.version += 1;
        self.snapshot.send_replace(Arc::new(mesh));
    }

    pub(super) fn policy(&self, policy: Authorization) {
        self.publish(|mesh| mesh.authorizations.insert(policy));
    }

    pub(super) fn peer_auth(&self, policy: PeerAuth) {
        self.publish(|mesh| mesh.peer_auths.insert(policy));
    }

    pub(super) async fn nothing_is_open(&self) {
        eventually("every connection ended", || {
            self.client_side.connections.is_empty() && self.server_side.connections.is_empty()
        })
        .await;
    }
}
