//! What a service-account token says, and what the API server says of it: pure readings, each refusal by name. Not here:
//! asking the API server and remembering its answers (`reviews`).

use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use k8s_openapi::api::authentication::v1::{TokenReviewStatus, UserInfo};
use serde::Deserialize;
use std::{
    fmt,
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

const NODE: &str = "authentication.kubernetes.io/node-name";
const POD: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";
/// No token is longer: the API server's own have about one KiB.
const MAX_TOKEN: usize = 8 << 10;

/// A service account, as operators write it: `namespace/name`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServiceAccount {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
}

#[derive(Debug, thiserror::Error)]
#[error("a service account is NAMESPACE/NAME")]
pub struct ServiceAccountForm;

impl FromStr for ServiceAccount {
    type Err = ServiceAccountForm;

    fn from_str(text: &str) -> Result<Self, ServiceAccountForm> {
        let (namespace, name) = text.split_once('/').ok_or(ServiceAccountForm)?;
        let fine = |part: &str| {
            !part.is_empty()
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte))
        };
        if !fine(namespace) || !fine(name) {
            return Err(ServiceAccountForm);
        }
        Ok(Self {
            namespace: namespace.into(),
            name: name.into(),
        })
    }
}

impl ServiceAccount {
    /// The user that a token of this service account authenticates.
    fn user(&self) -> String {
        format!("system:serviceaccount:{}:{}", self.namespace, self.name)
    }
}

impl fmt::Display for ServiceAccount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// Whose tokens, and for whom they must be made.
#[derive(Debug, Clone)]
pub(super) struct Expected {
    pub(super) audience: String,
    pub(super) account: ServiceAccount,
}

/// Why a token opens nothing. As long as the token is the same, so is this.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TokenRefused {
    #[error("it is no service-account token")]
    Form,
    #[error("it has expired")]
    Expired,
    #[error("it is for another audience, not for {expected}")]
    Audience { expected: String },
    #[error("it is of {user}, not of {expected}")]
    Account { user: String, expected: ServiceAccount },
    #[error("the API server does not know it")]
    Unauthenticated,
    #[error("it is bound to no pod, so it tells no node; a projected token is needed")]
    Unbound,
}

impl TokenRefused {
    /// A short fixed name, for metric labels and tests.
    pub fn reason(&self) -> &'static str {
        match self {
            Self::Form => "token_form",
            Self::Expired => "token_expired",
            Self::Audience { .. } => "token_audience",
            Self::Account { .. } => "token_account",
            Self::Unauthenticated => "token_unauthenticated",
            Self::Unbound => "token_unbound",
        }
    }
}

/// What a token says of itself. It proves nothing; it spares the API server what it would refuse anyway, and it says how
/// long an answer may be remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Claims {
    pub(super) expires: SystemTime,
}

#[derive(Deserialize)]
struct Payload {
    #[serde(default)]
    aud: Audiences,
    exp: Option<f64>,
    #[serde(default)]
    sub: String,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Audiences {
    One(String),
    Several(Vec<String>),
}

impl Default for Audiences {
    fn default() -> Self {
        Self::Several(Vec::new())
    }
}

impl Claims {
    /// # Errors
    /// It is no token that could be taken.
    pub(super) fn read(token: &str, expected: &Expected, now: SystemTime) -> Result<Self, TokenRefused> {
        let parts: Vec<&str> = token.splitn(4, '.').collect();
        let [header, payload, signature] = parts.as_slice() else {
            return Err(TokenRefused::Form);
        };
        if token.len() > MAX_TOKEN || header.is_empty() || signature.is_empty() {
            return Err(TokenRefused::Form);
        }
        let payload = URL_SAFE_NO_PAD.decode(payload).map_err(|_| TokenRefused::Form)?;
        let payload: Payload = serde_json::from_slice(&payload).map_err(|_| TokenRefused::Form)?;
        let seconds = payload.exp.ok_or(TokenRefused::Form)?;
        let since_1970 = Duration::try_from_secs_f64(seconds).map_err(|_| TokenRefused::Form)?;
        let expires = SystemTime::UNIX_EPOCH
            .checked_add(since_1970)
            .ok_or(TokenRefused::Form)?;
        let meant = match &payload.aud {
            Audiences::One(audience) => *audience == expected.audience,
            Audiences::Several(audiences) => audiences.contains(&expected.audience),
        };
        if !meant {
            return Err(audience(expected));
        }
        if payload.sub != expected.account.user() {
            return Err(account(&payload.sub, expected));
        }
        if expires <= now {
            return Err(TokenRefused::Expired);
        }
        Ok(Self { expires })
    }
}

/// Where a token's bearer runs, as the API server vouches.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Binding {
    Node(Arc<str>),
    /// An API server older than 1.30 names the pod alone.
    Pod {
        namespace: Arc<str>,
        name: Arc<str>,
        uid: Option<Arc<str>>,
    },
}

