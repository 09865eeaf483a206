//! Who must speak mutual TLS, and at which port.

use super::*;
use std::time::{Duration, SystemTime};

fn peer_auth(namespace: &str, name: &str, mode: Option<MutualTls>) -> PeerAuth {
    PeerAuth::of_namespace(namespace.into(), name.into(), mode)
}

fn of_web(policy: PeerAuth) -> PeerAuth {
    PeerAuth {
        scope: Scope::Selector(BTreeMap::from([("app".to_owned(), "web".to_owned())])),
        ..policy
    }
}

fn mode_with(policies: impl IntoIterator<Item = PeerAuth>) -> MutualTls {
    let mut mesh = with([]);
    policies.into_iter().for_each(|policy| mesh.peer_auths.insert(policy));
    mutual_tls(&mesh, &web(), 8080)
}

const STRICT: Option<MutualTls> = Some(MutualTls::Strict);

const PERMISSIVE: Option<MutualTls> = Some(MutualTls::Permissive);

#[test]
fn the_nearest_peer_authentication_wins_and_unset_asks_the_next() {
    assert_eq!(mode_with([]), MutualTls::Permissive);
    let mesh = || peer_auth("istio-system", "default", STRICT);
    assert_eq!(mode_with([mesh()]), MutualTls::Strict);
    assert_eq!(
        mode_with([mesh(), peer_auth("shop", "default", PERMISSIVE)]),
        MutualTls::Permissive
    );
    assert_eq!(
        mode_with([mesh(), peer_auth("shop", "default", None)]),
        MutualTls::Strict
    );
    assert_eq!(
        mode_with([mesh(), peer_auth("bank", "default", PERMISSIVE)]),
        MutualTls::Strict
    );
    let own = of_web(peer_auth("shop", "web", STRICT));
    assert_eq!(
        mode_with([peer_auth("shop", "default", PERMISSIVE), own.clone()]),
        MutualTls::Strict
    );
    let unset = PeerAuth { mode: None, ..own };
    assert_eq!(
        mode_with([peer_auth("shop", "default", PERMISSIVE), mesh(), unset]),
        MutualTls::Permissive
    );
}

#[test]
fn of_two_peer_authentications_of_a_level_the_oldest_wins() {
    let at = |seconds| Some(SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
    let old = PeerAuth {
        created: at(10),
        ..peer_auth("shop", "z-old", STRICT)
    };
    let young = PeerAuth {
        created: at(20),
        ..peer_auth("shop", "a-young", PERMISSIVE)
    };
    let timeless = peer_auth("shop", "a-timeless", PERMISSIVE);
    assert_eq!(
        mode_with([old.clone(), young.clone(), timeless.clone()]),
        MutualTls::Strict
    );
    assert_eq!(mode_with([young, timeless]), MutualTls::Permissive);
    let (old, young) = (
        of_web(old),
        of_web(PeerAuth {
            created: at(20),
            ..peer_auth("shop", "a", PERMISSIVE)
        }),
    );
    assert_eq!(mode_with([old, young]), MutualTls::Strict);
}

#[test]
fn a_port_has_its_own_mode_and_unset_is_the_workloads() {
    let mut mesh = with([]);
    let ports = BTreeMap::from([(8080, PERMISSIVE), (9090, None), (7070, STRICT)]);
    mesh.peer_auths.insert(of_web(PeerAuth {
        ports,
        ..peer_auth("shop", "web", STRICT)
    }));
    let at = |port| mutual_tls(&mesh, &web(), port);
    assert_eq!(
        (at(8080), at(9090), at(1)),
        (MutualTls::Permissive, MutualTls::Strict, MutualTls::Strict)
    );
    assert_eq!(port_modes(&mesh, &web()), [(8080, MutualTls::Permissive)]);
    assert_eq!(workload_mode(&mesh, &web()), MutualTls::Strict);
}

#[test]
fn a_peer_authentication_that_nobody_can_read_is_strict_whatever_else_says() {
    let open = of_web(PeerAuth {
        created: Some(SystemTime::UNIX_EPOCH),
        ..peer_auth("shop", "web", PERMISSIVE)
    });
    assert_eq!(
        mode_with([open, PeerAuth::unreadable("shop".into(), "x".into())]),
        MutualTls::Strict
    );
    assert_eq!(
        mode_with([PeerAuth::unreadable("bank".into(), "x".into())]),
        MutualTls::Permissive
    );
}
