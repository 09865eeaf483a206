//! The Container Network Interface, as far as a chained plugin needs it (containernetworking/cni, SPEC.md 1.1): what it is
//! told by variables and on standard input, and what it says on standard output. Pure.

use super::wire::PodName;
use serde::Deserialize;
use serde_json::{Value, json};
use std::{
    net::IpAddr,
    path::{Path, PathBuf},
};

/// Versions of the specification that this plugin speaks.
const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Namespaces whose pods are never asked about, where the configuration does not say.
const SYSTEM: &str = "kube-system";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Add,
    Check,
    Del,
    Status,
    Version,
    Gc,
}

/// Why the plugin fails, as the specification numbers it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CniError {
    #[error("{name} is {value:?}")]
    Environment { name: &'static str, value: String },
    #[error("the network configuration is no JSON: {why}")]
    NotJson { why: String },
    #[error("cniVersion {0:?} is not supported")]
    Version(String),
    #[error("there is no prevResult: warren-cni runs behind a plugin that makes the pod's network")]
    NoPreviousResult,
    #[error("pod {pod} should be in the mesh and is not captured: {why}")]
    NotCaptured { pod: String, why: String },
    #[error("pod {pod} may not start yet: {why}")]
    Later { pod: String, why: String },
}

impl CniError {
    fn code(&self) -> u32 {
        match self {
            Self::Version(_) => 1,
            Self::Environment { .. } => 4,
            Self::NotJson { .. } => 6,
            Self::NoPreviousResult => 7,
            Self::Later { .. } => 11,
            Self::NotCaptured { .. } => 100,
        }
    }

    /// What goes to standard output.
    pub fn to_json(&self, version: &str) -> Value {
        json!({"cniVersion": version, "code": self.code(), "msg": self.to_string()})
    }
}

/// What the runtime says by variables.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Invocation {
    pub command: Command,
    pub container: String,
    pub netns: Option<PathBuf>,
    /// `None`: not on behalf of a kubelet.
    pub pod: Option<PodName>,
}

impl Invocation {
    /// # Errors
    /// A variable is missing or means nothing.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self, CniError> {
        let command = variable("CNI_COMMAND").unwrap_or_default();
        let command = match command.as_str() {
            "ADD" => Command::Add,
            "CHECK" => Command::Check,
            "DEL" => Command::Del,
            "STATUS" => Command::Status,
            "VERSION" => Command::Version,
            "GC" => Command::Gc,
            _ => {
                return Err(CniError::Environment {
                    name: "CNI_COMMAND",
                    value: command,
                });
            }
        };
        let netns = variable("CNI_NETNS").filter(|path| !path.is_empty());
        if netns.is_none() && matches!(command, Command::Add | Command::Check) {
            return Err(CniError::Environment {
                name: "CNI_NETNS",
                value: String::new(),
            });
        }
        Ok(Self {
            command,
            container: variable("CNI_CONTAINERID").unwrap_or_default(),
            netns: netns.map(PathBuf::from),
            pod: pod(&variable("CNI_ARGS").unwrap_or_default()),
        })
    }
}

/// `K8S_POD_NAMESPACE=…;K8S_POD_NAME=…` in any order.
fn pod(arguments: &str) -> Option<PodName> {
    let value = |name: &str| {
        let mut pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
        pairs.find(|(key, _)| *key == name).map(|(_, value)| value.to_owned())
    };
    Some(PodName {
        namespace: value("K8S_POD_NAMESPACE")?,
        name: value("K8S_POD_NAME")?,
        uid: value("K8S_POD_UID").unwrap_or_default(),
    })
}

/// What the runtime says on standard input.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Config {
    #[serde(rename = "cniVersion", default)]
    pub version: String,
    /// Where the daemon answers.
    #[serde(default = "default_socket")]
    pub socket: PathBuf,
    /// Where the daemon leaves what the plugin has to know without it.
    #[serde(default = "default_state")]
    pub state: PathBuf,
    /// Namespaces whose pods start in any case.
    #[serde(default = "default_exempt")]
    pub exempt: Vec<String>,
    #[serde(rename = "prevResult")]
    previous: Option<Value>,
}

fn default_socket() -> PathBuf {
    "/run/warren/cni.sock".into()
}

fn default_state() -> PathBuf {
    "/etc/cni/net.d/warren".into()
}

fn default_exempt() -> Vec<String> {
    vec![SYSTEM.into()]
}

impl Config {
    /// # Errors
    /// The text is no configuration, or of a version that is not known.
    pub fn read(text: &str) -> Result<Self, CniError> {
        let config: Self = serde_json::from_str(text).map_err(|error| CniError::NotJson { why: error.to_string() })?;
        if VERSIONS.contains(&config.version.as_str()) {
            Ok(config)
        } else {
            Err(CniError::Version(config.version))
        }
    }