/// What the API server says of a token.
///
/// # Errors
/// The token is not valid, not for us, or not of the node's daemon.
pub(super) fn read(status: &TokenReviewStatus, expected: &Expected) -> Result<Binding, TokenRefused> {
    if status.authenticated != Some(true) {
        return Err(TokenRefused::Unauthenticated);
    }
    // A server that knows no audiences leaves the list empty, and has not looked at them.
    let audiences = status.audiences.as_deref().unwrap_or_default();
    if !audiences.contains(&expected.audience) {
        return Err(audience(expected));
    }
    let unknown = UserInfo::default();
    let user = status.user.as_ref().unwrap_or(&unknown);
    let name = user.username.as_deref().unwrap_or_default();
    if name != expected.account.user() {
        return Err(account(name, expected));
    }
    let extra = |key: &str| {
        let values = user.extra.as_ref()?.get(key)?;
        match values.as_slice() {
            [one] if !one.is_empty() => Some(Arc::<str>::from(one.as_str())),
            [] | [_] | [_, _, ..] => None,
        }
    };
    match (extra(NODE), extra(POD)) {
        (Some(node), _) => Ok(Binding::Node(node)),
        (None, Some(name)) => Ok(Binding::Pod {
            namespace: Arc::clone(&expected.account.namespace),
            name,
            uid: extra(POD_UID),
        }),
        (None, None) => Err(TokenRefused::Unbound),
    }
}

fn audience(expected: &Expected) -> TokenRefused {
    TokenRefused::Audience {
        expected: expected.audience.clone(),
    }
}

