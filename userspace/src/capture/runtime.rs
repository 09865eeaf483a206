//! Which container runtimes give a pod a kernel of its own. Pure.

/// The runtimes whose pods have sockets that this node's kernel does not see, by words of the RuntimeClasses and handlers
/// that they are installed with.
const FOREIGN: [(&str, &str); 6] = [
    ("kata", "Kata Containers"),
    ("gvisor", "gVisor"),
    ("runsc", "gVisor"),
    ("firecracker", "Firecracker"),
    ("kuasar", "Kuasar"),
    ("runhcs", "Hyper-V"),
];

/// The runtime behind a RuntimeClass' name or handler, where it has a kernel of its own.
pub(super) fn foreign_kernel(class: &str) -> Option<&'static str> {
    let class = class.to_ascii_lowercase();
    let mut words = class.split(|separator: char| !separator.is_ascii_alphanumeric());
    words.find_map(|word| {
        FOREIGN
            .iter()
            .find(|(name, _)| *name == word)
            .map(|(_, runtime)| *runtime)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runtimes_with_a_kernel_of_their_own_are_told_by_the_names_of_their_classes() {
        for (class, expected) in [
            ("kata", Some("Kata Containers")),
            ("kata-qemu", Some("Kata Containers")),
            ("kata-clh", Some("Kata Containers")),
            ("my-kata-remote", Some("Kata Containers")),
            ("gvisor", Some("gVisor")),
            ("runsc", Some("gVisor")),
            ("GVisor", Some("gVisor")),
            ("runc", None),
            ("crun", None),
            ("nvidia", None),
            ("wasmtime-spin", None),
            ("katalog", None),
            ("", None),
        ] {
            assert_eq!(foreign_kernel(class), expected, "{class}");
        }
    }
}
