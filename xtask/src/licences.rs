//! Whether every dependency's licence is one of those that `deny.toml` allows. cargo-deny reads the same list; this
//! check needs nothing but cargo.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use crate::{run, tree};

/// Fails with the names of the packages whose licence is not allowed.
pub(crate) fn check() -> Result<()> {
    let file = tree::root().join("deny.toml");
    let text = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let allowed = allowed_in(&text);
    if allowed.is_empty() {
        bail!("{} allows no licence at all", file.display());
    }
    let listed = run::read(tree::cargo().args([
        "tree",
        "--workspace",
        "--locked",
        "--prefix",
        "none",
        "--format",
        "{p}\t{l}",
    ]))?;
    let packages: BTreeMap<&str, &str> = listed.lines().filter_map(|line| line.split_once('\t')).collect();
    let refused: Vec<String> = packages
        .iter()
        .filter(|(_, licence)| !is_allowed(licence, &allowed))
        .map(|(package, licence)| {
            let licence = licence.trim_end_matches(" (*)");
            format!(
                "{package}: {}",
                if licence.is_empty() {
                    "no licence named"
                } else {
                    licence
                }
            )
        })
        .collect();
    if !refused.is_empty() {
        bail!(
            "{} of {} packages have a licence that deny.toml does not allow:\n  {}",
            refused.len(),
            packages.len(),
            refused.join("\n  ")
        );
    }
    run::say(&format!("the licences of all {} packages are allowed", packages.len()));
    Ok(())
}

/// The strings of `allow = [ … ]` below `[licenses]`.
fn allowed_in(deny: &str) -> Vec<&str> {
    let section = deny.split_once("[licenses]").map_or("", |(_, rest)| rest);
    let list = section
        .split_once("allow = [")
        .and_then(|(_, rest)| rest.split_once(']'))
        .map_or("", |(list, _)| list);
    list.lines()
        .filter_map(|line| line.split('#').next())
        .flat_map(|line| line.split('"').skip(1).step_by(2))
        .collect()
}

/// An SPDX expression, or the older `A/B` for `A OR B`, holds if some choice it offers is allowed throughout.
fn is_allowed(licence: &str, allowed: &[&str]) -> bool {
    let spaced = licence
        .replace(" (*)", "")
        .replace('(', " ( ")
        .replace(')', " ) ")
        .replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut expression = Expression {
        words: &words,
        at: 0,
        allowed,
    };
    expression.any() && expression.at == words.len()
}

struct Expression<'a> {
    words: &'a [&'a str],
    at: usize,
    allowed: &'a [&'a str],
}

impl Expression<'_> {
    fn next_is(&mut self, word: &str) -> bool {
        let is = self.words.get(self.at).is_some_and(|next| *next == word);
        self.at += usize::from(is);
        is
    }

    fn any(&mut self) -> bool {
        let mut holds = self.all();
        while self.next_is("OR") {
            // Both sides are read, whatever the first says.
            holds |= self.all();
        }
        holds
    }

    fn all(&mut self) -> bool {
        let mut holds = self.one();
        while self.next_is("AND") {
            holds &= self.one();
        }
        holds
    }

    fn one(&mut self) -> bool {
        if self.next_is("(") {
            return self.any() & self.next_is(")");
        }
        // `MPL-2.0+` offers that version as well as later ones.
        let Some(name) = self.words.get(self.at).map(|word| word.trim_end_matches('+')) else {
            return false;
        };
        self.at += 1;
        if self.next_is("WITH") {
            let Some(exception) = self.words.get(self.at) else {
                return false;
            };
            self.at += 1;
            // An exception only permits more.
            let full = format!("{name} WITH {exception}");
            return self.allowed.contains(&name) || self.allowed.contains(&full.as_str());
        }
        self.allowed.contains(&name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALLOWED: &[&str] = &["MIT", "Apache-2.0", "ISC"];

    #[test]
    fn one_allowed_choice_is_enough_and_every_part_of_an_and_is_needed() {
        for good in [
            "MIT",
            "MIT OR GPL-3.0",
            "GPL-3.0/MIT",
            "ISC+",
            "ISC AND (Apache-2.0 OR GPL-3.0)",
            "MIT (*)",
        ] {
            assert!(is_allowed(good, ALLOWED), "{good}");
        }
        assert!(is_allowed("Apache-2.0 WITH LLVM-exception OR GPL-3.0", ALLOWED));
        for bad in [
            "",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT",
            "MIT GPL-3.0",
            "ISC AND (GPL-2.0 OR GPL-3.0)",
        ] {
            assert!(!is_allowed(bad, ALLOWED), "{bad}");
        }
    }

    #[test]
    fn the_list_is_read_from_deny_toml_without_its_comments() {
        let text = "[licenses]\nallow = [\n  \"MIT\", # a \"word\"\n  \"ISC\",\n]\n";
        assert_eq!(allowed_in(text), ["MIT", "ISC"]);
    }
}
