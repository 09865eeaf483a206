//! From a file's text to the objects in it. One broken document spoils no other of its file.

use crate::kubernetes::{
    objects::{Kind, ObjectRef, Recognized},
    problem::{Finding, Flaw},
};
use serde_json::Value;

/// One object, or what is known of a place where one should be.
#[derive(Debug, PartialEq)]
pub(super) struct Document {
    /// Counted from 1.
    pub(super) number: usize,
    /// Counted from 1.
    pub(super) line: usize,
    pub(super) content: Content,
}

#[derive(Debug, PartialEq)]
pub(super) enum Content {
    Object {
        object: ObjectRef,
        value: Value,
    },
    /// `object` is what could be made out of the text, where it is of a kind that restricts.
    Broken {
        object: Option<ObjectRef>,
        line: Option<usize>,
        finding: Finding,
    },
    /// Legible, and of no kind of ours. `named` is namespace and name: a kind misspelt in an edit is no deletion.
    Foreign {
        named: Option<(String, String)>,
        finding: Option<Finding>,
    },
}

/// Everything in the text of a file.
pub(super) fn parse(text: &str, is_json: bool) -> Vec<Document> {
    let mut documents = Vec::new();
    if is_json {
        parse_json(text, &mut documents);
    } else {
        for (i, (line, part)) in split(text).into_iter().enumerate() {
            let content = match serde_saphyr::from_str_with_options::<Value>(&part, options()) {
                Ok(value) => classify(value, i + 1),
                Err(error) => {
                    let at = error
                        .location()
                        .and_then(|at| usize::try_from(at.line()).ok())
                        .filter(|at| *at > 0);
                    let message = error.to_string().lines().next().unwrap_or_default().to_owned();
                    vec![broken(&part, i + 1, at.map(|at| line + at - 1), message)]
                }
            };
            documents.extend(content.into_iter().map(|content| Document {
                number: i + 1,
                line,
                content,
            }));
        }
    }
    documents
}

/// A file that is no text at all.
pub(super) fn not_text(bytes: &[u8]) -> Vec<Document> {
    let text = String::from_utf8_lossy(bytes);
    vec![Document {
        number: 1,
        line: 1,
        content: broken(&text, 1, None, "the file is not UTF-8".to_owned()),
    }]
}

/// The file's size is bounded; within that, a list of all pods of a cluster is one document.
fn options() -> serde_saphyr::Options {
    let budget = serde_saphyr::budget! { max_nodes: 2_000_000, max_events: 8_000_000 };
    serde_saphyr::options! { with_snippet: false, budget: budget }
}

fn parse_json(text: &str, documents: &mut Vec<Document>) {
    let mut values = serde_json::Deserializer::from_str(text).into_iter::<Value>();
    let mut number = 0;
    loop {
        let start = values.byte_offset();
        let Some(value) = values.next() else { return };
        number += 1;
        let rest = &text[start..];
        let begin = start + (rest.len() - rest.trim_start().len());
        let line = 1 + text[..begin].matches('\n').count();
        let failed = value.is_err();
        let content = match value {
            Ok(value) => classify(value, number),
            Err(error) => vec![broken(&text[begin..], number, Some(error.line()), error.to_string())],
        };
        documents.extend(content.into_iter().map(|content| Document { number, line, content }));
        if failed {
            return;
        }
    }
}

/// The documents with something in them, each with its first line's number. `---` at the margin always ends a document,
/// also within a text block, so this needs no parser.
fn split(text: &str) -> Vec<(usize, String)> {
    let mut parts: Vec<(usize, String)> = vec![(1, String::new())];
    for (i, line) in text
        .strip_prefix('\u{feff}')
        .unwrap_or(text)
        .split_inclusive('\n')
        .enumerate()
    {
        let mark = line
            .get(..3)
            .filter(|_| line[3..].chars().next().is_none_or(char::is_whitespace));
        match mark {
            Some("---") => parts.push((i + 1, format!("   {}", &line[3..]))),
            Some("...") => parts.push((i + 2, String::new())),
            Some(_) | None => {
                if let Some((_, part)) = parts.last_mut() {
                    part.push_str(line);
                }
            }
        }
    }
    let has_content = |line: &str| !line.trim_start().is_empty() && !line.trim_start().starts_with(['#', '%']);
    parts.retain(|(_, part)| part.lines().any(has_content));
    parts
}

