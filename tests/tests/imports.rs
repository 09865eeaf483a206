//! The walls between the folders of userspace/src: who may import whom, as ARCHITECTURE.md has it. Reads the source as
//! tokens, so that neither a path inside an expression nor a `use` group slips through.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A folder or file of userspace/src, and what it may import of the others.
const WALLS: &[(&str, Imports)] = &[
    ("mesh", Imports::Nothing),
    ("telemetry", Imports::Only(&["mesh"])),
    ("shutdown", Imports::Only(&["mesh"])),
    ("net", Imports::Only(&["mesh", "common"])),
    ("kernel", Imports::Only(&["mesh", "common", "net"])),
    ("hbone", Imports::Only(&["mesh", "net", "certs"])),
    ("certs", Imports::Only(&["mesh"])),
    ("kubernetes", Imports::Only(&["mesh"])),
    ("capture", Imports::Only(&["mesh", "kernel", "net"])),
    ("proxy", Imports::Only(&["mesh", "hbone", "certs", "net"])),
    ("controller", Imports::Only(&["mesh", "certs", "kubernetes"])),
    ("cli", Imports::Only(&["mesh", "kubernetes", "kernel", "certs"])),
    ("cni", Imports::Only(&["mesh"])),
    ("handover", Imports::Only(&["mesh", "net"])),
    ("app", Imports::All),
    ("config", Imports::All),
    ("admin", Imports::All),
    ("lib", Imports::All),
    ("main", Imports::All),
    ("testing", Imports::Nothing),
];

/// What everyone may import who may import anything.
const EVERYWHERE: &[&str] = &["telemetry", "shutdown", "testing"];

/// The crates of values that `mesh` may build on. No other dependency of userspace may appear there.
const MESH_CRATES: &[&str] = &["thiserror", "ipnet", "prefix_trie", "imbl"];

/// What would make the middle impure: waiting, input and output, locks, clocks. Each a path or a word.
const IMPURE: &[&[&str]] = &[
    &["async"],
    &["await"],
    &["Mutex"],
    &["RwLock"],
    &["Instant", "now"],
    &["SystemTime", "now"],
    &["std", "fs"],
    &["std", "io"],
    &["std", "os"],
    &["std", "process"],
    &["std", "thread"],
];

#[derive(Clone, Copy)]
enum Imports {
    All,
    /// Itself, these, and what is for everyone.
    Only(&'static [&'static str]),
    /// Itself.
    Nothing,
}

impl Imports {
    fn allow(self, target: &str) -> bool {
        match self {
            Self::All => true,
            Self::Only(others) => others.contains(&target) || EVERYWHERE.contains(&target),
            Self::Nothing => false,
        }
    }
}

#[test]
fn no_folder_imports_what_the_table_does_not_allow() -> Result<()> {
    let violations = violations_in(&userspace().join("src"))?;
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
    Ok(())
}

#[test]
fn the_middle_is_pure() -> Result<()> {
    let others = dependencies(&fs::read_to_string(userspace().join("Cargo.toml"))?);
    assert!(
        others.contains("tokio") && !others.contains("ipnet"),
        "the dependencies are not read: {others:?}"
    );
    let violations = impurities_in(&userspace().join("src/mesh"), &others)?;
    assert!(violations.is_empty(), "\n{}\n", violations.join("\n"));
    Ok(())
}

#[test]
fn a_planted_violation_is_found_however_it_is_written() -> Result<()> {
    let planted = [
        ("mesh/route.rs", "use crate::net::Namespace;", "mesh imports net"),
        (
            "mesh/mod.rs",
            "fn f() -> crate::telemetry::Metrics {}",
            "mesh imports telemetry",
        ),
        ("net/mod.rs", "use super::kernel::Kernel;", "net imports kernel"),
        (
            "net/dial.rs",
            "mod inner { use super::super::super::proxy; }",
            "net imports proxy",
        ),
        (
            "certs/mod.rs",
            "use crate::{mesh::SpiffeId, shutdown, hbone::{pool, Pool}};",
            "certs imports hbone",
        ),
        (
            "proxy/mod.rs",
            "use warren_common::marks::STEER;",
            "proxy imports common",
        ),
        ("proxy/relay.rs", "use crate::*;", "proxy imports *"),
        ("waypoint/mod.rs", "", "waypoint has no walls yet: add it to the table"),
    ];
    for (file, text, expected) in planted {
        let tree = Tree::with(&[(file, text)])?;
        let found = violations_in(tree.path())?;
        assert!(
            found.len() == 1 && found[0].ends_with(expected),
            "{file}: {text:?} gave {found:?}"
        );
    }
    Ok(())
}

