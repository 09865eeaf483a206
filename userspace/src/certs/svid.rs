//! A workload's certificate ready for use: the key, the chain, and the TLS configurations made from them. Not here: how
//! it was obtained (`issuer`) and for how long it is kept (`store`).

use super::{
    bundle::{Trust, unix_time},
    tls::{self, ALPN, ClientVerifier, ServerVerifier},
};
use crate::mesh::SpiffeId;
use parking_lot::Mutex;
use rustls::{
    ClientConfig, ServerConfig,
    client::{ResolvesClientCert, Resumption},
    server::{NoServerSessionStorage, ResolvesServerCert},
    sign::{CertifiedKey, SigningKey, SingleCertAndKey},
    version::TLS13,
};
use rustls_pki_types::CertificateDer;
use std::{
    collections::HashMap,
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};
use x509_parser::{certificate::X509Certificate, prelude::FromDer};

/// Distinct peers for which a client configuration is kept; beyond it the cache starts anew.
const MAX_CLIENT_CONFIGS: usize = 1024;

/// An X.509-SVID with its private key and the trust bundle of its time. Ask the store anew for each connection: after a
/// renewal or a new bundle the store gives another one, and the configurations of this one stay what they were.
pub struct Svid {
    id: SpiffeId,
    certified: Arc<CertifiedKey>,
    trust: Arc<Trust>,
    serial: String,
    not_before: SystemTime,
    not_after: SystemTime,
    server: Arc<ServerConfig>,
    client: ClientConfig,
    clients: Mutex<HashMap<SpiffeId, Arc<ClientConfig>>>,
}

/// Why a chain and a key make no SVID.
#[derive(Debug, thiserror::Error)]
pub enum SvidError {
    #[error("the chain is empty")]
    Empty,
    #[error("the leaf certificate cannot be read")]
    Malformed,
    #[error("the certificate is for another key")]
    WrongKey(#[source] rustls::Error),
    #[error("TLS cannot be configured")]
    Tls(#[source] rustls::Error),
}

impl Svid {
    /// `chain` is leaf first and goes on the wire as it is; whether peers will believe it is the caller's to check.
    ///
    /// # Errors
    /// No leaf, one that cannot be read or belongs to another key, or no usable TLS provider.
    pub fn new(
        id: SpiffeId,
        chain: Vec<CertificateDer<'static>>,
        key: Arc<dyn SigningKey>,
        trust: Arc<Trust>,
    ) -> Result<Self, SvidError> {
        let leaf = chain.first().ok_or(SvidError::Empty)?;
        let (_, parsed) = X509Certificate::from_der(leaf).map_err(|_| SvidError::Malformed)?;
        let serial = parsed.raw_serial_as_string();
        let (not_before, not_after) = {
            let validity = parsed.validity();
            (
                system_time(validity.not_before.timestamp()),
                system_time(validity.not_after.timestamp()),
            )
        };
        let certified = Arc::new(CertifiedKey::new(chain, key));
        certified.keys_match().map_err(SvidError::WrongKey)?;
        Self::assemble(id, certified, trust, serial, not_before, not_after)
    }

    /// The same certificate under another trust bundle.
    ///
    /// # Errors
    /// No usable TLS provider.
    pub fn under(&self, trust: Arc<Trust>) -> Result<Self, SvidError> {
        let (id, certified, serial) = (self.id.clone(), self.certified.clone(), self.serial.clone());
        Self::assemble(id, certified, trust, serial, self.not_before, self.not_after)
    }

    fn assemble(
        id: SpiffeId,
        certified: Arc<CertifiedKey>,
        trust: Arc<Trust>,
        serial: String,
        not_before: SystemTime,
        not_after: SystemTime,
    ) -> Result<Self, SvidError> {
        let resolver = Arc::new(SingleCertAndKey::from(certified.clone()));
        let server = Arc::new(server_config(trust.clone(), resolver.clone()).map_err(SvidError::Tls)?);
        let client = client_config(trust.clone(), id.clone(), resolver).map_err(SvidError::Tls)?;
        let clients = Mutex::default();
        Ok(Self {
            id,
            certified,
            trust,
            serial,
            not_before,
            not_after,
            server,
            client,
            clients,
        })
    }

    pub fn id(&self) -> &SpiffeId {
        &self.id
    }

    /// The chain as it goes on the wire: leaf, then intermediates.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.certified.cert
    }

    pub fn trust(&self) -> &Arc<Trust> {
        &self.trust
    }

    /// The leaf's serial number, colon-separated hexadecimal.
    pub fn serial(&self) -> &str {
        &self.serial
    }

    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// For connections that were dialled to this identity's workload.
    pub fn server_config(&self) -> Arc<ServerConfig> {
        self.server.clone()
    }

    /// For connections from this identity to a peer that must prove to be `expected`.
    pub fn client_config(&self, expected: &SpiffeId) -> Arc<ClientConfig> {
        let mut clients = self.clients.lock();
        if let Some(config) = clients.get(expected) {
            return config.clone();
        }
        if clients.len() >= MAX_CLIENT_CONFIGS {
            clients.clear();
        }
        let mut config = self.client.clone();
        let verifier = ServerVerifier {
            trust: self.trust.clone(),
            expected: expected.clone(),
        };
        config.dangerous().set_certificate_verifier(Arc::new(verifier));
        let config = Arc::new(config);
        clients.insert(expected.clone(), config.clone());
        config
    }
}

impl fmt::Debug for Svid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Svid")
            .field("id", &self.id)
            .field("serial", &self.serial)
            .finish_non_exhaustive()
    }
}

