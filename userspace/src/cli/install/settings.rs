//! What `warren install` can be told, and where that goes in the manifests. Pure. What is rarer is a matter for Helm.

use crate::cli::manifests::{CONTROLLER, NODE, Object};
use clap::Args;
use ipnet::IpNet;
use serde_json::{Value, json};

#[derive(Debug, Clone, Default, Args)]
pub struct Settings {
    /// The image that daemon and controller run [default: warren.mesh/warren of this command's version]
    #[arg(long, value_name = "REFERENCE")]
    pub image: Option<String>,
    /// The trust domain of every identity [default: cluster.local]
    #[arg(long, value_name = "NAME")]
    pub trust_domain: Option<String>,
    /// The cluster's DNS domain [default: cluster.local]
    #[arg(long, value_name = "NAME")]
    pub cluster_domain: Option<String>,
    /// The cluster's name, as metrics carry it [default: Kubernetes]
    #[arg(long, value_name = "NAME")]
    pub cluster_name: Option<String>,
    /// A range of pod or service addresses, beside those that Nodes and ServiceCIDRs name
    #[arg(long, value_name = "CIDR", value_delimiter = ',')]
    pub cluster_range: Vec<IpNet>,
    /// The nodes' folder of CNI plugins [default: /opt/cni/bin]
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    pub cni_bin_dir: Option<String>,
    /// The nodes' folder of CNI configurations [default: /etc/cni/net.d]
    #[arg(long, value_name = "DIR", value_parser = absolute)]
    pub cni_conf_dir: Option<String>,
}

/// The manifests have no place for a setting: a fault of the build.
#[derive(Debug, thiserror::Error)]
#[error("the manifests in this binary have no place for {0}")]
pub struct SettingsError(&'static str);

fn absolute(text: &str) -> Result<String, &'static str> {
    if text.starts_with('/') {
        Ok(text.to_owned())
    } else {
        Err("it must be an absolute path on the nodes")
    }
}

impl Settings {
    /// Writes what is set into the objects.
    pub(super) fn apply(&self, objects: &mut [Object]) -> Result<(), SettingsError> {
        let both = [NODE, CONTROLLER];
        if let Some(image) = &self.image {
            for name in both {
                container(objects, name, "--image")?["image"] = json!(image);
            }
        }
        let arguments = [
            ("--trust-domain", &self.trust_domain),
            ("--cluster-domain", &self.cluster_domain),
            ("--cluster-name", &self.cluster_name),
        ];
        for (flag, value) in arguments {
            if let Some(value) = value {
                for name in both {
                    replace_argument(container(objects, name, flag)?, flag, value)?;
                }
            }
        }
        if !self.cluster_range.is_empty() {
            let ranges: Vec<String> = self.cluster_range.iter().map(ToString::to_string).collect();
            let daemon = container(objects, NODE, "--cluster-range")?;
            let arguments = arguments_of(daemon, "--cluster-range")?;
            arguments.push(json!(format!("--cluster-range={}", ranges.join(","))));
        }
        for (volume, folder, flag) in [
            ("cni-bin", &self.cni_bin_dir, "--cni-bin-dir"),
            ("cni-conf", &self.cni_conf_dir, "--cni-conf-dir"),
        ] {
            if let Some(folder) = folder {
                // The daemon sees the node's folder below /host, and tells the plugin the path without it.
                let below = format!("/host{folder}");
                named(objects, "/volumes", volume, flag)?["hostPath"]["path"] = json!(folder);
                named(objects, "/containers/0/volumeMounts", volume, flag)?["mountPath"] = json!(below);
                replace_argument(container(objects, NODE, flag)?, flag, &below)?;
            }
        }
        Ok(())
    }
}

fn pod_spec<'o>(objects: &'o mut [Object], name: &str, flag: &'static str) -> Result<&'o mut Value, SettingsError> {
    let workload = objects
        .iter_mut()
        .find(|object| object.name() == name && object.value.pointer("/spec/template").is_some());
    let spec = workload.and_then(|object| object.value.pointer_mut("/spec/template/spec"));
    spec.ok_or(SettingsError(flag))
}

