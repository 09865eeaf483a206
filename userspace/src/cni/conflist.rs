//! Our entry in a list of CNI plugins, put in and taken out of the list's text: not a byte of what others wrote changes.
//! Pure.

use super::TYPE;
use serde_json::Value;
use std::ops::Range;

/// Why a configuration cannot be changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConflistError {
    #[error("it is no JSON")]
    NotJson,
    #[error("it has no list of plugins")]
    NoPlugins,
    #[error("its list of plugins is empty: there is nobody to make the pod's network")]
    NothingToChain,
    #[error("its cniVersion {0:?} has no chains with results: 0.3.0 is the first")]
    TooOld(String),
}

/// The list with `entry` as its last plugin; an entry of ours that is there is replaced where it is. The text itself if
/// there is nothing to change.
///
/// # Errors
/// The list cannot be extended.
pub fn with_entry(text: &str, entry: &Value) -> Result<String, ConflistError> {
    let list: Value = serde_json::from_str(text).map_err(|_| ConflistError::NotJson)?;
    let version = list["cniVersion"].as_str().unwrap_or("0.1.0");
    if !has_results(version) {
        return Err(ConflistError::TooOld(version.to_owned()));
    }
    let elements = elements(text, &list)?;
    let last = elements.last().ok_or(ConflistError::NothingToChain)?.clone();
    let ours: Vec<_> = elements
        .iter()
        .filter(|element| is_ours(&text[(*element).clone()]))
        .collect();
    if let [only] = ours.as_slice() {
        if elements.len() == 1 {
            return Err(ConflistError::NothingToChain);
        }
        let there: Option<Value> = serde_json::from_str(&text[(*only).clone()]).ok();
        return Ok(if there.as_ref() == Some(entry) {
            text.to_owned()
        } else {
            format!("{}{entry}{}", &text[..only.start], &text[only.end..])
        });
    }
    if !ours.is_empty() {
        return with_entry(&without_entry(text)?, entry);
    }
    let before = text[..last.start].len() - text[..last.start].trim_end().len();
    let space = &text[last.start - before..last.start];
    Ok(format!("{},{space}{entry}{}", &text[..last.end], &text[last.end..]))
}

/// The list without any entry of ours.
///
/// # Errors
/// It is no list of plugins.
pub fn without_entry(text: &str) -> Result<String, ConflistError> {
    let list: Value = serde_json::from_str(text).map_err(|_| ConflistError::NotJson)?;
    let elements = elements(text, &list)?;
    let Some(index) = elements.iter().position(|element| is_ours(&text[element.clone()])) else {
        return Ok(text.to_owned());
    };
    let cut = match (index.checked_sub(1), elements.get(index + 1)) {
        (Some(before), _) => elements[before].end..elements[index].end,
        (None, Some(after)) => elements[index].start..after.start,
        (None, None) => elements[index].clone(),
    };
    without_entry(&format!("{}{}", &text[..cut.start], &text[cut.end..]))
}

/// True if an entry of ours is in the list.
pub fn has_entry(text: &str) -> bool {
    without_entry(text).is_ok_and(|without| without != text)
}

/// A single plugin's configuration as a list of one, and `entry`.
///
/// # Errors
/// It is no plugin's configuration.
pub fn from_single(text: &str, entry: &Value) -> Result<String, ConflistError> {
    let single: Value = serde_json::from_str(text).map_err(|_| ConflistError::NotJson)?;
    if !single["type"].is_string() {
        return Err(ConflistError::NoPlugins);
    }
    let (version, name) = (&single["cniVersion"], &single["name"]);
    let list = format!(
        "{{\n  \"cniVersion\": {version},\n  \"name\": {name},\n  \"plugins\": [\n{}\n  ]\n}}\n",
        text.trim()
    );
    with_entry(&list, entry)
}

fn has_results(version: &str) -> bool {
    let mut numbers = version.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
    (numbers.next(), numbers.next()) >= (Some(0), Some(3))
}

