//! ARCHITECTURE.md names only what exists: every path and every name in backticks is looked up in the tree.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

#[test]
fn every_name_in_the_architecture_page_exists() -> Result<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let page = fs::read_to_string(root.join("ARCHITECTURE.md")).context("read ARCHITECTURE.md")?;
    let names: Vec<&str> = quoted(&page).collect();
    assert!(names.len() > 40, "only {} names were read from the page", names.len());
    let missing: Vec<&&str> = names.iter().filter(|name| !exists(&root, name)).collect();
    assert!(missing.is_empty(), "named, but not there: {missing:?}");
    Ok(())
}

#[test]
fn a_name_that_does_not_exist_is_noticed() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for name in [
        "userspace/src/nowhere.rs",
        "nowhere/",
        "mesh::nowhere",
        "mesh::MeshSnapshot::nowhere",
    ] {
        assert!(!exists(&root, name), "{name}");
    }
}

/// What stands between single backticks.
fn quoted(page: &str) -> impl Iterator<Item = &str> {
    page.split('`').skip(1).step_by(2)
}

/// Paths must lie in the tree or in userspace's source, Rust paths in the folder they begin with; other words are prose.
fn exists(root: &Path, name: &str) -> bool {
    let is_path = !name.contains([' ', ':', '<']) && (name.contains('/') || name.ends_with(".rs"));
    let source = root.join("userspace/src");
    if is_path {
        return root.join(name).exists() || source.join(name).exists();
    }
    let segments: Vec<&str> = name.split("::").collect();
    let is_rust = segments.len() > 1
        && segments
            .iter()
            .all(|part| part.chars().all(|c| c.is_alphanumeric() || c == '_'));
    if !is_rust {
        return true;
    }
    let home = [source.join(segments[0]), source.join(format!("{}.rs", segments[0]))];
    let text: String = home.iter().map(|place| text_below(place)).collect();
    segments[1..].iter().all(|segment| declares(&text, segment))
}

/// Whether the text declares the name: a module, a type, a function, a trait, a constant.
fn declares(text: &str, name: &str) -> bool {
    ["mod", "struct", "enum", "trait", "fn", "const", "static", "type"]
        .iter()
        .any(|keyword| {
            text.match_indices(&format!("{keyword} {name}"))
                .any(|(at, found)| !text[at + found.len()..].starts_with(|c: char| c.is_alphanumeric() || c == '_'))
        })
}

fn text_below(place: &Path) -> String {
    if place.is_file() {
        return fs::read_to_string(place).unwrap_or_default();
    }
    let entries: Vec<PathBuf> = fs::read_dir(place)
        .map(|list| list.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    entries.iter().map(|path| text_below(path)).collect()
}
