//! The three sysctls of a captured pod's namespace, without which the application's answers to a delivered connection
//! would leave by the pod's interface: switched on, and put back at release.

use crate::net::{Namespace, NamespaceError};
use std::{fs, io};

const SYSCTLS: [&str; 3] = [
    "net/ipv4/tcp_fwmark_accept",
    "net/ipv4/fwmark_reflect",
    "net/ipv6/fwmark_reflect",
];

/// Which of the sysctls were on before us, a bit each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Before(u8);

impl Before {
    /// Below 8.
    pub const fn to_bits(self) -> u8 {
        self.0
    }

    pub const fn from_bits(bits: u8) -> Self {
        Self(bits & 0b111)
    }
}

#[derive(Debug, thiserror::Error)]
pub enum SysctlError {
    #[error(transparent)]
    Namespace(#[from] NamespaceError),
    #[error("cannot read {name}")]
    Read { name: &'static str, source: io::Error },
    #[error("cannot set {name} to {value}")]
    Write {
        name: &'static str,
        value: char,
        source: io::Error,
    },
}

/// A kernel without IPv6 lacks the last one, and needs it as little.
fn is_absent(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

/// Reads what is on now.
pub fn read(namespace: &Namespace) -> Result<Before, SysctlError> {
    namespace.run(|| {
        let mut bits = 0;
        for (bit, name) in SYSCTLS.into_iter().enumerate() {
            match fs::read_to_string(format!("/proc/sys/{name}")) {
                Ok(text) if text.trim() != "0" => bits |= 1 << bit,
                Ok(_) => {}
                Err(error) if is_absent(&error) => {}
                Err(source) => return Err(SysctlError::Read { name, source }),
            }
        }
        Ok(Before(bits))
    })?
}

pub fn switch_on(namespace: &Namespace) -> Result<(), SysctlError> {
    write(namespace, Before(0b111))
}

pub fn put_back(namespace: &Namespace, before: Before) -> Result<(), SysctlError> {
    write(namespace, before)
}

fn write(namespace: &Namespace, wanted: Before) -> Result<(), SysctlError> {
    // The files below /proc/sys/net are those of the namespace that the opening thread is in.
    namespace.run(|| {
        for (bit, name) in SYSCTLS.into_iter().enumerate() {
            let value = if wanted.0 & (1 << bit) == 0 { '0' } else { '1' };
            match fs::write(format!("/proc/sys/{name}"), value.to_string()) {
                Ok(()) => {}
                Err(error) if is_absent(&error) => {}
                Err(source) => return Err(SysctlError::Write { name, value, source }),
            }
        }
        Ok(())
    })?
}

/// True if the namespace forwards packets for others: what it forwards never reaches a search for a listener, so the
/// pod cannot be captured whole.
pub fn forwards(namespace: &Namespace) -> Result<bool, SysctlError> {
    const SWITCHES: [&str; 2] = ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"];
    namespace.run(|| {
        for name in SWITCHES {
            match fs::read_to_string(format!("/proc/sys/{name}")) {
                Ok(text) if text.trim() != "0" => return Ok(true),
                Ok(_) => {}
                Err(error) if is_absent(&error) => {}
                Err(source) => return Err(SysctlError::Read { name, source }),
            }
        }
        Ok(false)
    })?
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::net::testing::{pod_namespace, set_sysctl, sysctl};

    #[test]
    fn sysctls_are_put_back_as_they_were() {
        let Some(pod) = pod_namespace("sysctls") else { return };
        let names = [
            "net/ipv4/tcp_fwmark_accept",
            "net/ipv4/fwmark_reflect",
            "net/ipv6/fwmark_reflect",
        ];
        set_sysctl(&pod, names[1], "1");
        let before = read(&pod).unwrap();
        assert_eq!(before, Before::from_bits(0b010));
        switch_on(&pod).unwrap();
        assert_eq!(names.map(|name| sysctl(&pod, name)), ["1", "1", "1"]);
        put_back(&pod, before).unwrap();
        assert_eq!(names.map(|name| sysctl(&pod, name)), ["0", "1", "0"]);
        assert!(!forwards(&pod).unwrap());
        set_sysctl(&pod, "net/ipv4/ip_forward", "1");
        assert!(forwards(&pod).unwrap());
    }
}