fn container<'o>(objects: &'o mut [Object], name: &str, flag: &'static str) -> Result<&'o mut Value, SettingsError> {
    pod_spec(objects, name, flag)?
        .pointer_mut("/containers/0")
        .ok_or(SettingsError(flag))
}

fn arguments_of<'c>(container: &'c mut Value, flag: &'static str) -> Result<&'c mut Vec<Value>, SettingsError> {
    container["args"].as_array_mut().ok_or(SettingsError(flag))
}

fn replace_argument(container: &mut Value, flag: &'static str, value: &str) -> Result<(), SettingsError> {
    let is_it = |argument: &Value| {
        let rest = argument.as_str().and_then(|text| text.strip_prefix(flag));
        rest.is_some_and(|rest| rest.starts_with('='))
    };
    let place = arguments_of(container, flag)?
        .iter_mut()
        .find(|argument| is_it(argument));
    *place.ok_or(SettingsError(flag))? = json!(format!("{flag}={value}"));
    Ok(())
}

/// The entry of that name in a list of the daemon's pod.
fn named<'o>(
    objects: &'o mut [Object],
    list: &str,
    name: &str,
    flag: &'static str,
) -> Result<&'o mut Value, SettingsError> {
    let list = pod_spec(objects, NODE, flag)?
        .pointer_mut(list)
        .and_then(Value::as_array_mut);
    let found = list.and_then(|all| all.iter_mut().find(|one| one["name"] == name));
    found.ok_or(SettingsError(flag))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::manifests;

    #[test]
    fn nothing_set_changes_nothing() {
        let mut objects = manifests::all().unwrap();
        Settings::default().apply(&mut objects).unwrap();
        assert_eq!(objects, manifests::all().unwrap());
    }

    #[test]
    fn each_setting_reaches_the_daemon_and_what_holds_for_both_the_controller_too() {
        let mut objects = manifests::all().unwrap();
        let settings = Settings {
            image: Some("registry.test/warren@sha256:0".into()),
            trust_domain: Some("shop.test".into()),
            cluster_domain: Some("k8s.test".into()),
            cluster_name: Some("east".into()),
            cluster_range: vec!["10.0.0.0/8".parse().unwrap(), "fd00::/8".parse().unwrap()],
            cni_bin_dir: Some("/var/lib/cni/bin".into()),
            cni_conf_dir: Some("/var/lib/cni/conf".into()),
        };
        settings.apply(&mut objects).unwrap();
        for name in [NODE, CONTROLLER] {
            let container = container(&mut objects, name, "").unwrap().to_string();
            for wanted in [
                "registry.test/warren@sha256:0",
                "--trust-domain=shop.test",
                "--cluster-domain=k8s.test",
                "--cluster-name=east",
            ] {
                assert!(container.contains(wanted), "{name} lacks {wanted}");
            }
            assert!(!container.contains("cluster.local"), "{name}");
        }
        let daemon = pod_spec(&mut objects, NODE, "").unwrap().to_string();
        for wanted in [
            "--cluster-range=10.0.0.0/8,fd00::/8",
            "\"path\":\"/var/lib/cni/bin\"",
            "\"mountPath\":\"/host/var/lib/cni/bin\"",
            "--cni-bin-dir=/host/var/lib/cni/bin",
            "\"path\":\"/var/lib/cni/conf\"",
            "\"mountPath\":\"/host/var/lib/cni/conf\"",
            "--cni-conf-dir=/host/var/lib/cni/conf",
        ] {
            assert!(daemon.contains(wanted), "the daemon lacks {wanted}");
        }
    }

    #[test]
    fn a_setting_that_finds_no_place_is_an_error_and_not_ignored() {
        let settings = Settings {
            trust_domain: Some("shop.test".into()),
            ..Settings::default()
        };
        assert!(settings.apply(&mut []).is_err());
    }
}