fn is_ours(element: &str) -> bool {
    serde_json::from_str::<Value>(element).is_ok_and(|element| element["type"] == TYPE)
}

/// Where the elements of the top-level list `plugins` are in `text`, which holds `list`.
fn elements(text: &str, list: &Value) -> Result<Vec<Range<usize>>, ConflistError> {
    if !list["plugins"].is_array() {
        return Err(ConflistError::NoPlugins);
    }
    let mut cursor = Cursor {
        bytes: text.as_bytes(),
        at: 0,
    };
    let mut found = Vec::new();
    cursor.members(b'{', |cursor| {
        let key = cursor.value();
        cursor.space();
        cursor.at += 1;
        cursor.space();
        let is_plugins = serde_json::from_str::<String>(&text[key]).is_ok_and(|key| key == "plugins");
        if is_plugins {
            // Of a key that is there twice, the last counts.
            found.clear();
            cursor.members(b'[', |cursor| found.push(cursor.value()));
        } else {
            cursor.value();
        }
    });
    Ok(found)
}

/// Walks over text that is known to be JSON.
struct Cursor<'t> {
    bytes: &'t [u8],
    at: usize,
}

impl Cursor<'_> {
    fn peek(&self) -> Option<u8> {
        self.bytes.get(self.at).copied()
    }

    fn space(&mut self) {
        while self.peek().is_some_and(|byte| byte.is_ascii_whitespace()) {
            self.at += 1;
        }
    }

    /// The members of the object or list that begins here; ends behind it.
    fn members(&mut self, open: u8, mut member: impl FnMut(&mut Self)) {
        self.space();
        if self.peek() != Some(open) {
            return;
        }
        loop {
            self.at += 1;
            self.space();
            if matches!(self.peek(), Some(b'}' | b']') | None) {
                break;
            }
            member(self);
            self.space();
            if self.peek() != Some(b',') {
                break;
            }
        }
        self.at += 1;
    }

    /// Steps over the value that begins here, and says where it was.
    fn value(&mut self) -> Range<usize> {
        let start = self.at;
        let mut depth = 0_usize;
        while let Some(byte) = self.peek() {
            match byte {
                b'"' => {
                    self.string();
                    if depth == 0 {
                        break;
                    }
                    continue;
                }
                b'{' | b'[' => depth += 1,
                b'}' | b']' if depth == 0 => break,
                b'}' | b']' => {
                    depth -= 1;
                    if depth == 0 {
                        self.at += 1;
                        break;
                    }
                }
                b',' if depth == 0 => break,
                _ if depth == 0 && byte.is_ascii_whitespace() => break,
                _ => {}
            }
            self.at += 1;
        }
        start..self.at
    }

    fn string(&mut self) {
        self.at += 1;
        while let Some(byte) = self.peek() {
            self.at += 1;
            match byte {
                b'\\' => self.at += 1,
                b'"' => return,
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    /// As kubeadm users know it, with a number that no parser keeps and an odd layout.
    const FLANNEL: &str = r#"{
  "name": "cbr0", "cniVersion" : "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": { "hairpinMode": true, "isDefaultGateway": true, "x": "}], \"plugins\": [" }
    },
    { "type": "portmap", "capabilities": { "portMappings": true }, "mtu": 1.4500e3 }
  ],
  "other" : null
}
"#;

    fn entry() -> Value {
        json!({"type": TYPE, "socket": "/run/warren/cni.sock"})
    }

    #[test]
    fn our_entry_is_the_last_and_nothing_else_changes() {
        let with = with_entry(FLANNEL, &entry()).unwrap();
        let parsed: Value = serde_json::from_str(&with).unwrap();
        let types: Vec<_> = parsed["plugins"]
            .as_array()
            .unwrap()
            .iter()
            .map(|p| p["type"].as_str().unwrap())
            .collect();
        assert_eq!(types, ["flannel", "portmap", TYPE]);
        assert!(with.contains("\"mtu\": 1.4500e3 },\n    {\"socket\""), "{with}");
        assert_eq!(with_entry(&with, &entry()).unwrap(), with, "it is there already");
        assert_eq!(without_entry(&with).unwrap(), FLANNEL);
        assert!(has_entry(&with) && !has_entry(FLANNEL));
    }

    #[test]
    fn an_entry_of_another_version_is_replaced_where_it_is() {
        let with = with_entry(FLANNEL, &entry()).unwrap();
        let behind = with.replace("\n  ],\n  \"other\"", ",\n    {\"type\": \"later\"}\n  ],\n  \"other\"");
        let newer = json!({"type": TYPE, "socket": "/run/other.sock"});
        let replaced = with_entry(&behind, &newer).unwrap();
        assert_eq!(replaced, behind.replace("/run/warren/cni.sock", "/run/other.sock"));
        let twice = with.replace("\n  ],\n  \"other\"", &format!(",\n    {}\n  ],\n  \"other\"", entry()));
        assert_eq!(with_entry(&twice, &entry()).unwrap(), with);
        assert_eq!(without_entry(&twice).unwrap(), FLANNEL);
    }

    #[test]
    fn what_cannot_be_chained_behind_is_named() {
        for (text, expected) in [
            ("{", ConflistError::NotJson),
            ("{\"cniVersion\": \"1.0.0\"}", ConflistError::NoPlugins),
            (
                "{\"cniVersion\": \"1.0.0\", \"plugins\": []}",
                ConflistError::NothingToChain,
            ),
            (
                "{\"cniVersion\": \"1.0.0\", \"plugins\": [{\"type\": \"warren-cni\"}]}",
                ConflistError::NothingToChain,
            ),
            (
                "{\"cniVersion\": \"0.2.0\", \"plugins\": [{\"type\": \"ptp\"}]}",
                ConflistError::TooOld("0.2.0".into()),
            ),
        ] {
            assert_eq!(with_entry(text, &entry()).unwrap_err(), expected, "{text}");
        }
    }

    #[test]
    fn a_single_plugin_becomes_a_list() {
        let single = "{\"cniVersion\": \"0.3.1\", \"name\": \"net\", \"type\": \"bridge\", \"mtu\": 1e3}\n";
        let list = from_single(single, &entry()).unwrap();
        let parsed: Value = serde_json::from_str(&list).unwrap();
        assert_eq!(
            (&parsed["cniVersion"], &parsed["name"]),
            (&json!("0.3.1"), &json!("net"))
        );
        assert_eq!(parsed["plugins"][1], entry());
        assert!(list.contains(single.trim()));
        assert_eq!(
            from_single("{\"plugins\": []}", &entry()),
            Err(ConflistError::NoPlugins)
        );
    }

    fn any_json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[ -~é\\n]{0,12}".prop_map(Value::from),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-z\"\\[{]{0,6}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn whatever_a_list_holds_comes_back_byte_for_byte(
            fields in prop::collection::btree_map("[a-oq-z\"{\\[]{1,6}", any_json(), 0..4),
            plugins in prop::collection::vec(any_json(), 1..4),
            pretty: bool,
        ) {
            let mut list = serde_json::Map::from_iter(fields);
            list.insert("cniVersion".into(), json!("1.0.0"));
            list.insert("plugins".into(), Value::from(plugins));
            let text = if pretty { serde_json::to_string_pretty(&list) } else { serde_json::to_string(&list) }.unwrap();
            let with = with_entry(&text, &entry()).unwrap();
            let parsed: Value = serde_json::from_str(&with).unwrap();
            prop_assert_eq!(parsed["plugins"].as_array().unwrap().last().unwrap(), &entry());
            prop_assert_eq!(without_entry(&with).unwrap(), text);
        }
    }
}