fn classify(value: Value, number: usize) -> Vec<Content> {
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let (api_version, kind) = (text("apiVersion").to_owned(), text("kind").to_owned());
    let items = value.get("items").is_some_and(Value::is_array);
    if items && kind.ends_with("List") {
        let Value::Object(mut list) = value else {
            return Vec::new();
        };
        let Some(Value::Array(items)) = list.remove("items") else {
            return Vec::new();
        };
        // In a typed list (`PodList`) the items may leave out what the list says.
        let item_kind = kind.strip_suffix("List").unwrap_or_default().to_owned();
        return items
            .into_iter()
            .map(|mut item| {
                if let Value::Object(item) = &mut item
                    && !item_kind.is_empty()
                {
                    item.entry("apiVersion").or_insert_with(|| api_version.clone().into());
                    item.entry("kind").or_insert_with(|| item_kind.clone().into());
                }
                one(item, number)
            })
            .collect();
    }
    vec![one(value, number)]
}

fn one(value: Value, number: usize) -> Content {
    let text = |key: &str| value.get(key).and_then(Value::as_str);
    let (api_version, kind) = (text("apiVersion").unwrap_or_default(), text("kind").unwrap_or_default());
    let recognized = match Recognized::of(api_version, kind) {
        Recognized::Unknown if !value.is_object() => {
            let finding = Finding::new("", Flaw::WrongType { expected: "an object" });
            return Content::Broken {
                object: None,
                line: None,
                finding,
            };
        }
        Recognized::Unknown if kind.is_empty() => {
            return foreign(&value, Some(Finding::new("kind", Flaw::Missing)));
        }
        Recognized::Unknown => {
            let flaw = Flaw::UnknownKind {
                api_version: api_version.to_owned(),
                kind: kind.to_owned(),
            };
            return foreign(&value, Some(Finding::new("kind", flaw)));
        }
        Recognized::Irrelevant => return foreign(&value, None),
        Recognized::UnknownVersion(kind) => {
            let flaw = Flaw::UnknownKind {
                api_version: api_version.to_owned(),
                kind: kind.word().to_owned(),
            };
            let object = ObjectRef::read(kind, &value).ok();
            let object = object.or_else(|| unnamed(kind, &value.to_string(), number));
            return Content::Broken {
                object,
                line: None,
                finding: Finding::new("apiVersion", flaw),
            };
        }
        Recognized::Kind(kind) => kind,
    };
    match ObjectRef::read(recognized, &value) {
        Ok(object) => Content::Object { object, value },
        Err(finding) => {
            let object = unnamed(recognized, &value.to_string(), number);
            Content::Broken {
                object,
                line: None,
                finding,
            }
        }
    }
}

fn foreign(value: &Value, finding: Option<Finding>) -> Content {
    let meta = |key: &str| {
        value
            .get("metadata")
            .and_then(|meta| meta.get(key))
            .and_then(Value::as_str)
    };
    let named = meta("name").map(|name| (meta("namespace").unwrap_or("default").to_owned(), name.to_owned()));
    Content::Foreign { named, finding }
}

fn broken(text: &str, number: usize, line: Option<usize>, message: String) -> Content {
    let kind = [Kind::AuthorizationPolicy, Kind::PeerAuthentication]
        .into_iter()
        .find(|kind| members(text, "kind").any(|value| value == kind.word()));
    let object = kind.and_then(|kind| unnamed(kind, text, number));
    Content::Broken {
        object,
        line,
        finding: Finding::new("", Flaw::Syntax(message)),
    }
}

/// The object that a text seems to mean, if it is of a kind that restricts: by its first `namespace:` and `name:`.
fn unnamed(kind: Kind, text: &str, number: usize) -> Option<ObjectRef> {
    let name = members(text, "name")
        .next()
        .map_or_else(|| format!("document-{number}"), str::to_owned);
    let namespace = members(text, "namespace").next().unwrap_or("default");
    kind.restricts().then(|| ObjectRef {
        kind,
        namespace: namespace.into(),
        name: name.into(),
    })
}

/// The simple values of every member of that name, in any style of YAML or JSON, whatever is broken around them.
fn members<'t>(text: &'t str, key: &'t str) -> impl Iterator<Item = &'t str> {
    let is_word = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.' | '/');
    text.match_indices(key).filter_map(move |(at, _)| {
        if text[..at].chars().next_back().is_some_and(is_word) {
            return None;
        }
        let rest = text[at + key.len()..]
            .trim_start_matches(['"', '\''])
            .trim_start_matches([' ', '\t']);
        let value = rest
            .strip_prefix(':')?
            .trim_start_matches([' ', '\t'])
            .trim_start_matches(['"', '\'']);
        let end = value.find(|c| !is_word(c)).unwrap_or(value.len());
        Some(&value[..end]).filter(|value| !value.is_empty())
    })
}