fn server_config(trust: Arc<Trust>, resolver: Arc<dyn ResolvesServerCert>) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(ClientVerifier { trust }))
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    Ok(config)
}

fn client_config(
    trust: Arc<Trust>,
    expected: SpiffeId,
    resolver: Arc<dyn ResolvesClientCert>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(tls::provider())
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ServerVerifier { trust, expected }))
        .with_client_cert_resolver(resolver);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_sni = false;
    Ok(config)
}

fn system_time(seconds: i64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(unix_time(seconds).as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::testing::{self, Ca, careless_client, careless_server, certified, handshake, leaf_params};
    use super::*;
    use rcgen::KeyPair;
    use rustls::{CipherSuite, Error, HandshakeKind, NamedGroup, ProtocolVersion, server::Acceptor};

    const ID: &str = "spiffe://cluster.local/ns/shop/sa/web";

    fn svid() -> Svid {
        let (root, key) = (Ca::root("root"), KeyPair::generate().unwrap());
        let chain = vec![root.sign(&leaf_params(ID), &key)];
        let trust = testing::trust(&[&root], &["cluster.local"]);
        Svid::new(
            SpiffeId::parse(ID).unwrap(),
            chain.clone(),
            certified(chain, &key).key.clone(),
            trust,
        )
        .unwrap()
    }

    #[test]
    fn two_daemons_agree_on_tls_1_3_aes_256_and_a_post_quantum_group() {
        let svid = svid();
        let (client, server) = handshake(svid.client_config(svid.id()), svid.server_config());
        let (client, server) = (client.unwrap(), server.unwrap());
        assert_eq!(server.protocol_version(), Some(ProtocolVersion::TLSv1_3));
        assert_eq!(server.alpn_protocol(), Some(ALPN));
        let suite = server.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(suite, CipherSuite::TLS13_AES_256_GCM_SHA384);
        let group = client.negotiated_key_exchange_group().unwrap().name();
        assert_eq!(group, NamedGroup::X25519MLKEM768);
    }

    #[test]
    fn the_server_follows_the_clients_order_of_suites() {
        let svid = svid();
        let mut client = careless_client(Some(svid.certified.clone()));
        let mut provider = (**client.crypto_provider()).clone();
        provider.cipher_suites.reverse();
        let key = svid.certified.clone();
        client = rustls::ClientConfig::builder_with_provider(Arc::new(provider))
            .with_protocol_versions(&[&TLS13])
            .unwrap()
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(ServerVerifier {
                trust: svid.trust.clone(),
                expected: svid.id.clone(),
            }))
            .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(key)));
        let (_, server) = handshake(Arc::new(client), svid.server_config());
        let suite = server.unwrap().negotiated_cipher_suite().unwrap().suite();
        assert_eq!(suite, CipherSuite::TLS13_AES_128_GCM_SHA256);
    }

    #[test]
    fn every_handshake_is_a_full_one_even_with_a_peer_that_would_resume() {
        let svid = svid();
        let (client, server) = (svid.client_config(svid.id()), svid.server_config());
        let resuming_client = Arc::new(careless_client(Some(svid.certified.clone())));
        let resuming_server = Arc::new(careless_server(svid.certified.clone()));
        for (client, server) in [
            (client.clone(), server.clone()),
            (resuming_client, server),
            (client, resuming_server),
        ] {
            for _ in 0..3 {
                let (client, server) = handshake(client.clone(), server.clone());
                assert_eq!(client.unwrap().handshake_kind(), Some(HandshakeKind::Full));
                assert_eq!(server.unwrap().handshake_kind(), Some(HandshakeKind::Full));
            }
        }
        let resuming_client = Arc::new(careless_client(Some(svid.certified.clone())));
        let (client, _) = handshake(resuming_client, svid.server_config());
        assert_eq!(client.unwrap().tls13_tickets_received(), 0);
    }

    #[test]
    fn a_peer_without_alpn_is_accepted_and_one_with_another_refused() {
        let svid = svid();
        for (alpn, accepted) in [
            (vec![], true),
            (vec![b"http/1.1".to_vec()], false),
            (vec![ALPN.to_vec()], true),
        ] {
            let mut client = careless_client(Some(svid.certified.clone()));
            client.alpn_protocols = alpn.clone();
            let (_, server) = handshake(Arc::new(client), svid.server_config());
            assert_eq!(server.is_ok(), accepted, "client {alpn:?}: {server:?}");
            if let Err(error) = server {
                assert_eq!(error, Error::NoApplicationProtocol);
            }
            let mut server = careless_server(svid.certified.clone());
            server.alpn_protocols = alpn.clone();
            let (client, _) = handshake(svid.client_config(svid.id()), Arc::new(server));
            assert_eq!(client.is_ok(), accepted, "server {alpn:?}: {client:?}");
        }
    }

    #[test]
    fn tls_1_2_is_refused_from_both_sides() {
        let svid = svid();
        let old = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut client = rustls::ClientConfig::builder_with_provider(old)
            .with_protocol_versions(&[&rustls::version::TLS12])
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        client.alpn_protocols = vec![ALPN.to_vec()];
        let (_, server) = handshake(Arc::new(client), svid.server_config());
        assert!(matches!(server, Err(Error::PeerIncompatible(_))), "{server:?}");
    }

    #[test]
    fn the_client_names_no_server_in_its_hello() {
        let svid = svid();
        let name = rustls_pki_types::ServerName::try_from("pod.example").unwrap();
        let mut client = rustls::ClientConnection::new(svid.client_config(svid.id()), name).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        let mut acceptor = Acceptor::default();
        acceptor.read_tls(&mut hello.as_slice()).unwrap();
        let accepted = acceptor.accept().map_err(|(error, _)| error).unwrap().unwrap();
        assert_eq!(accepted.client_hello().server_name(), None);
        assert_eq!(accepted.client_hello().alpn().unwrap().collect::<Vec<_>>(), [ALPN]);
    }

    #[test]
    fn configurations_are_made_once_and_their_number_is_bounded() {
        let svid = svid();
        assert!(Arc::ptr_eq(&svid.server_config(), &svid.server_config()));
        assert!(Arc::ptr_eq(
            &svid.client_config(svid.id()),
            &svid.client_config(svid.id())
        ));
        for n in 0..2 * MAX_CLIENT_CONFIGS {
            svid.client_config(&SpiffeId::parse(&format!("spiffe://cluster.local/ns/shop/sa/{n}")).unwrap());
        }
        assert!(svid.clients.lock().len() <= MAX_CLIENT_CONFIGS);
    }

    #[test]
    fn a_certificate_for_another_key_makes_no_svid() {
        let svid = svid();
        let other = KeyPair::generate().unwrap();
        let key = certified(vec![], &other).key.clone();
        let result = Svid::new(svid.id.clone(), svid.chain().to_vec(), key, svid.trust.clone());
        assert!(matches!(result, Err(SvidError::WrongKey(_))));
        let none = Svid::new(svid.id.clone(), vec![], svid.certified.key.clone(), svid.trust.clone());
        assert!(matches!(none, Err(SvidError::Empty)));
    }
}