/// The name comes from outside: it is cut to what fits a log line.
fn account(user: &str, expected: &Expected) -> TokenRefused {
    TokenRefused::Account {
        user: user.chars().filter(|c| !c.is_control()).take(200).collect(),
        expected: expected.account.clone(),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use rstest::rstest;
    use serde_json::{Value, json};

    pub(crate) const NODE_DAEMON: &str = "system:serviceaccount:warren-system:warren-node";
    const NOW: u64 = 1_800_000_000;

    pub(crate) fn expected() -> Expected {
        Expected {
            audience: "warren-ca".to_owned(),
            account: "warren-system/warren-node".parse().unwrap(),
        }
    }

    /// A token with these claims; nobody signed it.
    pub(crate) fn token(claims: &Value) -> String {
        let part = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        format!("{}.{}.c2ln", part(&json!({"alg": "RS256"})), part(claims))
    }

    fn claims(change: Value) -> String {
        let mut claims = json!({"aud": ["warren-ca"], "exp": NOW + 600, "sub": NODE_DAEMON, "iss": "https://x"});
        for (key, value) in change.as_object().unwrap() {
            claims[key] = value.clone();
        }
        token(&claims)
    }

    fn now() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(NOW)
    }

    #[rstest]
    #[case(json!({}), None)]
    #[case(json!({"aud": "warren-ca"}), None)]
    #[case(json!({"aud": ["other", "warren-ca"]}), None)]
    #[case(json!({"aud": ["https://kubernetes.default.svc.cluster.local"]}), Some("token_audience"))]
    #[case(json!({"aud": "warren-ca2"}), Some("token_audience"))]
    #[case(json!({"aud": []}), Some("token_audience"))]
    #[case(json!({"aud": null}), Some("token_form"))]
    #[case(json!({"sub": "system:serviceaccount:warren-system:warren-controller"}), Some("token_account"))]
    #[case(json!({"sub": "system:serviceaccount:shop:warren-node"}), Some("token_account"))]
    #[case(json!({"sub": ""}), Some("token_account"))]
    #[case(json!({"exp": NOW}), Some("token_expired"))]
    #[case(json!({"exp": 0}), Some("token_expired"))]
    #[case(json!({"exp": -1}), Some("token_form"))]
    #[case(json!({"exp": 1e300}), Some("token_form"))]
    #[case(json!({"exp": null}), Some("token_form"))]
    #[case(json!({"exp": "soon"}), Some("token_form"))]
    fn a_token_is_refused_by_what_it_says_of_itself(#[case] change: Value, #[case] reason: Option<&str>) {
        let read = Claims::read(&claims(change), &expected(), now());
        assert_eq!(read.as_ref().err().map(TokenRefused::reason), reason, "{read:?}");
    }

    #[test]
    fn what_is_no_token_is_refused_without_a_question_to_the_api_server() {
        let good = claims(json!({}));
        let (head, rest) = good.split_once('.').unwrap();
        let (payload, _) = rest.split_once('.').unwrap();
        for text in [
            String::new(),
            "..".to_owned(),
            "token-a".to_owned(),
            format!("{head}.{payload}"),
            format!("{head}.{payload}."),
            format!("{head}.{payload}.x.y"),
            format!("{head}.%%%.x"),
            format!("{head}.bm8ganNvbg.x"),
            format!("{good}{}", "x".repeat(MAX_TOKEN)),
        ] {
            let read = Claims::read(&text, &expected(), now());
            assert_eq!(read, Err(TokenRefused::Form), "{text:.80}");
        }
        let read = Claims::read(&good, &expected(), now()).unwrap();
        assert_eq!(read.expires, now() + Duration::from_secs(600));
    }

    fn status(change: Value) -> TokenReviewStatus {
        let mut status = json!({
            "authenticated": true,
            "audiences": ["warren-ca"],
            "user": {"username": NODE_DAEMON, "extra": {
                NODE: ["node-a"], POD: ["warren-node-x7"], POD_UID: ["uid-1"],
            }},
        });
        for (key, value) in change.as_object().unwrap() {
            status[key] = value.clone();
        }
        serde_json::from_value(status).unwrap()
    }

    fn user(name: &str, extra: Value) -> Value {
        json!({"user": {"username": name, "extra": extra}})
    }

    #[rstest]
    #[case::not_authenticated(json!({"authenticated": false, "error": "invalid bearer token"}), "token_unauthenticated")]
    #[case::nothing_said(json!({"authenticated": null}), "token_unauthenticated")]
    #[case::audience_not_looked_at(json!({"audiences": null}), "token_audience")]
    #[case::another_audience(json!({"audiences": ["istio-ca"]}), "token_audience")]
    #[case::a_person(user("admin", json!({NODE: ["node-a"]})), "token_account")]
    #[case::another_account(user("system:serviceaccount:warren-system:default", json!({NODE: ["node-a"]})), "token_account")]
    #[case::same_name_elsewhere(user("system:serviceaccount:shop:warren-node", json!({NODE: ["node-a"]})), "token_account")]
    #[case::nobody(json!({"user": null}), "token_account")]
    #[case::not_bound(user(NODE_DAEMON, json!({})), "token_unbound")]
    #[case::extra_missing(user(NODE_DAEMON, json!(null)), "token_unbound")]
    #[case::two_nodes(user(NODE_DAEMON, json!({NODE: ["node-a", "node-b"]})), "token_unbound")]
    #[case::empty_node(user(NODE_DAEMON, json!({NODE: [""]})), "token_unbound")]
    fn a_review_that_does_not_prove_a_nodes_daemon_is_refused(#[case] change: Value, #[case] reason: &str) {
        let refused = read(&status(change), &expected()).unwrap_err();
        assert_eq!(refused.reason(), reason);
    }

    #[test]
    fn the_node_is_the_one_that_the_token_is_bound_to() {
        assert_eq!(
            read(&status(json!({})), &expected()),
            Ok(Binding::Node("node-a".into()))
        );
        let of_pod = user(NODE_DAEMON, json!({POD: ["warren-node-x7"], POD_UID: ["uid-1"]}));
        let pod = Binding::Pod {
            namespace: "warren-system".into(),
            name: "warren-node-x7".into(),
            uid: Some("uid-1".into()),
        };
        assert_eq!(read(&status(of_pod), &expected()), Ok(pod));
    }

    #[test]
    fn a_service_account_is_written_with_its_namespace() {
        let account: ServiceAccount = "warren-system/warren-node".parse().unwrap();
        assert_eq!(account.user(), NODE_DAEMON);
        for wrong in ["warren-node", "/x", "x/", "a/b/c", "a b/c", "a:b/c"] {
            assert!(wrong.parse::<ServiceAccount>().is_err(), "{wrong}");
        }
    }
}