    /// The result of the plugins before, which is ours too.
    ///
    /// # Errors
    /// There is none.
    pub fn previous(&self) -> Result<&Value, CniError> {
        self.previous.as_ref().ok_or(CniError::NoPreviousResult)
    }

    /// The pod's addresses, as the plugins before gave them to it.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let ips = self.previous.as_ref().and_then(|result| result["ips"].as_array());
        let texts = ips.into_iter().flatten().filter_map(|ip| ip["address"].as_str());
        texts.filter_map(|text| text.split('/').next()?.parse().ok()).collect()
    }
}

/// Our entry in the node's list of plugins.
pub fn entry(socket: &Path, state: &Path, own_namespace: &str) -> Value {
    json!({
        "type": super::TYPE,
        "socket": socket,
        "state": state,
        "exempt": [SYSTEM, own_namespace],
    })
}

/// The answer to VERSION.
pub fn versions() -> Value {
    json!({"cniVersion": VERSIONS[VERSIONS.len() - 1], "supportedVersions": VERSIONS})
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn read(variables: &[(&str, &str)]) -> Result<Invocation, CniError> {
        let variables: HashMap<_, _> = variables.iter().copied().collect();
        Invocation::read(|name| variables.get(name).map(|value| (*value).to_owned()))
    }

    #[test]
    fn the_pod_is_read_from_arguments_in_any_order() {
        for arguments in [
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web-0;K8S_POD_INFRA_CONTAINER_ID=ab;K8S_POD_UID=u-1",
            "K8S_POD_UID=u-1;K8S_POD_NAME=web-0;IgnoreUnknown=1;K8S_POD_NAMESPACE=shop",
        ] {
            let invocation = read(&[
                ("CNI_COMMAND", "ADD"),
                ("CNI_NETNS", "/var/run/netns/cni-1"),
                ("CNI_CONTAINERID", "ab"),
                ("CNI_ARGS", arguments),
            ])
            .unwrap();
            let pod = invocation.pod.unwrap();
            assert_eq!((&*pod.namespace, &*pod.name, &*pod.uid), ("shop", "web-0", "u-1"));
        }
        let by_hand = read(&[
            ("CNI_COMMAND", "ADD"),
            ("CNI_NETNS", "/x"),
            ("CNI_ARGS", "IgnoreUnknown=1"),
        ]);
        assert_eq!(by_hand.unwrap().pod, None);
    }

    #[test]
    fn a_variable_that_is_missing_is_named() {
        assert!(matches!(
            read(&[]),
            Err(CniError::Environment {
                name: "CNI_COMMAND",
                ..
            })
        ));
        assert!(matches!(
            read(&[("CNI_COMMAND", "ADD")]),
            Err(CniError::Environment { name: "CNI_NETNS", .. })
        ));
        // A sandbox that is gone has no namespace any more.
        assert_eq!(read(&[("CNI_COMMAND", "DEL")]).unwrap().command, Command::Del);
    }

    #[test]
    fn a_configuration_says_where_the_daemon_is_and_what_came_before() {
        let text = r#"{"cniVersion": "1.0.0", "name": "k8s", "type": "warren-cni", "socket": "/s", "state": "/t",
            "exempt": ["kube-system", "warren-system"], "runtimeConfig": {"x": 1},
            "prevResult": {"cniVersion": "1.0.0", "ips": [{"address": "10.244.1.7/24"}, {"address": "fd00::7/64"}]}}"#;
        let config = Config::read(text).unwrap();
        let addresses: Vec<_> = config.addresses().iter().map(ToString::to_string).collect();
        assert_eq!(addresses, ["10.244.1.7", "fd00::7"]);
        assert_eq!(config.previous().unwrap()["ips"][1]["address"], "fd00::7/64");
        assert!(matches!(Config::read("{"), Err(CniError::NotJson { .. })));
        assert!(matches!(
            Config::read("{\"cniVersion\": \"0.2.0\"}"),
            Err(CniError::Version(_))
        ));
        let first = Config::read("{\"cniVersion\": \"1.0.0\"}").unwrap();
        assert!(matches!(first.previous(), Err(CniError::NoPreviousResult)));
    }

    #[test]
    fn errors_have_the_specifications_form_and_numbers() {
        let later = CniError::Later {
            pod: "shop/web-0".into(),
            why: "no daemon".into(),
        };
        assert_eq!(
            later.to_json("1.0.0"),
            json!({"cniVersion": "1.0.0", "code": 11, "msg": "pod shop/web-0 may not start yet: no daemon"})
        );
    }
}
