//! Reading JSON values field by field: every complaint knows the path of its field, and one bad field spoils no other.

use super::problem::{Finding, Flaw};
use ipnet::IpNet;
use serde_json::Value;
use std::{collections::BTreeMap, net::IpAddr};

/// A value inside an object, there or not, and the path that leads to it.
#[derive(Debug, Clone)]
pub(super) struct Field<'a> {
    value: Option<&'a Value>,
    path: String,
}

/// What was found on the way.
#[derive(Debug, Default)]
pub(super) struct Findings(pub(super) Vec<Finding>);

impl Findings {
    pub(super) fn add(&mut self, field: &Field<'_>, flaw: Flaw) {
        self.0.push(Finding::new(field.path.clone(), flaw));
    }
}

impl<'a> Field<'a> {
    pub(super) fn root(value: &'a Value) -> Self {
        Self {
            value: Some(value),
            path: String::new(),
        }
    }

    /// The member of that name; absent as well where this is no object or the member is null.
    pub(super) fn get(&self, key: &str) -> Self {
        let path = if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        };
        Self {
            value: self
                .value
                .and_then(|value| value.get(key))
                .filter(|value| !value.is_null()),
            path,
        }
    }

    /// As `get`, but a member that is null counts as there.
    pub(super) fn get_even_null(&self, key: &str) -> Self {
        let mut field = self.get(key);
        field.value = self.value.and_then(|value| value.get(key));
        field
    }

    pub(super) fn is_absent(&self) -> bool {
        self.value.is_none()
    }

    pub(super) fn is_object(&self) -> bool {
        self.value.is_some_and(Value::is_object)
    }

    /// The names of the members.
    pub(super) fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.value
            .and_then(Value::as_object)
            .into_iter()
            .flat_map(|object| object.keys().map(String::as_str))
    }

    pub(super) fn text(&self, findings: &mut Findings) -> Option<&'a str> {
        match self.value? {
            Value::String(text) => Some(text),
            Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => {
                findings.add(self, Flaw::WrongType { expected: "a text" });
                None
            }
        }
    }

    pub(super) fn flag(&self, findings: &mut Findings) -> Option<bool> {
        let flag = self.value?.as_bool();
        if flag.is_none() {
            findings.add(
                self,
                Flaw::WrongType {
                    expected: "true or false",
                },
            );
        }
        flag
    }

    /// A port as a number or, as policies write it, as a text.
    pub(super) fn port(&self, findings: &mut Findings) -> Option<u16> {
        let value = self.value?;
        let port = match value {
            Value::String(text) => text.parse().ok(),
            Value::Number(number) => number.as_u64().and_then(|number| u16::try_from(number).ok()),
            Value::Null | Value::Bool(_) | Value::Array(_) | Value::Object(_) => None,
        };
        if port.is_none_or(|port| port == 0) {
            findings.add(
                self,
                Flaw::WrongValue {
                    value: shown(value),
                    expected: "a port from 1 to 65535",
                },
            );
        }
        port.filter(|port| *port != 0)
    }

    pub(super) fn number(&self, findings: &mut Findings) -> Option<u64> {
        let number = self.value?.as_u64();
        if number.is_none() {
            findings.add(self, Flaw::WrongType { expected: "a number" });
        }
        number
    }

    /// An address that a pod or service can have, never v4-mapped.
    pub(super) fn address(&self, findings: &mut Findings) -> Option<IpAddr> {
        let text = self.text(findings)?;
        let address = text.parse::<IpAddr>().ok().map(|address| address.to_canonical());
        let usable = address.filter(|a| !a.is_loopback() && !a.is_unspecified() && !a.is_multicast());
        if usable.is_none() {
            findings.add(
                self,
                Flaw::WrongValue {
                    value: text.to_owned(),
                    expected: "a unicast IP address",
                },
            );
        }
        usable
    }

    /// A CIDR, or an address that stands for itself.
    pub(super) fn cidr(&self, findings: &mut Findings) -> Option<IpNet> {
        let text = self.text(findings)?;
        let cidr = parse_cidr(text);
        if cidr.is_none() {
            findings.add(
                self,
                Flaw::WrongValue {
                    value: text.to_owned(),
                    expected: "an IP address or CIDR",
                },
            );
        }
        cidr
    }

    /// The elements of a list; none where it is absent.
    pub(super) fn list(&self, findings: &mut Findings) -> Vec<Self> {
        match self.value {
            None => Vec::new(),
            Some(Value::Array(elements)) => elements
                .iter()
                .enumerate()
                .map(|(i, value)| Self {
                    value: Some(value),
                    path: format!("{}[{i}]", self.path),
                })
                .collect(),
            Some(_) => {
                findings.add(self, Flaw::WrongType { expected: "a list" });
                Vec::new()
            }
        }
    }

    pub(super) fn is_list(&self) -> bool {
        self.value.is_some_and(Value::is_array)
    }

    /// Labels or annotations: members whose values are texts.
    pub(super) fn texts(&self, findings: &mut Findings) -> BTreeMap<String, String> {
        let mut texts = BTreeMap::new();
        if !self.is_absent() && !self.is_object() {
            findings.add(
                self,
                Flaw::WrongType {
                    expected: "a map of texts",
                },
            );
        }
        for key in self.keys() {
            if let Some(text) = self.get_even_null(key).text(findings) {
                texts.insert(key.to_owned(), text.to_owned());
            }
        }
        texts
    }
}

/// `10.0.0.0/8`, `::ffff:10.0.0.0/104` (the same), `10.1.2.3`.
pub(super) fn parse_cidr(text: &str) -> Option<IpNet> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Some(IpNet::from(address.to_canonical()));
    }
    let net = text.parse::<IpNet>().ok()?.trunc();
    match (net.network().to_canonical(), net.prefix_len()) {
        (address @ IpAddr::V4(_), bits) if net.network().is_ipv6() && bits >= 96 => IpNet::new(address, bits - 96).ok(),
        _ => Some(net),
    }
}

/// The beginning of a value, for a message.
fn shown(value: &Value) -> String {
    let text = match value {
        Value::String(text) => text.clone(),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::Array(_) | Value::Object(_) => value.to_string(),
    };
    text.chars().take(80).collect()
}
