//! Listeners of a pod that another daemon opened and gives to this one: the same sockets, so nothing about them changes,
//! and both may accept from them. Not here: how they get from one process to the other (`handover`).

use super::{PodListeners, PodPorts, Role, options};
use socket2::SockRef;
use std::{io, net::TcpListener, os::fd::OwnedFd};

/// Why sockets are not the listeners of a pod.
#[derive(Debug, thiserror::Error)]
pub enum InheritError {
    #[error("a socket for {role:?} is no TCP listener")]
    NotListening { role: Role },
    #[error("a socket for {role:?} is in another network namespace than the pod")]
    Elsewhere { role: Role },
    #[error("there is no socket for {role:?}")]
    Missing { role: Role },
    #[error("the sockets for {role:?} have different ports")]
    Ports { role: Role },
    #[error("a socket for {role:?} cannot be used")]
    Socket { role: Role, source: io::Error },
}

impl PodListeners {
    /// Other descriptors of the same sockets.
    ///
    /// # Errors
    /// There are too many open.
    pub fn try_clone(&self) -> io::Result<Self> {
        let copies = |role| -> io::Result<Vec<_>> { self.of(role).iter().map(TcpListener::try_clone).collect() };
        Ok(Self {
            outbound: copies(Role::Outbound)?,
            plaintext: copies(Role::Plaintext)?,
            hbone: copies(Role::Hbone)?,
            ports: self.ports,
            moved: self.moved.clone(),
        })
    }

    /// The listeners of the pod whose namespace has this cookie, from what another daemon opened there.
    ///
    /// # Errors
    /// They are not a whole set of listeners of that pod.
    pub fn inherit(namespace: u64, sockets: impl IntoIterator<Item = (Role, OwnedFd)>) -> Result<Self, InheritError> {
        let mut listeners = Self {
            outbound: Vec::new(),
            plaintext: Vec::new(),
            hbone: Vec::new(),
            ports: PodPorts {
                outbound: 0,
                plaintext: 0,
                hbone: 0,
            },
            moved: Vec::new(),
        };
        for (role, socket) in sockets {
            let failed = |source| InheritError::Socket { role, source };
            let facts = SockRef::from(&socket);
            if !facts.is_listener().map_err(failed)?
                || facts.protocol().map_err(failed)? != Some(socket2::Protocol::TCP)
            {
                return Err(InheritError::NotListening { role });
            }
            if options::netns_cookie(&socket).map_err(failed)? != namespace {
                return Err(InheritError::Elsewhere { role });
            }
            facts.set_nonblocking(true).map_err(failed)?;
            let of_role = match role {
                Role::Outbound => &mut listeners.outbound,
                Role::Plaintext => &mut listeners.plaintext,
                Role::Hbone => &mut listeners.hbone,
            };
            of_role.push(TcpListener::from(socket));
        }
        listeners.ports = PodPorts {
            outbound: port(Role::Outbound, &listeners.outbound)?,
            plaintext: port(Role::Plaintext, &listeners.plaintext)?,
            hbone: port(Role::Hbone, &listeners.hbone)?,
        };
        Ok(listeners)
    }
}

/// The one port that all sockets of a role have.
fn port(role: Role, sockets: &[TcpListener]) -> Result<u16, InheritError> {
    let mut found = None;
    for socket in sockets {
        let address = socket
            .local_addr()
            .map_err(|source| InheritError::Socket { role, source })?;
        if found.is_some_and(|port| port != address.port()) {
            return Err(InheritError::Ports { role });
        }
        found = Some(address.port());
    }
    found.ok_or(InheritError::Missing { role })
}

#[cfg(test)]
mod tests {
    use super::{super::testing::pod_namespace, *};
    use crate::net::{self, Namespace};
    use std::net::{TcpStream, UdpSocket};

    fn sockets(listeners: PodListeners) -> Vec<(Role, OwnedFd)> {
        let of = |role, sockets: Vec<TcpListener>| sockets.into_iter().map(move |socket| (role, OwnedFd::from(socket)));
        of(Role::Outbound, listeners.outbound)
            .chain(of(Role::Plaintext, listeners.plaintext))
            .chain(of(Role::Hbone, listeners.hbone))
            .collect()
    }

    fn error(pod: &Namespace, sockets: Vec<(Role, OwnedFd)>) -> String {
        PodListeners::inherit(pod.cookie(), sockets).unwrap_err().to_string()
    }

    #[test]
    fn a_listener_outlives_the_one_who_opened_it_with_its_identity_and_whoever_waits() {
        let Some(pod) = pod_namespace("inherit-all") else {
            return;
        };
        let first = net::listen(&pod).unwrap();
        let cookie = |listeners: &PodListeners| SockRef::from(&listeners.outbound[0]).cookie().unwrap();
        let before = cookie(&first);
        let address = first.outbound[0].local_addr().unwrap();
        let copy = first.try_clone().unwrap();
        // Not accepted by anybody yet.
        let _waiting = pod.run(|| TcpStream::connect(address).unwrap()).unwrap();
        drop(first);
        let inherited = PodListeners::inherit(pod.cookie(), sockets(copy)).unwrap();
        assert_eq!(cookie(&inherited), before);
        assert_eq!(inherited.ports.outbound, address.port());
        assert!(inherited.outbound[0].accept().is_ok());
    }

    #[test]
    fn what_is_no_set_of_listeners_of_the_pod_is_refused_by_name() {
        let (Some(pod), Some(other)) = (pod_namespace("inherit-a"), pod_namespace("inherit-b")) else {
            return;
        };
        let mut foreign = sockets(net::listen(&pod).unwrap());
        let of_another = pod_socket(&other, || TcpListener::bind("127.0.0.1:0").unwrap().into());
        foreign.push((Role::Hbone, of_another));
        assert_eq!(
            error(&pod, foreign),
            "a socket for Hbone is in another network namespace than the pod"
        );

        let incomplete: Vec<_> = sockets(net::listen(&pod).unwrap())
            .into_iter()
            .filter(|(role, _)| *role != Role::Plaintext)
            .collect();
        assert_eq!(error(&pod, incomplete), "there is no socket for Plaintext");

        let mut mixed = sockets(net::listen(&pod).unwrap());
        mixed.push((
            Role::Outbound,
            pod_socket(&pod, || TcpListener::bind("127.0.0.1:0").unwrap().into()),
        ));
        assert_eq!(error(&pod, mixed), "the sockets for Outbound have different ports");

        let udp = pod_socket(&pod, || UdpSocket::bind("127.0.0.1:0").unwrap().into());
        assert_eq!(
            error(&pod, vec![(Role::Hbone, udp)]),
            "a socket for Hbone is no TCP listener"
        );
    }

    fn pod_socket(pod: &Namespace, open: impl FnOnce() -> OwnedFd) -> OwnedFd {
        pod.run(open).unwrap()
    }
}
