//! The questions to the API server, through a real client whose server is in memory: how many are asked, and what counts
//! when none is answered.

use super::{
    super::review::tests::{NODE_DAEMON, expected, token},
    *,
};
use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use kube::client::Body;
use serde_json::{Value, json};
use std::sync::atomic::AtomicBool;
use tokio::sync::Notify;

/// An API server that knows the tokens whose claims say `"good": true`.
#[derive(Default)]
struct Server {
    asked: AtomicUsize,
    away: AtomicBool,
    /// Answers wait for this, if they are held.
    held: AtomicBool,
    release: Notify,
}

impl Server {
    async fn answer(
        self: Arc<Self>,
        request: Request<Body>,
    ) -> Result<Response<Full<Bytes>>, std::convert::Infallible> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        let text = request.into_body().collect().await.unwrap().to_bytes();
        let review: Value = serde_json::from_slice(&text).unwrap();
        assert_eq!(
            review["spec"]["audiences"],
            json!(["warren-ca"]),
            "the audience is asked for"
        );
        if self.held.load(Ordering::SeqCst) {
            self.release.notified().await;
        }
        if self.away.load(Ordering::SeqCst) {
            let mut response = Response::new(Full::new(Bytes::from_static(b"{}")));
            *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            return Ok(response);
        }
        let token = review["spec"]["token"].as_str().unwrap().to_owned();
        let payload = base64::Engine::decode(
            &base64::engine::general_purpose::URL_SAFE_NO_PAD,
            token.split('.').nth(1).unwrap(),
        );
        let claims: Value = serde_json::from_slice(&payload.unwrap()).unwrap();
        let status = if claims["good"] == json!(true) {
            json!({
                "authenticated": true, "audiences": ["warren-ca"],
                "user": {"username": NODE_DAEMON, "extra": {"authentication.kubernetes.io/node-name": ["node-a"]}},
            })
        } else {
            json!({"authenticated": false, "error": "invalid bearer token"})
        };
        let mut answer = review;
        answer["status"] = status;
        answer["metadata"] = json!({});
        Ok(Response::new(Full::new(answer.to_string().into())))
    }
}

fn reviews() -> (Reviews, Arc<Server>) {
    let server = Arc::<Server>::default();
    let own = Arc::clone(&server);
    let service = tower::service_fn(move |request| Arc::clone(&own).answer(request));
    (Reviews::new(Client::new(service, "default"), expected()), server)
}

/// A token of the node's daemon; `number` tells several apart.
fn node_token(good: bool, number: usize) -> String {
    token(&json!({
        "aud": ["warren-ca"], "sub": NODE_DAEMON, "exp": 4_000_000_000_u64, "good": good, "jti": number,
    }))
}

fn address(last: u8) -> Option<IpAddr> {
    Some(IpAddr::from([10, 244, 0, last]))
}

fn node_a() -> Binding {
    Binding::Node("node-a".into())
}

#[tokio::test]
async fn a_token_is_asked_about_once_as_long_as_the_answer_is_remembered() {
    let (reviews, server) = reviews();
    let (good, bad) = (node_token(true, 0), node_token(false, 0));
    for _ in 0..5 {
        assert_eq!(reviews.binding_of(&good, address(1)).await.unwrap(), node_a());
        let refused = reviews.binding_of(&bad, address(1)).await.unwrap_err();
        assert!(
            matches!(refused, ReviewError::Refused(TokenRefused::Unauthenticated)),
            "{refused:?}"
        );
    }
    assert_eq!(server.asked.load(Ordering::SeqCst), 2);
    let counts = reviews.counts();
    assert_eq!((counts.accepted, counts.refused, counts.unanswered), (1, 1, 0));
    assert!(counts.taken > Duration::ZERO);
}

#[tokio::test]
async fn many_who_show_the_same_token_wait_for_one_answer() {
    let (reviews, server) = reviews();
    server.held.store(true, Ordering::SeqCst);
    let token = node_token(true, 0);
    let waiting: Vec<_> = (0..200)
        .map(|_| {
            let (reviews, token) = (reviews.clone(), token.clone());
            tokio::spawn(async move { reviews.binding_of(&token, address(1)).await })
        })
        .collect();
    while server.asked.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    server.held.store(false, Ordering::SeqCst);
    server.release.notify_waiters();
    for answer in waiting {
        assert_eq!(answer.await.unwrap().unwrap(), node_a());
    }
    assert_eq!(server.asked.load(Ordering::SeqCst), 1);
    assert!(reviews.0.asking.lock().is_empty());
}

#[tokio::test]
async fn who_asks_first_and_goes_away_takes_nobody_with_them() {
    let (reviews, server) = reviews();
    server.held.store(true, Ordering::SeqCst);
    let token = node_token(true, 0);
    let ask = || {
        let (reviews, token) = (reviews.clone(), token.clone());
        tokio::spawn(async move { reviews.binding_of(&token, address(1)).await })
    };
    let first = ask();
    while server.asked.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let second = ask();
    tokio::task::yield_now().await;
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    server.held.store(false, Ordering::SeqCst);
    server.release.notify_waiters();
    assert_eq!(second.await.unwrap().unwrap(), node_a());
}

#[tokio::test]
async fn a_flood_of_unknown_tokens_from_one_address_stops_short_of_the_api_server() {
    let (reviews, server) = reviews();
    let mut floods = 0;
    for number in 0..1000 {
        let refused = reviews
            .binding_of(&node_token(false, number), address(1))
            .await
            .unwrap_err();
        floods += usize::from(matches!(refused, ReviewError::Flood));
    }
    let asked = server.asked.load(Ordering::SeqCst);
    assert_eq!(asked + floods, 1000);
    assert!(asked < 100, "{asked} questions");
    assert_eq!(
        reviews.binding_of(&node_token(true, 0), address(2)).await.unwrap(),
        node_a()
    );
    for wrong in ["", "garbage", "a.b.c"] {
        let refused = reviews.binding_of(wrong, address(3)).await.unwrap_err();
        assert!(matches!(refused, ReviewError::Refused(TokenRefused::Form)));
    }
    assert_eq!(
        server.asked.load(Ordering::SeqCst),
        asked + 1,
        "what is no token is not asked about"
    );
}

#[tokio::test]
async fn without_the_api_server_only_what_was_accepted_before_counts() {
    let (reviews, server) = reviews();
    let (known, unknown) = (node_token(true, 0), node_token(true, 1));
    assert_eq!(reviews.binding_of(&known, address(1)).await.unwrap(), node_a());
    server.away.store(true, Ordering::SeqCst);
    // Past its freshness, as if a minute had gone by.
    {
        let mut cache = reviews.0.cache.lock();
        let mut key = Digest::default();
        key.copy_from_slice(digest(&SHA256, known.as_bytes()).as_ref());
        let earlier = Instant::now().checked_sub(crate::controller::cache::FRESH).unwrap();
        cache.accept(key, node_a(), Duration::from_secs(3600), earlier);
    }
    assert_eq!(reviews.binding_of(&known, address(1)).await.unwrap(), node_a());
    assert_eq!(
        server.asked.load(Ordering::SeqCst),
        2,
        "it was asked, and did not answer"
    );
    let refused = reviews.binding_of(&unknown, address(1)).await.unwrap_err();
    assert!(matches!(refused, ReviewError::Unanswered(_)), "{refused:?}");
    server.away.store(false, Ordering::SeqCst);
    assert_eq!(reviews.binding_of(&unknown, address(1)).await.unwrap(), node_a());
}