#[test]
fn what_only_looks_like_an_import_is_none() -> Result<()> {
    let tree = Tree::with(&[
        (
            "mesh/mod.rs",
            "//! As crate::net has it.\n/* crate::net */ const A: &str = \"crate::net\"; const B: &str = r#\"crate::net\"#;",
        ),
        (
            "mesh/route.rs",
            "use super::SpiffeId; fn f<'a>(c: char) -> bool { c == '\"' } mod tests { use super::f; }",
        ),
        ("net/mod.rs", "mod tests { use super::dial; use super::super::mesh; }"),
        (
            "certs/store.rs",
            "pub(crate) struct A; pub(in crate::certs) struct B; use crate::mesh::net;",
        ),
        ("app.rs", "use crate::{net, kernel}; use warren_common::marks;"),
    ])?;
    assert_eq!(violations_in(tree.path())?, Vec::<String>::new());
    Ok(())
}

#[test]
fn a_clock_a_lock_and_a_runtime_in_the_middle_are_found() -> Result<()> {
    let others = BTreeSet::from(["tokio".to_owned()]);
    for (text, expected) in [
        ("fn f() { let now = std::time::Instant::now(); }", "Instant::now"),
        ("use std::{collections::BTreeMap, fs};", "std::fs"),
        ("static A: std::sync::Mutex<()> = x;", "Mutex"),
        ("fn f(r: tokio::sync::watch::Receiver<()>) {}", "tokio"),
        ("async fn f() {}", "async"),
    ] {
        let tree = Tree::with(&[("route.rs", text)])?;
        let found = impurities_in(tree.path(), &others)?;
        assert!(
            found.len() == 1 && found[0].ends_with(expected),
            "{text:?} gave {found:?}"
        );
    }
    Ok(())
}

fn userspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../userspace")
}

/// One line per arrow that the table does not have.
fn violations_in(source: &Path) -> Result<Vec<String>> {
    let mut violations = BTreeSet::new();
    for file in rust_files(source)? {
        let inside = file.strip_prefix(source)?.with_extension("");
        let mut module: Vec<String> = inside.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let folder = module[0].clone();
        if module.last().is_some_and(|last| last == "mod") {
            module.pop();
        }
        let Some((_, imports)) = WALLS.iter().find(|(name, _)| *name == folder) else {
            violations.insert(format!(
                "{}: {folder} has no walls yet: add it to the table",
                file.display()
            ));
            continue;
        };
        for target in imported(&read(&file)?, module) {
            if target != folder && !imports.allow(&target) {
                violations.insert(format!("{}: {folder} imports {target}", file.display()));
            }
        }
    }
    Ok(violations.into_iter().collect())
}

/// One line per thing in `source` that is not a plain value or a pure function.
fn impurities_in(source: &Path, forbidden_crates: &BTreeSet<String>) -> Result<Vec<String>> {
    let mut violations = BTreeSet::new();
    for file in rust_files(source)? {
        let tokens = tokens(&read(&file)?);
        for at in 0..tokens.len() {
            let starts_path = at == 0 || tokens[at - 1] != "::";
            if starts_path
                && tokens.get(at + 1).is_some_and(|next| next == "::")
                && forbidden_crates.contains(&tokens[at])
            {
                violations.insert(format!("{}: {}", file.display(), tokens[at]));
            }
            for path in IMPURE {
                let is_here = match path {
                    [word] => tokens[at] == *word,
                    [first, second] => tokens[at] == *first && heads(&tokens, at + 1).iter().any(|head| head == second),
                    _ => false,
                };
                if is_here {
                    violations.insert(format!("{}: {}", file.display(), path.join("::")));
                }
            }
        }
    }
    Ok(violations.into_iter().collect())
}

/// The names of userspace's dependencies as code spells them, without those that `mesh` may use.
fn dependencies(manifest: &str) -> BTreeSet<String> {
    let section = manifest.split("[dependencies]").nth(1).unwrap_or_default();
    let lines = section.lines().take_while(|line| !line.starts_with('['));
    let names = lines
        .filter_map(|line| line.split_once(" = "))
        .map(|(name, _)| name.trim().replace('-', "_"));
    names.filter(|name| !MESH_CRATES.contains(&name.as_str())).collect()
}

/// The top-level modules that a file of `module` names by `crate::`, by `super::` up to the root, or as `warren_common`
/// (here `common`).
fn imported(text: &str, mut module: Vec<String>) -> BTreeSet<String> {
    let tokens = tokens(text);
    let mut found = BTreeSet::new();
    // For each open brace, whether it is the body of an inline module, which is one level more for `super`.
    let mut braces: Vec<bool> = Vec::new();
    for at in 0..tokens.len() {
        let starts_path = at == 0 || tokens[at - 1] != "::";
        match tokens[at].as_str() {
            "{" => {
                let opens_module = at >= 2 && tokens[at - 2] == "mod";
                if opens_module {
                    module.push(tokens[at - 1].clone());
                }
                braces.push(opens_module);
            }
            "}" if braces.pop() == Some(true) => {
                module.pop();
            }
            "crate" => found.extend(heads(&tokens, at + 1)),
            "super" if starts_path => {
                let levels = 1 + tokens[at + 1..]
                    .chunks(2)
                    .take_while(|pair| *pair == ["::", "super"])
                    .count();
                if levels == module.len() {
                    found.extend(heads(&tokens, at + 2 * levels - 1));
                }
            }
            "warren_common" => {
                found.insert("common".to_owned());
            }
            _ => {}
        }
    }
    found
}

