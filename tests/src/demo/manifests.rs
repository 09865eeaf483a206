//! The manifests of deploy/demo, written for IPv4, in the family that the demo runs on. Text only.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The folder of the tree that holds them.
pub fn source() -> PathBuf {
    let root =
        std::env::var_os("WARREN_ROOT").map_or_else(|| Path::new(env!("CARGO_MANIFEST_DIR")).join(".."), PathBuf::from);
    root.join("deploy/demo")
}

/// Replaces everything in `directory` by the manifests that hold from the start.
pub fn write_all(directory: &Path, ipv6: bool) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| format!("list {}", directory.display()))? {
        let path = entry?.path();
        fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
    }
    let folder = source();
    for entry in fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if let (true, Some(name)) = (
            path.extension().is_some_and(|extension| extension == "yaml"),
            path.file_name(),
        ) {
            crate::manifests::write(directory, &name.to_string_lossy(), &read(&path, ipv6)?)?;
        }
    }
    Ok(())
}

/// One of `policies/`.
pub fn policy(name: &str, ipv6: bool) -> Result<String> {
    read(&source().join("policies").join(name), ipv6)
}

fn read(path: &Path, ipv6: bool) -> Result<String> {
    let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    Ok(if ipv6 { in_ipv6(&text) } else { text })
}

/// The text with every IPv4 address and prefix of the demo as its IPv6 counterpart.
fn in_ipv6(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(start) = rest.find(|c: char| c.is_ascii_digit()) {
        let end = rest[start..]
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .map_or(rest.len(), |end| start + end);
        out.push_str(&rest[..start]);
        let word = &rest[start..end];
        rest = &rest[end..];
        match word.parse() {
            Ok(address) => {
                out.push_str(&counterpart(address).to_string());
                if let Some(behind) = rest.strip_prefix('/') {
                    out.push_str("/112");
                    rest = behind.trim_start_matches(|c: char| c.is_ascii_digit());
                }
            }
            Err(_) => out.push_str(word),
        }
    }
    out.push_str(rest);
    out.replace("IPv4", "IPv6")
}

/// 10.77.1.10 is fd77::1:10: the numbers keep their digits, so that a person sees which is which.
pub fn counterpart(address: Ipv4Addr) -> Ipv6Addr {
    let [_, net, third, fourth] = address.octets();
    let digits = |number: u8| u16::from_str_radix(&number.to_string(), 16).unwrap_or_default();
    Ipv6Addr::new(0xfd00 | digits(net), 0, 0, 0, 0, 0, digits(third), digits(fourth))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_and_prefixes_change_family_and_nothing_else_does() {
        let text = "podCIDR: \"10.77.1.0/24\"\npodIP: \"10.77.2.11\"\nuid: 5ee1f4c2-0001\nport: 3306 # IPv4 v1\ncidrs: [10.96.0.0/16]";
        let expected = "podCIDR: \"fd77::1:0/112\"\npodIP: \"fd77::2:11\"\nuid: 5ee1f4c2-0001\nport: 3306 # IPv6 v1\ncidrs: [fd96::/112]";
        assert_eq!(in_ipv6(text), expected);
    }

    #[test]
    fn no_ipv4_address_is_left_in_the_manifests_of_the_demo() -> Result<()> {
        for name in ["cluster.yaml", "pods.yaml", "services.yaml"] {
            let text = read(&source().join(name), true)?;
            assert!(
                !text.contains("10.77.") && !text.contains("10.96.") && !text.contains("IPv4"),
                "{name}: {text}"
            );
        }
        Ok(())
    }
}