/// What follows `::` at `at`: the next name, or the first name of each element of a group.
fn heads(tokens: &[String], at: usize) -> Vec<String> {
    if tokens.get(at).is_none_or(|token| token != "::") {
        return Vec::new();
    }
    let Some(next) = tokens.get(at + 1) else {
        return Vec::new();
    };
    if next != "{" {
        return vec![next.clone()];
    }
    let mut heads = Vec::new();
    let mut depth = 0;
    for (index, token) in tokens.iter().enumerate().skip(at + 1) {
        match token.as_str() {
            "{" => depth += 1,
            "}" => depth -= 1,
            name if depth == 1 && matches!(tokens[index - 1].as_str(), "{" | ",") && name != "," && name != "self" => {
                heads.push(name.to_owned());
            }
            _ => {}
        }
        if depth == 0 {
            break;
        }
    }
    heads
}

/// Names, `::`, and every other character by itself; no comments, no literals.
fn tokens(text: &str) -> Vec<String> {
    let characters: Vec<char> = text.chars().collect();
    let mut tokens = Vec::new();
    let mut at = 0;
    while at < characters.len() {
        let rest = &characters[at..];
        at += match rest {
            ['/', '/', ..] => rest.iter().position(|c| *c == '\n').unwrap_or(rest.len()),
            ['/', '*', ..] => block_comment(rest),
            ['"', ..] => 1 + quoted(&rest[1..], '"'),
            ['r', '"' | '#', ..] if raw_string(rest).is_some() => raw_string(rest).unwrap_or(1),
            ['\'', '\\', ..] => 1 + quoted(&rest[1..], '\''),
            ['\'', _, '\'', ..] => 3,
            [':', ':', ..] => {
                tokens.push("::".to_owned());
                2
            }
            [first, ..] if first.is_alphanumeric() || *first == '_' => {
                let length = rest.iter().take_while(|c| c.is_alphanumeric() || **c == '_').count();
                let name: String = rest[..length].iter().collect();
                // The prefix of a literal such as `br"…"` is taken with it.
                let is_prefix = matches!(name.as_str(), "b" | "c") && rest.get(length) == Some(&'"');
                if name == "br" && raw_string(&rest[1..]).is_some() {
                    1 + raw_string(&rest[1..]).unwrap_or(1)
                } else {
                    if !is_prefix {
                        tokens.push(name);
                    }
                    length
                }
            }
            [first, ..] if first.is_whitespace() => 1,
            [first, ..] => {
                tokens.push(first.to_string());
                1
            }
            [] => break,
        };
    }
    tokens
}

/// The length of a block comment, which may hold others.
fn block_comment(text: &[char]) -> usize {
    let mut depth = 0;
    let mut at = 0;
    while at < text.len() {
        match text[at..] {
            ['/', '*', ..] => (depth, at) = (depth + 1, at + 2),
            ['*', '/', ..] => (depth, at) = (depth - 1, at + 2),
            _ => at += 1,
        }
        if depth == 0 {
            break;
        }
    }
    at
}

/// The length of a literal up to and with its closing quote.
fn quoted(text: &[char], quote: char) -> usize {
    let mut at = 0;
    while at < text.len() && text[at] != quote {
        at += if text[at] == '\\' { 2 } else { 1 };
    }
    (at + 1).min(text.len())
}

/// The length of `r"…"` or `r#"…"#`, if that is what stands here.
fn raw_string(text: &[char]) -> Option<usize> {
    let hashes = text[1..].iter().take_while(|c| **c == '#').count();
    if text.get(1 + hashes) != Some(&'"') {
        return None;
    }
    let mut end = vec!['"'];
    end.extend(std::iter::repeat_n('#', hashes));
    let body = 2 + hashes;
    let length = text[body..].windows(end.len()).position(|window| window == end);
    Some(length.map_or(text.len(), |length| body + length + end.len()))
}

fn read(file: &Path) -> Result<String> {
    fs::read_to_string(file).with_context(|| format!("cannot read {}", file.display()))
}

fn rust_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            files.extend(rust_files(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// A source tree of a test's own.
struct Tree(tempfile::TempDir);

impl Tree {
    fn with(files: &[(&str, &str)]) -> Result<Self> {
        let tree = Self(tempfile::tempdir()?);
        for (name, text) in files {
            let path = tree.path().join(name);
            fs::create_dir_all(path.parent().context("no parent")?)?;
            fs::write(path, text)?;
        }
        Ok(tree)
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}
